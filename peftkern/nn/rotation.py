"""What a layer with rotations R of its input computes: y = s (x R_1 R_2 ...) W^T + b, for OFT and BOFT alike.

The layers of `peftkern.nn` and the drop-ins for PEFT call these functions and hold no arithmetic of their own. A chain
is a list of (parameter, options), one link per adapter in PEFT's order; a `Kind` turns links into blocks R.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from peftkern.nn import convolution, forward
from peftkern.ops import _transforms
from peftkern.ops import block_rotation as br
from peftkern.ops import butterfly as bf
from peftkern.ops.householder import HALF


@dataclass(frozen=True)
class Kind:
    """A family of rotations: its name in messages, its parameter's name, and the operations on it."""

    name: str
    parameter: str
    blocks: Callable
    rotate: Callable
    apply_linear: Callable
    # y of one link as one node of the graph: (x, weight, bias, scale, link, exact).
    linear: Callable
    # The same where nothing is differentiated, in "fast" precision: (x, weight, bias, R, scale).
    fast_linear: Callable
    # Whether the product of two rotations is the product of their blocks.
    closed: Callable
    # Whether the first adapter meets x first (PEFT's OFT), or the last (its BOFT).
    in_order: bool


def _oft_blocks(q, options, dtype):
    return br.rotation_blocks(q, *options, dtype=dtype)


def _oft_apply_linear(x, weight, bias, R, scale):
    return br.apply_linear(x, weight, bias, R)


def _boft_blocks(boft_R, p, dtype):
    R = bf.butterfly_blocks(boft_R, dtype)
    return bf.drop_blocks(R, p) if p else R


def _oft_linear(x, weight, bias, scale, link, exact):
    q, (terms, legacy) = link
    return br.packed_linear(x, weight, bias, q, terms, legacy, exact)


def _oft_fast_linear(x, weight, bias, R, scale):
    return br.fast_linear(x, weight, bias, R)


def _boft_linear(x, weight, bias, scale, link, exact):
    return bf.dense_linear(x, weight, bias, link[0], scale, exact)


def _always(R):
    return True


def _one_stage(R):
    return R.shape[0] == 1


# Links: (q, (terms, legacy)) as `block_rotation.rotation_blocks` takes them; (boft_R, the fraction of blocks to drop).
OFT = Kind(
    "OFT", "oft_R", _oft_blocks, br.rotate_blocks, _oft_apply_linear, _oft_linear, _oft_fast_linear, _always, True
)
BOFT = Kind(
    "BOFT",
    "boft_R",
    _boft_blocks,
    bf.butterfly_rotate,
    bf.apply_linear,
    _boft_linear,
    bf.fast_linear,
    _one_stage,
    False,
)


def _rotations(kind, chain, dtype):
    """The blocks of a chain in the order in which they meet x, neighbours multiplied where blocks suffice."""
    found = [kind.blocks(*link, dtype) for link in chain]
    rotations = []
    for R in found if kind.in_order else reversed(found):
        last = rotations[-1] if rotations else None
        if last is not None and kind.closed(R) and kind.closed(last) and last.shape[-1] == R.shape[-1]:
            with _transforms.no_autocast(R.device.type):
                rotations[-1] = last @ R
        else:
            rotations.append(R)
    return rotations


class OFTCache(forward.FactorCache):
    """The blocks of an OFT chain that does not change, for generation token by token."""

    @staticmethod
    def factor(chain, dtype):
        return _rotations(OFT, chain, dtype)


class BOFTCache(forward.FactorCache):
    """The same for BOFT."""

    @staticmethod
    def factor(chain, dtype):
        return _rotations(BOFT, chain, dtype)


def _drops(kind, chain):
    return kind is BOFT and any(p for _, p in chain)


def rotations(kind, chain, dtype, cache=None):
    """[R, ...] in the order in which they meet x, in dtype (float32 or float64)."""
    if not _drops(kind, chain) and forward.cacheable(chain, cache):
        return cache.get(chain, dtype)
    return _rotations(kind, chain, dtype)


def _rotate(kind, x, Rs):
    """x R_1 R_2 ... in x's dtype, rounded once."""
    if len(Rs) == 1:
        return kind.rotate(x, Rs[0])
    return _wide(kind, x, Rs).to(x.dtype)


def _wide(kind, x, Rs):
    """x R_1 R_2 ... in the dtype of the rotations."""
    z = x.to(Rs[0].dtype)
    for R in Rs:
        z = kind.rotate(z, R)
    return z


def rotate_weight(kind, rows, Rs):
    """W (R_1 R_2 ...)^T [N, K]: the weight that a rotated input meets. In the dtype of the rotations."""
    rows = rows.to(Rs[0].dtype)
    for R in reversed(Rs):
        rows = kind.rotate(rows, R, transpose=True)
    return rows


def _working(compute):
    return torch.float64 if compute is torch.float64 else torch.float32


def adapted_linear(kind, x, base_layer, chain, scale=None, precision="auto", cache=None, args=(), kwargs=None):
    """y = s (x R_1 R_2 ...) W^T + b.

    Args:
        x: [..., K] floating; base_layer: read where `forward.readable_weight` allows, else called with the rotated x;
            so too where autocast has to cast x or the weight, unless `precision` is "exact". args, kwargs: passed on to
            the base layer, which then is always called.
        scale: N numbers of any shape, or None.
        precision: "auto" and "fast" round the rotated x once, as PEFT does, or a weight that is read where it has
            fewer rows; "exact" never.

    Returns:
        y [..., N] in the dtype of the product (the caller casts as its framework does).
    """
    forward._check_input(x, chain, kind.name, kind.parameter)
    weight, _ = forward.readable_weight(base_layer)
    compute = forward._compute_dtype(x, weight if weight is not None else getattr(base_layer, "weight", None), chain)
    autocasting, exact = forward._autocasting(x), precision == "exact" and compute in HALF
    if autocasting and weight is not None and x.dtype is weight.dtype is compute:
        # Autocast has nothing to cast.
        with torch.autocast(x.device.type, enabled=False):
            return adapted_linear(kind, x, base_layer, chain, scale, precision, cache, args, kwargs)
    reads = weight is not None and not args and not kwargs
    if reads and len(chain) == 1 and not autocasting and not _drops(kind, chain) and _differentiates():
        bias = forward._cast(base_layer.bias, compute)
        return kind.linear(x.to(compute), weight.to(compute), bias, scale, chain[0], exact)
    Rs = rotations(kind, chain, _working(compute), cache)
    if reads:
        bias = base_layer.bias
        if exact:
            rows = _wide(kind, x, Rs[:-1]) if len(Rs) > 1 else x.to(compute)
            return kind.apply_linear(rows, weight.to(compute), forward._cast(bias, compute), Rs[-1], scale)
        if len(Rs) == 1 and not autocasting and not torch.is_grad_enabled() and not _transforms.needs_reference():
            bias = forward._cast(bias, compute)
            return kind.fast_linear(x.to(compute), weight.to(compute), bias, Rs[0], scale)
        if weight.dtype is not compute and (compute is torch.float64 or not autocasting):
            bias = forward._cast(bias, compute)
            y = F.linear(_rotate(kind, x.to(compute), Rs), weight.to(compute), bias)
            return y if scale is None else bf.scale_outputs(y, scale, bias)
    rows = x if autocasting and compute is not torch.float64 else x.to(compute)
    y = base_layer(forward._for_base(_rotate(kind, rows, Rs), base_layer), *args, **(kwargs or {}))
    return y if scale is None else bf.scale_outputs(y, scale, forward._cast(_whole(base_layer.bias), y.dtype))


def _differentiates():
    """Whether autograd has nodes to save; without it the blocks may come from a cache."""
    return torch.is_grad_enabled() and not _transforms.needs_reference()


def _whole(bias):
    """The bias of a base layer that is a sharded unit of its own and has been sharded again after its forward."""
    return bias.full_tensor() if hasattr(bias, "full_tensor") else bias


def adapted_embedding(kind, x, base_layer, chain, cache=None, args=(), kwargs=None):
    """The rows that a base embedding looks up, rotated: [..., d] in the base layer's dtype, rounded once."""
    rows = base_layer(x, *args, **(kwargs or {}))
    forward._check_input(rows, chain, kind.name, kind.parameter)
    return _rotate(kind, rows, rotations(kind, chain, _working(forward._compute_dtype(rows, None, chain)), cache))


def adapted_conv2d(kind, x, base_layer, chain, scale=None, precision="auto", cache=None, args=(), kwargs=None):
    """The convolution whose kernel is s W R^T over rows of Cin kh kw; stride, padding and dilation as the base.

    "fast" rounds the rotated kernel once, "exact" brings W and its change into one accumulator:
    conv([x, x], [W, s W R^T - W]). Both read the weight; a base layer with hooks is called, and the convolution with
    the change is added.

    Raises:
        TypeError: the weight cannot be read (quantised).
    """
    forward._check_input(x, chain, kind.name, kind.parameter)
    weight = base_layer._parameters.get("weight")
    if not forward._plain(weight):
        name = type(base_layer).__name__
        raise TypeError(f"{kind.name}: a convolution needs a readable floating weight; {name} has none")
    forward._check_planes(x, base_layer, kind.name)
    compute = forward._compute_dtype(x, weight, chain)
    working = _working(compute)
    base_rows = weight.flatten(1).to(working)
    rows = rotate_weight(kind, base_rows, rotations(kind, chain, working, cache))
    if scale is not None:
        rows = rows * scale.reshape(-1, 1).to(working)
    readable = forward.readable_weight(base_layer, torch.nn.Conv2d)[0] is not None and not args and not kwargs
    planes = x.to(compute)
    if readable and not (precision == "exact" and compute in HALF):
        return base_layer._conv_forward(
            planes, rows.view_as(weight).to(compute), forward._cast(base_layer.bias, compute)
        )
    change = (rows - base_rows).view_as(weight)
    if readable:
        bias = forward._cast(base_layer.bias, compute)
        save_inputs = not _transforms.needs_reference()
        return convolution.with_change(base_layer, planes, weight.to(compute), bias, change, save_inputs)
    y = base_layer(forward._for_base(planes, base_layer), *args, **(kwargs or {}))
    return y + base_layer._conv_forward(planes, change.to(compute), None)
