"""Outputs, gradients and merged weights of accelerated OFT and BOFT layers against PEFT's own, judged in float64."""

import copy

import pytest
import torch
from peft import BOFTConfig, OFTConfig, get_peft_model
from peft.tuners.boft import layer as boft_layer
from peft_models import DTYPES, ConvNet, inputs, relative
from rotation_models import boft, fbd, gradients, no_fbd, oft, pair
from torch import nn

import peftkern

__all__ = ["fbd", "no_fbd"]

CONFIGS = {
    "oft": lambda: oft(),
    "oft, number of blocks": lambda: oft(r=2, oft_block_size=0),
    "oft, exact Cayley": lambda: oft(use_cayley_neumann=False),
    "oft, shared block": lambda: oft(block_share=True),
    # The radius and the root of the number of blocks are exact in float32, in which PEFT computes them.
    "oft, coft": lambda: oft(coft=True, eps=2**-7, block_share=True),
    "oft, dropout without effect": lambda: oft(module_dropout=0.5),
    "oft, bias": lambda: oft(bias="oft_only"),
    **{f"oft, {n} terms": lambda n=n: oft(num_cayley_neumann_terms=n) for n in (1, 2, 3, 4, 6, 9)},
    "boft": lambda: boft(),
    "boft, number of blocks": lambda: boft(boft_block_num=2, boft_block_size=0),
    "boft, one block": lambda: boft(boft_block_num=1, boft_block_size=0),
    "boft, two factors": lambda: boft(boft_block_size=2, boft_n_butterfly_factor=2),
    "boft, three factors": lambda: boft(boft_block_size=2, boft_n_butterfly_factor=3),
    "boft, four factors of wide blocks": lambda: boft(boft_block_size=4, boft_n_butterfly_factor=2),
    "boft, bias": lambda: boft(bias="boft_only"),
    "boft, dropout": lambda: boft(boft_dropout=0.5),
    "boft, dropout of three factors": lambda: boft(boft_block_size=2, boft_n_butterfly_factor=3, boft_dropout=0.6),
}


def _agree(plain, fast, x, tolerance=1e-12):
    torch.manual_seed(5)
    y = plain(x)
    weights = torch.randn_like(y)
    results = []
    for model in (plain, fast):
        torch.manual_seed(6)
        results.append(gradients(model, x, weights))
    (y, grads), (y_fast, grads_fast) = results
    assert relative(y_fast, y) < tolerance
    assert grads.keys() <= grads_fast.keys()
    for name, grad in grads_fast.items():
        if name in grads and grads[name].any():
            assert relative(grad, grads[name]) < 10 * tolerance, name
        else:
            # PEFT has no gradient at all in the constant polynomial of one term.
            assert not grad.any(), name


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_pefts_in_float64(name, fbd):
    plain, fast = pair(CONFIGS[name]())
    _agree(plain.train(), fast.train(), inputs())
    assert peftkern.stats(reset=True)[name[:4].rstrip(",")]["accelerated"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_are_pefts_and_unmerging_takes_them_back(name, fbd):
    plain, fast = pair(CONFIGS[name]())
    x, layer = inputs(), fast.base_model.model.a.base_layer
    before = layer.weight.detach().clone()
    y = fast.eval()(x)
    plain.eval().merge_adapter()
    for safe in (False, True):
        fast.merge_adapter(safe_merge=safe)
        assert relative(layer.weight, plain.base_model.model.a.base_layer.weight) < 1e-13
        assert relative(fast(x), y) < 1e-12
        fast.unmerge_adapter()
        torch.testing.assert_close(layer.weight, before, rtol=1e-12, atol=1e-12)
        assert relative(fast(x), y) < 1e-12


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
@pytest.mark.parametrize(
    "configs",
    [
        (oft, oft),
        (oft, lambda: oft(oft_block_size=8)),
        (oft, lambda: oft(block_share=True)),
        (boft, boft),
        (boft, lambda: boft(boft_block_size=8, bias="none")),
    ],
    ids=["oft", "oft blocks of 4 and 8", "oft shared", "boft", "boft blocks of 4 and 8"],
)
def test_several_active_adapters_meet_the_input_in_pefts_order_in_forward_and_merge(configs, order, no_fbd):
    first, second = configs
    plain, fast = pair(first(), second=second())
    for model in (plain, fast):
        model.base_model.set_adapter(order)
    x = inputs()
    _agree(plain, fast, x)
    y = plain(x)
    for model in (plain, fast):
        model.base_model.merge_adapter(order)
    assert relative(fast(x), plain(x)) < 1e-12
    fast.unmerge_adapter()
    assert relative(fast(x), y) < 1e-12
    plain.unmerge_adapter()
    plain.base_model.set_adapter(order[::-1])
    assert relative(fast(x), plain(x)) > 1e-3


def test_two_butterflies_of_several_factors_multiply_in_pefts_order(fbd):
    config = {"boft_block_size": 2, "boft_n_butterfly_factor": 3}
    plain, fast = pair(boft(**config), second=boft(**config))
    _agree(plain, fast, inputs())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_two_boft_adapters_draw_their_dropout_as_peft_does(dropout, no_fbd):
    plain, fast = pair(boft(boft_dropout=dropout), second=boft(boft_dropout=dropout))
    _agree(plain.train(), fast.train(), inputs())


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_dense_matrices_of_the_rotations_are_pefts(name, no_fbd):
    plain, fast = pair(CONFIGS[name]())
    theirs, ours = (m.base_model.model.b.get_delta_weight("default") for m in (plain, fast))
    if name == "boft":
        torch.testing.assert_close(ours[1], theirs[1])
        ours, theirs = ours[0], theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "1x1, stride": {"kernel_size": 1, "stride": 2},
    "1x1, circular padding": {"kernel_size": 1, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("options", [{}, {"use_cayley_neumann": False}, {"block_share": True}], ids=str)
@pytest.mark.parametrize("geometry", CONVOLUTIONS)
def test_one_by_one_oft_convolutions_are_pefts(geometry, options):
    net = ConvNet(**CONVOLUTIONS[geometry])
    net.conv = nn.Conv2d(8, 6, **CONVOLUTIONS[geometry])
    plain, fast = pair(oft(target_modules=["conv"], **options), net, quiet=False)
    _agree(plain, fast, torch.randn(2, 8, 9, 7, dtype=torch.float64))


@pytest.mark.parametrize("geometry", [{}, {"padding": 1}, {"stride": 2, "padding": 2}, {"kernel_size": 1}], ids=str)
@pytest.mark.parametrize("options", [{}, {"boft_n_butterfly_factor": 2}], ids=["one factor", "two factors"])
def test_boft_convolutions_are_pefts(geometry, options, fbd):
    net = ConvNet(**geometry)
    net.conv = nn.Conv2d(8, 6, **{"kernel_size": 3, **geometry})
    plain, fast = pair(boft(target_modules=["conv"], boft_block_size=2, **options), net)
    _agree(plain, fast, torch.randn(2, 8, 9, 7, dtype=torch.float64))


class EmbeddingNet(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(11, 24, **options)

    def forward(self, ids):
        return self.table(ids)


@pytest.mark.parametrize("options", [{}, {"use_cayley_neumann": False}, {"block_share": True}], ids=str)
@pytest.mark.parametrize("second", [False, True], ids=["one", "two"])
def test_embeddings_are_pefts(options, second):
    other = oft(target_modules=["table"], oft_block_size=8) if second else None
    plain, fast = pair(oft(target_modules=["table"], **options), EmbeddingNet(padding_idx=0), second=other)
    ids = torch.randint(0, 11, (3, 5))
    _agree(plain, fast, ids)
    y = fast(ids)
    for model in (plain, fast):
        model.merge_adapter()
    assert relative(fast(ids), plain(ids)) < 1e-13
    fast.unmerge_adapter()
    assert relative(fast(ids), y) < 1e-12


def _layer(config, dtypes):
    x_dtype, base_dtype, adapter_dtype = DTYPES[dtypes]
    plain = get_peft_model(nn.Sequential(nn.Linear(96, 80)).to(base_dtype), config)
    for name, p in plain.named_parameters():
        if "oft_" in name:
            p.data = p.data.to(adapter_dtype)
    fast = copy.deepcopy(plain)
    peftkern.accelerate(fast)
    return plain, fast, copy.deepcopy(plain).double(), torch.randn(64, 96).to(x_dtype)


HALF_CONFIGS = {
    "oft": lambda: OFTConfig(oft_block_size=16, target_modules=["0"], init_weights=False),
    "oft, exact Cayley": lambda: OFTConfig(
        oft_block_size=16, target_modules=["0"], init_weights=False, use_cayley_neumann=False
    ),
    "boft": lambda: BOFTConfig(boft_block_size=8, target_modules=["0"], init_weights=False),
}


@pytest.mark.parametrize("name", HALF_CONFIGS)
@pytest.mark.parametrize("dtypes", [name for name in DTYPES if name != "fp64"])
def test_errors_are_at_most_twice_pefts_and_dtypes_are_pefts(dtypes, name, no_fbd):
    plain, fast, exact, x = _layer(HALF_CONFIGS[name](), dtypes)
    weights = torch.randn(64, 80).to(x.dtype)
    y64, grads64 = gradients(exact, x.double(), weights.double())
    y, grads = gradients(fast, x, weights)
    assert y.dtype is x.dtype
    roundoff = max(torch.finfo(dtype).eps / 2 for dtype in DTYPES[dtypes])
    if x.dtype is not DTYPES[dtypes][1]:
        with pytest.raises(RuntimeError):
            plain(x)
        limits = dict.fromkeys(("y", *grads64), 2 * roundoff)
    else:
        theirs, their_grads = gradients(plain, x, weights)
        assert all(grads[name].dtype is grad.dtype for name, grad in their_grads.items())
        limits = {name: max(2 * relative(grad, grads64[name]), roundoff) for name, grad in their_grads.items()}
        limits["y"] = max(2 * relative(theirs, y64), roundoff)
    assert relative(y, y64) <= limits["y"]
    for key, grad in grads64.items():
        assert relative(grads[key], grad) <= limits[key], key


@pytest.mark.parametrize("name", HALF_CONFIGS)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_output_under_autocast_has_pefts_dtype_and_at_most_twice_its_error(name, base_dtype, x_dtype, no_fbd):
    plain = get_peft_model(nn.Sequential(nn.Linear(96, 80)).to(base_dtype), HALF_CONFIGS[name]())
    fast = copy.deepcopy(plain)
    peftkern.accelerate(fast)
    x = torch.randn(64, 96).to(x_dtype)
    y = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = plain(x), fast(x)
    assert ours.dtype is theirs.dtype is x_dtype
    assert relative(ours, y) <= 2 * relative(theirs, y)


@pytest.mark.parametrize("update", [3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name", ["oft", "boft"])
def test_exact_keeps_small_updates_of_a_half_precision_layer(name, update, no_fbd):
    options = {"target_modules": ["0"]}
    config = OFTConfig(oft_block_size=32, **options) if name == "oft" else BOFTConfig(boft_block_size=8, **options)
    net = nn.Sequential(nn.Linear(256, 256, bias=False)).to(torch.bfloat16)
    model = get_peft_model(net, config)
    layer = model.base_model.model[0]
    x = torch.randn(512, 256).bfloat16()
    base = x.double() @ layer.base_layer.weight.double().T
    parameter = layer.oft_R["default"].weight if name == "oft" else layer.boft_R["default"]
    direction, step = torch.randn_like(parameter), 1e-4
    with torch.no_grad():
        for _ in range(4):
            parameter.copy_(step * direction)
            delta = copy.deepcopy(model).double()(x.double()) - base
            step *= update / float(delta.norm() / base.norm())
        assert 0.8 * update < float(delta.norm() / base.norm()) < 1.2 * update
        report = peftkern.accelerate(model, "exact")
        assert report.layers["base_model.model.0"].precision == "exact"
        gain = float(((model(x).double() - base) * delta).sum() / delta.square().sum())
    assert 0.94 < gain < 1.06


@pytest.mark.parametrize("update", [3e-4, 1e-2])
def test_exact_keeps_small_updates_of_a_half_precision_convolution(update):
    net = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1)).to(torch.bfloat16)
    model = get_peft_model(net, OFTConfig(oft_block_size=16, target_modules=["0"]))
    layer = model.base_model.model[0]
    x = torch.randn(8, 16, 16, 16).bfloat16()
    base = copy.deepcopy(layer.base_layer).double()(x.double())
    q = layer.oft_R["default"].weight
    direction, step = torch.randn_like(q), 1e-4
    peftkern.accelerate(model, "exact", compat=None)
    with torch.no_grad():
        for _ in range(4):
            q.copy_(step * direction)
            delta = copy.deepcopy(model).double()(x.double()) - base
            step *= update / float(delta.norm() / base.norm())
        gain = float(((model(x).double() - base) * delta).sum() / delta.square().sum())
    assert 0.94 < gain < 1.06


@pytest.mark.parametrize("name", ["oft", "boft"])
@pytest.mark.parametrize("shape", [(0, 24), (24,), (1, 24), (2, 3, 5, 24)])
def test_any_leading_shape_gives_pefts_output(name, shape, no_fbd):
    plain, fast = pair(CONFIGS[name]())
    x = torch.randn(shape, dtype=torch.float64)
    if len(shape) == 4 and name == "oft":
        # PEFT takes four dimensions for an image, which a linear layer never gets.
        plain, x_plain = plain, x.flatten(0, 2)
        theirs = plain(x_plain).view(*shape[:-1], -1)
    else:
        theirs = plain(x)
    ours = fast(x)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_layer_of_the_true_butterfly_saves_no_matrix_of_its_own_width(no_fbd):
    net = nn.Sequential(nn.Linear(256, 256, bias=False))
    model = get_peft_model(net, BOFTConfig(boft_block_size=8, target_modules=["0"], init_weights=False))
    peftkern.accelerate(model)
    layer, x = model.base_model.model[0], torch.randn(32, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = [t for t in saved if t.data_ptr() != layer.base_layer.weight.data_ptr()]
    assert all(t.numel() < 256 * 256 for t in own)
    assert sum(t.data_ptr() == x.data_ptr() for t in own) == 1
    assert not list(model.buffers())


def test_second_derivatives_are_pefts(no_fbd):
    for name in ("oft", "boft"):
        plain, fast = pair(CONFIGS[name]())
        grads = []
        for model in (plain, fast):
            layer, x = model.base_model.model.a, inputs().requires_grad_(True)
            parameter = layer.oft_R["default"].weight if name == "oft" else layer.boft_R["default"]
            (first,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
            grads.append(torch.autograd.grad(first.square().sum(), (x, parameter)))
        for theirs, ours in zip(*grads, strict=True):
            assert relative(ours, theirs) < 1e-11


def test_the_stand_in_for_the_extension_has_pefts_gradients(fbd):
    blocks = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(boft_layer.FastBlockDiag.apply, blocks)
