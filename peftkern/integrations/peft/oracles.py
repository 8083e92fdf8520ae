"""The float64 oracles of verify: each method's layer by its definition, sharing no code with the package."""

import copy

import torch
import torch.nn.functional as F

from peftkern.integrations.peft.layer import unpack


def run(layer, call, names, parameters):
    """Output and adapter gradients in float64 of a recorded call, for the active adapters `names`.

    Args:
        call: x, grad and autocast of the call; parameters: of these adapters, in the order of `adapter_tensors`.
    """
    leaves = [u.detach().double().requires_grad_(True) for u in parameters]
    keys = [(name, key) for name, key, _, _ in layer.adapter_tensors() if name in names]
    values = dict(zip(keys, leaves, strict=True))
    with torch.autocast(call.autocast[0], enabled=False):
        y = _ORACLES[layer._method](layer, call.x, names, values)
        grads = torch.autograd.grad(y, leaves, call.grad.double(), allow_unused=True, materialize_grads=True)
        return y.detach(), grads


def _readable(base_layer):
    """The weight [N, K]; PEFT's dequantize_module_weight would replace the parameter of an 8-bit layer on the CPU."""
    from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

    unpack(base_layer)
    weight = base_layer.weight
    return dequantize_bnb_weight(weight, getattr(base_layer, "state", None)) if get_bnb_param_type(weight) else weight


def _base(layer, x, rotate_rows, unrotate_rows, scale=None):
    """The base layer's function in float64 with rotated inputs: of x, or of the weight where that is a kernel."""
    base_layer = layer.get_base_layer()
    weight = _readable(base_layer).detach().double()
    if isinstance(base_layer, torch.nn.Embedding):
        return rotate_rows(copy.deepcopy(base_layer).double()(x))
    bias = None if base_layer.bias is None else base_layer.bias.detach().double()
    s = 1 if scale is None else scale.reshape(-1)
    if isinstance(base_layer, torch.nn.Conv2d):
        rows = unrotate_rows(weight.flatten(1)).view(weight.shape)
        kernel = rows if scale is None else rows * s.view(-1, 1, 1, 1)
        return base_layer._conv_forward(x.double(), kernel, bias)
    y = F.linear(rotate_rows(x.double()), weight) * s
    return y if bias is None else y + bias


def _hra(layer, x, names, values):
    """One reflection after the other."""
    vectors = [_unit_columns(values[name, "hra_u"], layer.hra_apply_GS[name]) for name in names]

    def reflect(rows, order):
        for v in order:
            rows = rows - 2 * (rows @ v)[..., None] * v
        return rows

    forwards = [v for adapter in vectors for v in adapter]
    return _base(layer, x, lambda rows: reflect(rows, forwards[::-1]), lambda rows: reflect(rows, forwards))


def _unit_columns(u, gram_schmidt):
    """The reflection vectors of an adapter: unit columns, without those that vanish (or depend on earlier ones)."""
    threshold = 8 * u.shape[0] * torch.finfo(u.dtype).eps
    units = []
    for column in u.unbind(1):
        v = column
        for q in units * 2 if gram_schmidt else ():
            v = v - (q @ v) * q
        if v.detach().square().sum() > (threshold * column.detach().square().sum() if gram_schmidt else 0):
            units.append(v / torch.linalg.vector_norm(v))
    return units


def _oft(layer, x, names, values):
    """The polynomial, or the Cayley map, by powers of dense skew matrices."""
    rotations = [_skew_rotation(layer, name, values[name, layer._container]) for name in names]

    def rotate(rows, blocks):
        for R in blocks:
            view = rows.unflatten(-1, (-1, R.shape[-1]))
            rows = torch.einsum("...nb,nbc->...nc", view, R.expand(view.shape[-2], -1, -1)).flatten(-2)
        return rows

    transposed = [R.mT for R in reversed(rotations)]
    return _base(layer, x, lambda rows: rotate(rows, rotations), lambda rows: rotate(rows, transposed))


def _skew_rotation(layer, name, q):
    module = layer._adapters[name]
    b = module.block_size
    rows, columns = torch.triu_indices(b, b, 1, device=q.device)
    upper = torch.zeros(len(q), b, b, dtype=q.dtype, device=q.device).index_put(
        (torch.arange(len(q), device=q.device)[:, None], rows, columns), q
    )
    if module.coft:
        radius = module.eps / len(q) ** 0.5
        norm = (upper - upper.mT).detach().flatten(1).norm(dim=1)[:, None, None]
        # Straight through: the gradient does not see the projection.
        shortened = torch.where(norm <= radius, upper, upper * radius / norm)
        upper = upper + (shortened - upper).detach()
    Q, eye = upper - upper.mT, torch.eye(b, dtype=q.dtype, device=q.device)
    if not module.use_cayley_neumann:
        return (eye - Q) @ torch.linalg.inv(eye + Q)
    R, power, terms = eye.expand_as(Q), Q, module.num_cayley_neumann_terms
    # PEFT's loop: 3 terms give what 4 give.
    last = 0 if terms < 2 else 1 if terms == 2 else max(terms - 1, 3)
    for k in range(1, last + 1):
        full = k < last or terms == 2 or name in layer.peftkern_legacy
        R, power = R + (2 if full else 1) * power, power @ Q
    return R


def _boft(layer, x, names, values):
    """The dense product P_j diag(R) P_j^T of PEFT's definition, stage by stage, permutations as index lists."""
    stages = []
    for name in reversed(names):
        B = values[name, "boft_R"]
        A, eye = (B - B.mT) / 2, torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
        R = (eye - A) @ torch.linalg.inv(eye + A)
        stages += [(_butterfly_order(len(R), s, *R.shape[1:3]), R[s]) for s in reversed(range(len(R)))]
    scale = 1
    for name in names:
        scale = scale * values[name, "boft_s"].reshape(-1)

    def rotate(rows, order, transpose):
        for permutation, R in order:
            # x P diag(R) P^T, where row i of P is the unit vector of permutation[i].
            inverse = permutation.argsort()
            blocks = rows[..., inverse].unflatten(-1, (-1, R.shape[-1]))
            rows = torch.einsum("...nb,nbc->...nc", blocks, R.mT if transpose else R).flatten(-2)[..., permutation]
        return rows

    return _base(layer, x, lambda z: rotate(z, stages, False), lambda w: rotate(w, stages[::-1], True), scale)


def _butterfly_order(f, s, n, b):
    """The permutation of stage s: half blocks of every chunk of 2^s blocks, evens before odds."""
    if f == 1:
        return torch.arange(n * b)
    halves = torch.arange(n * b).view(-1, 2 << s, b // 2)
    return torch.cat((halves[:, 0::2], halves[:, 1::2]), 1).reshape(-1)


_ORACLES = {"hra": _hra, "oft": _oft, "boft": _boft}
