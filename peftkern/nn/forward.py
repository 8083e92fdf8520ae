"""What a layer with HRA adapters computes: which precision serves, which dtype, and one cache for decoding.

The layers of `peftkern.nn` and the drop-ins for PEFT call these functions and hold no arithmetic of their own. A chain
is a list of (u [K, r], apply_gs) in the order in which PEFT multiplies: W' = W H_1 H_2 ...
"""

import torch
from torch.nn.modules import module as _module

from peftkern.nn import convolution
from peftkern.ops import _checks, _transforms
from peftkern.ops import householder as hh
from peftkern.ops.householder import autograd, contract, reference

_PLAIN = (torch.Tensor, torch.nn.Parameter)
FEW_ROWS = 4


def _plain(weight):
    """A tensor to compute with that is no subclass; under functional_call a weight is a Tensor, not a Parameter."""
    return type(weight) in _PLAIN and weight.dtype in _checks.FLOATS


def readable_weight(base_layer, layer_type=torch.nn.Linear):
    """Whether an `exact` layer may read the base weight and skip the base layer's own forward.

    Returns:
        (weight, None), or (None, reason): a clause such as "the base layer has hooks".
    """
    own = base_layer.__dict__
    if type(base_layer).forward is not layer_type.forward or "forward" in own:
        return None, f"the forward of the base layer ({type(base_layer).__name__}) is not that of {layer_type.__name__}"
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooked or _module._has_any_global_hook():
        return None, "the base layer has hooks"
    weight = base_layer._parameters.get("weight")
    if weight is None:
        return None, "the base weight is parametrised"
    if not _plain(weight):
        return None, f"the base weight is a {type(weight).__name__} of {weight.dtype}, not a plain floating tensor"
    return weight, None


class _Kept:
    """What one miss leaves: dtype, copies of the chain and the factor of those; kinds, generators: see `_generate`."""

    __slots__ = ("chain", "dtype", "factor", "generators", "kinds")

    def __init__(self, dtype, chain, factor):
        self.dtype, self.chain, self.factor, self.kinds, self.generators = dtype, chain, factor, {}, {}


class FactorCache:
    """V and T of a chain that does not change, for generation token by token.

    Used under no_grad on the CPU only. Each use compares u with the copy that the factor was made from, value by value
    (K r numbers: microseconds), so the cache cannot go stale, however the parameter was written. Not copied, not
    pickled.
    """

    def __init__(self):
        self.kept = None

    def __reduce__(self):
        return type(self), ()

    def __deepcopy__(self, memo):
        return type(self)()

    @staticmethod
    def factor(chain, dtype):
        return _factor_chain(chain, dtype)

    def get(self, chain, dtype):
        # One attribute, written once per miss, so that no thread sees a copy beside the factor of another.
        kept = self.kept
        if kept is not None and kept.dtype is dtype and _same_chain(chain, kept.chain):
            return kept.factor
        copies = [(u.detach().clone(), gs) for u, gs in chain]
        result = self.factor(copies, dtype)
        self.kept = _Kept(dtype, copies, result)
        return result


def _same_chain(chain, copies):
    return len(chain) == len(copies) and all(map(_same_link, chain, copies))


def _same_link(link, kept):
    return link[1] == kept[1] and _same(link[0], kept[0])


def _same(a, b):
    return a.dtype is b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def _factor_chain(chain, dtype):
    if len(chain) == 1:
        return hh.factor(chain[0][0], dtype, chain[0][1])
    if not any(gs for _, gs in chain):
        return hh.factor(torch.cat([u.to(dtype) for u, _ in chain], 1), dtype)
    return hh.compose([hh.factor(u, dtype, gs) for u, gs in chain])


def factor_chain(chain, dtype, cache=None):
    """(V, T) of the whole chain; V in dtype (float32 or float64)."""
    return cache.get(chain, dtype) if cacheable(chain, cache) else _factor_chain(chain, dtype)


def cacheable(chain, cache):
    """Whether a chain may be taken from its cache: nothing is differentiated, traced or transformed."""
    return (
        cache is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(u.device.type == "cpu" and type(u) in _PLAIN for u, _ in chain)
        and not _transforms.needs_reference()
    )


def _columns(chain, dtype, cache):
    """(V, T, gs): `factor_chain`, or with None for T what the product makes a factor of, by Gram-Schmidt where gs."""
    if cacheable(chain, cache) or (len(chain) > 1 and any(gs for _, gs in chain)):
        return *factor_chain(chain, dtype, cache), False
    columns = [u.to(dtype) for u, _ in chain]
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1), None, chain[0][1]


def _autocasting(x):
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _compute_dtype(x, weight, chain):
    """The dtype of the product: autocast's, else what x and a floating weight promote to, float64 if u is."""
    if x.dtype is torch.float64 or any(u.dtype is torch.float64 for u, _ in chain):
        return torch.float64
    if _autocasting(x):
        return torch.get_autocast_dtype(x.device.type)
    if weight is not None and weight.dtype in _checks.FLOATS:
        return torch.promote_types(x.dtype, weight.dtype)
    return x.dtype


def _cast(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


def _check_input(x, chain, method="HRA", parameter="hra_u"):
    if torch.compiler.is_compiling():
        return
    if not x.is_floating_point():
        raise TypeError(f"{method}: the input must be floating; got {x.dtype} of shape {list(x.shape)}")
    for name, tensor in (("input", x), *((parameter, u) for u, _ in chain)):
        if type(tensor) not in _PLAIN and type(tensor).__module__.startswith("torch.distributed"):
            raise TypeError(
                f"{method}: the {name} must be a plain tensor; got a {type(tensor).__name__}: let the sharded unit "
                f"hold the whole adapted layer and be called, so that it gathers its parameters first"
            )
    if x.device != chain[0][0].device:
        adapter = chain[0][0].device
        raise ValueError(f"{method}: the input is on {x.device}, the adapter on {adapter}; move one of them")


def adapted_linear(x, base_layer, chain, precision="auto", cache=None, args=(), kwargs=None):
    """y = x (W H_1 H_2 ...)^T + b.

    Args:
        x: [..., K] floating; base_layer: where `readable_weight` allows, its weight is read, else it is called with the
            rotated x (`fast`). args, kwargs: passed on to the base layer, which then is always called.
        precision: "auto", "fast" or "exact" (DESIGN: `auto` is exact for half-precision products).

    Returns:
        y [..., N] in the dtype of the product (the caller casts as its framework does).
    """
    if cache is not None and not args and not kwargs and _undisturbed() and cache.kept is not None:
        y = _generate(x, base_layer, chain, cache.kept)
        if y is not None:
            return y
    _check_input(x, chain)
    weight, _ = readable_weight(base_layer)
    compute = _compute_dtype(x, weight if weight is not None else getattr(base_layer, "weight", None), chain)
    working = torch.float64 if compute is torch.float64 else torch.float32
    V, T, gs = _columns(chain, working, cache)
    if weight is not None and not args and not kwargs:
        exact = (precision != "fast" and compute in hh.HALF) or _few_rows(x, compute)
        if exact or compute is torch.float64 or not _autocasting(x):
            bias = _cast(base_layer.bias, compute)
            return hh.apply_factor_linear(x.to(compute), weight.to(compute), bias, V, T, exact, gs)
    rotated = x if _autocasting(x) and working is torch.float32 else x.to(compute)
    z = hh.apply_factor(rotated, V, T, gram_schmidt=gs)
    return base_layer(_for_base(z, base_layer), *args, **(kwargs or {}))


def _few_rows(x, compute):
    """Whether one product of the rotated rows, unrounded, is the quickest in every precision: tokens of a generation.

    So on the CPU, where the layer costs little more than its machinery and the library is not at its best.
    """
    if not x.is_cpu or compute is torch.float64 or torch.compiler.is_compiling():
        return False
    return x.numel() <= FEW_ROWS * x.shape[-1]


def _undisturbed():
    """Whether nothing has to see the operations: autograd, compiler, transforms, dispatch modes, autocast."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or _transforms.needs_reference()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
    )


def _generate(x, base_layer, chain, kept):
    """A few tokens by a kept factor, past autograd.Function and the dispatcher; None where that does not serve.

    Through a narrow layer a token costs no more than the machinery that it would pass.
    """
    weight, dtype = readable_weight(base_layer)[0], x.dtype
    if weight is None or weight.dtype is not dtype or kept.dtype is torch.float64 or len(chain) != 1:
        return None
    (u, gs), (copy, kept_gs), bias = chain[0], kept.chain[0], base_layer._parameters.get("bias")
    if gs != kept_gs or u.shape != copy.shape or u.dtype is not copy.dtype or x.shape[-1] != weight.shape[1]:
        return None
    if not (_lies_plain(x) and _lies_plain(u) and weight.is_cpu and weight.is_contiguous()):
        return None
    if bias is not None and (bias.dtype is not dtype or not _lies_plain(bias)):
        return None
    kind = kept.kinds.get(dtype)
    if kind is None:
        kind = kept.kinds[dtype] = "cpu", contract.ROTATED_LINEAR.key(x, weight, bias, *kept.factor, False)
    serving = contract.ROTATED_LINEAR.serving(kind)
    if serving not in kept.generators:
        generator = getattr(serving, "generator", None)
        kept.generators[serving] = None if generator is None else generator(copy, *kept.factor)
    generate = kept.generators[serving]
    return None if generate is None else generate(x, weight, bias, u)


def _lies_plain(t):
    """Whether a tensor is one of the CPU whose numbers lie side by side."""
    return type(t) in _PLAIN and t.is_cpu and t.is_contiguous()


def _for_base(z, base_layer):
    """z in the dtype that an unreadable base layer with a floating weight expects (autocast does that by itself).

    A weight kept in another form, packed codes or float8 that a hook casts up, says nothing of what the layer expects.
    """
    weight = getattr(base_layer, "weight", None)
    if weight is None or weight.dtype not in _checks.FLOATS or (_autocasting(z) and z.dtype is not torch.float64):
        return z
    return z.to(weight.dtype)


def adapted_conv2d(x, base_layer, chain, precision="auto", cache=None, args=(), kwargs=None):
    """The convolution with the kernel W H over rows of Cin kh kw: stride, padding (any mode) and dilation as the base.

    `fast` adds the low-rank form to the base layer's output: conv(x, W) - conv1x1(conv(x, Vp), (W Vp) Cp^T). `exact`
    brings both into one accumulator: conv([x, x], [W, W H - W]). Both read the weight.

    Raises:
        TypeError: the weight cannot be read (quantised) or groups > 1.
    """
    _check_input(x, chain)
    weight = base_layer._parameters.get("weight")
    if not _plain(weight):
        raise TypeError(f"HRA: a convolution needs a readable floating weight; {type(base_layer).__name__} has none")
    _check_planes(x, base_layer)
    compute = _compute_dtype(x, weight, chain)
    working = torch.float64 if compute is torch.float64 else torch.float32
    V, T = factor_chain(chain, working, cache)
    flat = weight.flatten(1)
    flat = flat.to(working) if (flat.dtype is torch.float64) != (working is torch.float64) else flat
    Vp, Cp = reference.pair_basis(V, T, reverse=False)
    transformed = _transforms.needs_reference()
    A = Vp.mT.reshape(-1, *weight.shape[1:])
    project = reference.project if transformed else autograd.Project.apply
    # Products of float64 matrices: autocast leaves them alone.
    B = -(project(flat, Vp).double() @ Cp.mT).to(working)
    readable = readable_weight(base_layer, torch.nn.Conv2d)[0] is not None and not args and not kwargs
    rows = x.to(compute)
    if precision != "fast" and compute in hh.HALF and readable:
        bias = _cast(base_layer.bias, compute)
        return convolution.one_accumulator(base_layer, rows, weight.to(compute), bias, A, B, not transformed)
    update = convolution.low_rank(base_layer, rows, A.to(compute), B.to(compute))
    if readable and weight.dtype is not compute and (compute is torch.float64 or not _autocasting(x)):
        return base_layer._conv_forward(rows, weight.to(compute), _cast(base_layer.bias, compute)) + update
    return base_layer(_for_base(rows, base_layer), *args, **(kwargs or {})) + update


def _check_planes(x, base_layer, method="HRA"):
    if not torch.compiler.is_compiling() and (x.dim() not in (3, 4) or x.shape[-3] != base_layer.in_channels):
        wanted = f"[(batch,) {base_layer.in_channels}, height, width]"
        raise ValueError(f"{method}: the input of the convolution must have shape {wanted}; got {list(x.shape)}")
