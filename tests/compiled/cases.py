"""Calls that together launch the kernel variants of real layers, and what their code has to show.

Shapes: 4096 wide, 8192 tokens and a decoding step of 8; r 8, 32 and 128 are three of the four buckets that kernels are
compiled for (r 64 is the fourth). Rotations are OFT's of blocks of 32 and BOFT's of four stages of blocks of 8.
float64 serves gradcheck alone and is not held to anything here.
"""

import torch

from peftkern.ops.householder.autograd import WYFactors

K, N = 4096, 4096
# The factors of many layers meet no rows.
ROWS = {"8192 tokens": 8192, "8 tokens": 8, "64 layers": 0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Of one architecture's block, in bytes: the most shared memory that it may ask for.
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}

# Tensor cores by the dtype that the products are in. sm_100 has units of its own for half precision alone.
UNITS = {
    "half": {"sm80": {"HMMA"}, "sm90": {"HGMMA", "HMMA"}, "sm100": {"UTCHMMA", "HMMA"}, "gfx942": {"v_mfma_f32"}},
    "double": {"sm80": {"DMMA"}, "sm90": {"DMMA"}, "sm100": {"DMMA"}, "gfx942": {"v_mfma_f64"}},
}

# Triton kernels that must use tensor cores, and those whose loops must move 16 bytes per lane and access.
TENSOR = {
    "project_kernel": "half",
    "update_kernel": "half",
    "linear_kernel": "half",
    "linear_backward_kernel": "half",
    "core_kernel": "double",
    "gram_kernel": "double",
    "wy_factor_kernel": "double",
    "rotate_kernel": "half",
    "rotate_backward_kernel": "half",
    "wide_rotate_kernel": "half",
    "wide_sums_kernel": "half",
    "polynomial_kernel": "half",
    "polynomial_backward_kernel": "half",
    "blocks_gradient_kernel": "half",
    "cayley_backward_kernel": "half",
}
WIDE = (
    "project_kernel", "update_kernel", "linear_kernel", "linear_backward_kernel", "rotate_kernel",
    "rotate_backward_kernel", "wide_rotate_kernel", "wide_sums_kernel", "scale_kernel", "scale_backward_kernel",
)  # fmt: skip


def _rank_cases():
    for op in ("wy_factor", "wy_factor_backward", "orthogonality_penalty", "orthogonality_penalty_backward"):
        yield from ((op, "fp32", r, "8192 tokens") for r in (8, 32, 128))
    yield from (("wy_factor", "fp32", r, "64 layers") for r in (32, 128))
    for op in ("orthonormal_factor", "orthonormal_factor_backward"):
        yield from ((op, "fp32", r, "8192 tokens") for r in (8, 32, 128))


def _row_cases():
    for op in ("rotate", "rotate_backward", "rotated_linear", "rotated_linear_backward", "project", "project_backward"):
        for r in (8, 32, 128):
            yield op, "bf16", r, "8192 tokens"
        yield op, "bf16", 32, "8 tokens"
        # In float32 the product with the weight is the library's.
        if not op.startswith("rotated_linear"):
            yield op, "fp32", 32, "8192 tokens"
        yield op, "fp16", 32, "8192 tokens"


BLOCKS = {"b32": (32, 1), "b64": (64, 1), "b256": (256, 1), "b8 f4": (8, 4)}


def _block_cases():
    for op in ("skew_polynomial", "skew_polynomial_backward", "skew_cayley", "skew_cayley_backward"):
        yield op, "fp32", "b32", "8192 tokens"
        yield op, "fp32", "b64", "8192 tokens"
    # Wider than a panel.
    for op in ("block_rotate", "block_rotate_backward"):
        yield from ((op, dtype, "b256", "8192 tokens") for dtype in DTYPES)
    for op in ("dense_cayley", "dense_cayley_backward"):
        yield op, "fp32", "b8 f4", "8192 tokens"
    for size, kind in (("b32", "block"), ("b8 f4", "butterfly")):
        for op in (f"{kind}_rotate", f"{kind}_rotate_backward"):
            yield from ((op, dtype, size, "8192 tokens") for dtype in DTYPES)
        yield f"{kind}_rotate", "bf16", size, "8 tokens"
        yield f"{kind}_rotated_linear", "bf16", size, "8192 tokens"
        yield f"{kind}_rotated_linear", "bf16", size, "8 tokens"
        yield f"{kind}_rotated_linear_backward", "bf16", size, "8 tokens"
    for op in ("butterfly_rotate_weight", "scale_outputs", "scale_outputs_backward"):
        yield from ((op, dtype, "b8 f4", "8192 tokens") for dtype in ("bf16", "fp32"))


CASES = {f"{op} {dtype} r{r} {rows}": (op, dtype, r, rows) for op, dtype, r, rows in (*_rank_cases(), *_row_cases())}
CASES |= {f"{op} {dtype} {size} {rows}": (op, dtype, size, rows) for op, dtype, size, rows in _block_cases()}
# Run in every test run; the others with the slow tests.
FIRST = {name for name, (op, dtype, r, rows) in CASES.items() if (dtype, rows) != ("fp16", "8192 tokens") and r != 8}
# Kernels that break a rule, and why they still ship. A case that has come right fails until its line is deleted.
KNOWN = {}


def call(name):
    """The call of a case, by the backend in use."""
    op, _, _, rows = CASES[name]
    if rows == "64 layers":
        return WYFactors.apply(*arguments(name) * 64)
    return getattr(torch.ops.peftkern, op)(*arguments(name))


def arguments(name):
    """The arguments of a case. Their memory is never read."""
    op, dtype, r, rows = CASES[name]
    if r in BLOCKS:
        return _block_arguments(op, DTYPES[dtype], *BLOCKS[r], ROWS[rows])
    M, dtype = ROWS[rows], DTYPES[dtype]
    x, dy, z = (torch.empty(M, width, dtype=dtype) for width in (K, N, K))
    W, b = torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype)
    V, T, P = torch.empty(K, r), torch.empty(r, r, dtype=torch.float64), torch.empty(M, r)
    B = torch.empty(N if dtype.itemsize == 2 else 0, r)
    return {
        "wy_factor": (V,),
        "wy_factor_backward": (T, V, T),
        "rotate": (x, V, T, False),
        "rotate_backward": (z, x, P, V, T, False, [True, True]),
        "rotated_linear": (x, W, b, V, T, True),
        "rotated_linear_backward": (dy, x, W, P, B, V, T, [True, True]),
        "project": (x, V),
        "project_backward": (P, x, V, [True, True]),
        "orthogonality_penalty": (V, True),
        "orthogonality_penalty_backward": (torch.empty(()), V, True),
        "orthonormal_factor": (V,),
        "orthonormal_factor_backward": (V, T, V, T),
    }[op]


def _block_arguments(op, dtype, b, f, M):
    x, y = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
    W, bias, scale = torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype), torch.empty(N)
    q, R, B = torch.empty(K // b, b * (b - 1) // 2), torch.empty(K // b, b, b), torch.empty(f, K // b, b, b)
    coefficients, both = [1.0, 2.0, 2.0, 2.0, 1.0], [True, True]
    return {
        "skew_polynomial": (q, coefficients),
        "skew_polynomial_backward": (R, q, coefficients),
        "skew_cayley": (q,),
        "skew_cayley_backward": (R, R),
        "dense_cayley": (B,),
        "dense_cayley_backward": (B, B),
        "block_rotate": (x, R, False),
        "block_rotate_backward": (x, x, R, False, both),
        "block_rotated_linear": (x, W, bias, R),
        "block_rotated_linear_backward": (y, x, W, R, both),
        "butterfly_rotate": (x, B, False),
        "butterfly_rotate_backward": (x, x, B, False, both),
        "butterfly_rotated_linear": (x, W, bias, scale, B),
        "butterfly_rotated_linear_backward": (y, x, W, scale, y, B, [True, *both]),
        "butterfly_rotate_weight": (W, scale, B),
        "scale_outputs": (y, scale, bias),
        "scale_outputs_backward": (y, y, scale, bias, both),
    }[op]
