"""The shapes that are measured, and the tensors of one shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bench import rotations

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    # PEFT's default on a half-precision model: the adapter stays in fp32.
    "bf16+fp32": (torch.bfloat16, torch.float32),
}
ROTATING = ("oft", "boft")
OPERATION = "op:"
NAMES = {
    "linear": "HRA",
    "gram_schmidt": "HRA with Gram-Schmidt",
    "decode": "HRA, one token",
    "conv": "HRA on a convolution",
    "oft": "OFT",
    "boft": "BOFT",
}
# Step sizes of the reflection pairs that follow PEFT's identity initialisation, relative to the vectors.
TRAINED_PAIR_GAP = 0.1


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    kind: "linear" (forward + backward), "gram_schmidt" (the same with PEFT's apply_GS=True), "decode" (forward of one
    token under no_grad), "conv" (forward + backward of a 3 x 3 convolution, padding 1), "oft" or "boft" (forward +
    backward of a linear layer whose input is rotated in blocks of r, by `factors` butterfly factors); or "op:" and the
    name of an operation that is timed alone, at the shapes of a layer of the kind `of`.
    width_in, width_out: features, or channels of a convolution. tokens: rows of x; for a convolution batch * image**2.
    """

    kind: str
    width_in: int
    width_out: int
    tokens: int
    r: int
    dtype: str
    bias: bool = False
    batch: int = 0
    image: int = 0
    factors: int = 1
    of: str = ""

    @property
    def operation(self) -> str | None:
        """The operation that is timed alone."""
        return self.kind.removeprefix(OPERATION) if self.kind.startswith(OPERATION) else None

    @property
    def layer(self) -> str:
        """The kind of layer, also of an operation timed alone."""
        return self.of or self.kind

    @property
    def base_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][0]

    @property
    def adapter_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][1]

    @property
    def half(self) -> bool:
        return self.base_dtype != torch.float32

    @property
    def trains(self) -> bool:
        return self.kind != "decode"

    @property
    def rotates(self) -> bool:
        """OFT or BOFT."""
        return self.layer in ROTATING

    @property
    def id(self) -> str:
        shape = f"{self.width_in}x{self.width_out}"
        rows = f"n{self.batch}-{self.image}x{self.image}" if self.kind == "conv" else f"t{self.tokens}"
        size = f"r{self.r}" if not self.rotates else f"b{self.r}" + (f"f{self.factors}" if self.layer == "boft" else "")
        return f"{self.kind}-{shape}-{rows}-{size}-{self.dtype}"

    @property
    def title(self) -> str:
        shape = f"{self.width_in} x {self.width_out}"
        if self.kind == "conv":
            rows = f"3 x 3, {self.batch} images of {self.image} x {self.image}"
        else:
            rows = f"{self.tokens} token{'s' if self.tokens != 1 else ''}"
        dtype = {"fp32": "fp32", "bf16": "bf16", "bf16+fp32": "bf16 + fp32 adapter"}[self.dtype]
        if self.rotates:
            factors = f", {self.factors} factor{'s' if self.factors != 1 else ''}" if self.layer == "boft" else ""
            name = "" if self.of else f"{self.kind.upper()}, "
            return f"{name}{shape}, {rows}, blocks of {self.r}{factors}, {dtype}"
        return f"{shape}, {rows}, r {self.r}, {dtype}"

    @property
    def brief(self) -> str:
        """A title for tables in which every case has as many rows."""
        size = f"r {self.r}" if not self.rotates else f"b {self.r}" + (f", f {self.factors}" * (self.layer == "boft"))
        return f"{self.operation or NAMES[self.kind]}, {self.width_in} wide, {size}, {self.dtype}"

    def fields(self) -> dict[str, object]:
        """What a result file says of the case."""
        return {**asdict(self), "id": self.id, "title": self.title}

    @property
    def reflector_length(self) -> int:
        return self.width_in * 9 if self.kind == "conv" else self.width_in


def _linear(width: int, tokens: int, r: int, dtype: str, kind: str = "linear") -> Case:
    # 768 wide stands for encoders, whose linear layers have a bias; wider ones for decoders, whose have none.
    return Case(kind, width, width, tokens, r, dtype, bias=width == 768)


def _conv(channels: int, batch: int, image: int, r: int, dtype: str) -> Case:
    return Case("conv", channels, channels, batch * image * image, r, dtype, bias=True, batch=batch, image=image)


TABLE = [
    _linear(2048, 1024, 8, "fp32"),
    _linear(2048, 1024, 8, "bf16"),
    _linear(2048, 1024, 8, "bf16+fp32"),
    _linear(768, 512, 8, "bf16+fp32"),
    _linear(4096, 2048, 32, "bf16+fp32"),
]


def _rotation(kind: str, width: int, tokens: int, b: int, dtype: str, factors: int = 1) -> Case:
    return Case(kind, width, width, tokens, b, dtype, bias=width == 768, factors=factors)


ROTATIONS = [
    *(_rotation("oft", 2048, 1024, 32, dtype) for dtype in ("fp32", "bf16+fp32")),
    _rotation("oft", 768, 512, 32, "bf16+fp32"),
    *(_rotation("boft", 2048, 1024, 8, dtype) for dtype in ("fp32", "bf16+fp32")),
    _rotation("boft", 768, 512, 8, "bf16+fp32"),
    *(_rotation("boft", 2048, 1024, 8, dtype, factors=4) for dtype in ("fp32", "bf16+fp32")),
]
GRAM_SCHMIDT = [
    *(_linear(2048, 1024, 8, dtype, "gram_schmidt") for dtype in DTYPES),
    _linear(768, 512, 8, "bf16+fp32", "gram_schmidt"),
]
QUICK_EXTRAS = [_linear(2048, 1, 8, "bf16+fp32", "decode"), *GRAM_SCHMIDT]

_LINEAR = [
    _linear(width, tokens, r, dtype)
    for width, token_counts in ((768, (128, 512, 4096)), (2048, (128, 1024, 4096)), (4096, (128, 2048, 4096)))
    for tokens in token_counts
    for r in (8, 32)
    for dtype in DTYPES
]
_GRAM_SCHMIDT = [
    _linear(width, tokens, 8, dtype, "gram_schmidt") for width, tokens in ((768, 512), (2048, 1024)) for dtype in DTYPES
]
_DECODE = [_linear(width, 1, 8, dtype, "decode") for width in (768, 2048, 4096) for dtype in DTYPES]
_CONV = [
    _conv(channels, batch, image, 8, dtype)
    for channels, batch, image in ((256, 8, 14), (320, 2, 32))
    for dtype in ("fp32", "bf16+fp32")
]

SETS = {
    "quick": TABLE + QUICK_EXTRAS + ROTATIONS,
    "rotations": ROTATIONS,
    "full": TABLE + ROTATIONS + [case for case in _LINEAR + _GRAM_SCHMIDT + _DECODE + _CONV if case not in TABLE],
}


@dataclass
class Problem:
    """The tensors all arms of a case share: x and grad_y in the base dtype, u in the adapter dtype ([K, r] of HRA).

    The weight is one tensor for every arm, so that no arm finds it colder than another.
    """

    case: Case
    x: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None
    u: Tensor
    grad_y: Tensor


def make_problem(case: Case, seed: int = 0, device: str = "cpu") -> Problem:
    """Random tensors of a case; u is a trained-looking adapter, pairs of vectors that have moved 10 % apart."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    K = case.reflector_length
    if case.kind == "conv":
        x = normal(case.batch, case.width_in, case.image, case.image)
        weight = normal(case.width_out, case.width_in, 3, 3) / K**0.5
        grad_y = normal(case.batch, case.width_out, case.image, case.image)
    else:
        x = normal(case.tokens, case.width_in)
        weight = normal(case.width_out, case.width_in) / K**0.5
        grad_y = normal(case.tokens, case.width_out)
    bias = normal(case.width_out) if case.bias else None

    if case.rotates:
        u = rotations.SIZE[case.layer] * normal(*rotations.adapter_shape(case))
    elif case.kind == "gram_schmidt":
        u = normal(K, case.r)
    else:
        u = normal(K, case.r // 2).repeat_interleave(2, dim=1) + TRAINED_PAIR_GAP * normal(K, case.r)
    dtype = case.base_dtype
    return Problem(
        case=case,
        x=x.to(dtype).requires_grad_(case.trains),
        weight=nn.Parameter(weight.to(dtype), requires_grad=False),
        bias=None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False),
        u=u.to(case.adapter_dtype),
        grad_y=grad_y.to(dtype),
    )
