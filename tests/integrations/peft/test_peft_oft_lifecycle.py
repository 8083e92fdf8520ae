"""OFT and BOFT models of PEFT through their life: switching, merging, saving, loading, compiling, checking."""

import copy
import json
import warnings

import pytest
import torch
from peft import BOFTConfig, OFTConfig, PeftModel, get_peft_model
from peft_models import ConvNet, Net, assert_twins_agree, inputs, messages, outcome, relative, unpatched
from rotation_models import boft, fbd, no_fbd, oft, pair
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.integrations.peft.layer import Accelerated

__all__ = ["fbd", "no_fbd", "unpatched"]

MAKE = {"oft": oft, "boft": boft}
BOTH = pytest.mark.parametrize("method", MAKE)


def _both(model):
    model.base_model.set_adapter(["default", "other"])


STEPS = {
    "nothing": lambda model, make: None,
    "one active": lambda model, make: model.set_adapter("other"),
    "other order": lambda model, make: model.base_model.set_adapter(["other", "default"]),
    "disabled": lambda model, make: model.base_model.disable_adapter_layers(),
    "merged": lambda model, make: model.merge_adapter(),
    "merged safely": lambda model, make: model.merge_adapter(safe_merge=True),
    "one of two merged": lambda model, make: model.merge_adapter(adapter_names=["other"]),
    "merged twice": lambda model, make: (model.merge_adapter(), model.merge_adapter()),
    "merged and disabled": lambda model, make: (model.merge_adapter(), model.base_model.disable_adapter_layers()),
    "merged, then another active": lambda model, make: (model.merge_adapter(), model.set_adapter("other")),
    "unmerged without a merge": lambda model, make: model.unmerge_adapter(),
    "inactive deleted": lambda model, make: (model.set_adapter("default"), model.delete_adapter("other")),
    "merged deleted": lambda model, make: (model.merge_adapter(), outcome(model.delete_adapter, "default")),
    "added": lambda model, make: model.add_adapter("third", make(init_weights=True)),
    "added on other layers": lambda model, make: (
        model.set_adapter("default"),
        model.add_adapter("third", make(target_modules=["head"], init_weights=True)),
        model.set_adapter("third"),
    ),
}


@pytest.mark.parametrize("step", STEPS)
@BOTH
def test_the_same_step_on_a_plain_and_an_accelerated_model_ends_in_the_same_state(method, step, no_fbd):
    make = MAKE[method]
    plain, fast = pair(make(), second=make())
    results = []
    for model in (plain, fast):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(outcome(STEPS[step], model, make))
    assert results[0][0] == results[1][0] and (results[0][0] == "value" or results[0] == results[1])
    for layer in (m for m in fast.modules() if hasattr(m, "merged_adapters")):
        assert isinstance(layer, Accelerated)
    # PEFT inverts in float32.
    assert_twins_agree(plain, fast, inputs(), 1e-6 if step == "merged and disabled" or "another" in step else 1e-12)


@BOTH
def test_restore_gives_pefts_classes_and_numbers_back(method, no_fbd):
    plain, fast = pair(MAKE[method]())
    x = inputs()
    assert len(peftkern.restore(fast)) == 2
    for (name, theirs), ours in zip(plain.named_modules(), fast.modules(), strict=True):
        assert type(ours) is type(theirs), name
        assert set(vars(ours)) == set(vars(theirs)), name
    assert torch.equal(fast(x), plain(x))


@BOTH
@pytest.mark.parametrize("first", ["plain", "accelerated"])
def test_checkpoints_go_both_ways(method, first, no_fbd, tmp_path):
    plain, fast = pair(MAKE[method](), dtype=torch.float32)
    writer, reader = (plain, fast) if first == "plain" else (fast, plain)
    writer.save_pretrained(tmp_path)
    x = inputs(torch.float32)
    reader.load_adapter(tmp_path, "loaded")
    reader.set_adapter("loaded")
    assert relative(reader(x), writer(x)) < 1e-6
    torch.manual_seed(1)
    fresh = PeftModel.from_pretrained(Net(), tmp_path)
    assert relative(fresh(x), writer(x)) < 1e-6
    ours, theirs = (m.state_dict() for m in (fast, plain))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items() if "loaded" not in key)


def _trained_butterfly(f, tmp_path):
    """A PEFT checkpoint of a true butterfly, and the model that wrote it."""
    torch.manual_seed(1)
    model = get_peft_model(Net(), boft(boft_block_size=2, boft_n_butterfly_factor=f))
    model.save_pretrained(tmp_path)
    return model


def test_patch_peft_builds_true_butterflies_without_the_extension(unpatched, no_fbd):
    peftkern.patch_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Net(), boft(boft_block_size=2, boft_n_butterfly_factor=3))
    for layer in (model.base_model.model.a, model.base_model.model.b):
        assert isinstance(layer, Accelerated)
        assert layer.boft_R["default"].shape == (3, layer.in_features // 2, 2, 2)
        assert "boft_P" not in dict(layer.named_buffers())
    with pytest.warns(UserWarning, match="restore leaves layers"):
        assert peftkern.restore(model) == []


def test_a_butterfly_built_without_the_extension_is_pefts_with_it(unpatched, fbd):
    options = {"boft_block_size": 2, "boft_n_butterfly_factor": 3}
    torch.manual_seed(1)
    theirs = get_peft_model(Net().double(), boft(**options))
    peftkern.patch_peft()
    torch.manual_seed(1)
    ours = get_peft_model(Net().double(), boft(**options))
    ours.load_state_dict(theirs.state_dict())
    x = inputs()
    assert relative(ours(x), theirs(x)) < 1e-12
    for model in (ours, theirs):
        model.merge_adapter()
    assert relative(ours(x), theirs(x)) < 1e-12


def test_a_butterfly_checkpoint_of_pefts_loads_after_patch_peft(unpatched, fbd, tmp_path):
    model = _trained_butterfly(3, tmp_path)
    peftkern.patch_peft()
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert all(len(p) == 3 for name, p in loaded.named_parameters() if "boft_R" in name)
    assert relative(loaded(inputs(torch.float32)), model(inputs(torch.float32))) < 1e-5


def test_a_checkpoint_with_the_factor_forced_to_one_loads_with_a_warning(unpatched, no_fbd, tmp_path):
    model = _trained_butterfly(3, tmp_path)
    assert all(len(p) == 1 for name, p in model.named_parameters() if "boft_R" in name)
    peftkern.patch_peft()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="the checkpoint holds boft_R of 1 butterfly"):
        loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert relative(loaded(inputs(torch.float32)), model(inputs(torch.float32))) < 1e-5


def test_a_butterfly_checkpoint_loads_into_layers_that_peft_built_with_one_factor(no_fbd, tmp_path, monkeypatch):
    options = boft(boft_block_size=2, boft_n_butterfly_factor=2)
    torch.manual_seed(1)
    forced = get_peft_model(Net(), options)
    with pytest.warns(UserWarning, match="has set boft_n_butterfly_factor to 1"):
        peftkern.accelerate(forced)
    state = {key: torch.cat((value, value)) if "boft_R" in key else value for key, value in forced.state_dict().items()}
    with pytest.warns(UserWarning, match="the checkpoint holds boft_R of 2 butterfly"):
        forced.load_state_dict(state)
    assert all(len(p) == 2 for name, p in forced.named_parameters() if "boft_R" in name)
    forced(inputs(torch.float32))


@BOTH
def test_a_checkpoint_of_another_block_size_or_with_bad_values_is_refused_and_nothing_loaded(method, no_fbd):
    _, fast = pair(MAKE[method](), dtype=torch.float32)
    before = copy.deepcopy(fast.state_dict())
    key = next(key for key in before if "_R" in key)
    bad = {**before, key: torch.zeros(3, 5)}
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        fast.load_state_dict(bad)
    bad = {name: value + 1 if value.is_floating_point() else value for name, value in before.items()}
    bad[key] = torch.full_like(bad[key], float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        fast.load_state_dict(bad)
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_size": 5}, "boft_block_size must divide the 24 inputs; got 5"),
        ({"boft_block_size": 0, "boft_block_num": 7}, "boft_block_num must divide the 24 inputs; got 7"),
        ({"boft_n_butterfly_factor": 4}, r"must be a multiple of b 2\^\(f-1\) = 32"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "must be even for 2 stages"),
        ({"boft_n_butterfly_factor": 0}, "at least one stage"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_a_sentence(options, message, unpatched):
    peftkern.patch_peft()
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(Net(), boft(target_modules=["a"], **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "geometry", [{"kernel_size": (1, 3)}, {"kernel_size": 3, "dilation": 2, "padding": (2, 1)}], ids=str
)
def test_boft_convolutions_that_peft_gets_wrong_are_their_merged_weight(geometry, unpatched):
    peftkern.patch_peft()
    config = boft(target_modules=["0"], boft_block_size=2, boft_n_butterfly_factor=2)
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 6, **geometry)).double(), config)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    y = model(x)
    model.merge_adapter()
    assert relative(model(x), y) < 1e-13
    assert y.shape == model.base_model.model[0].base_layer(x).shape


@BOTH
def test_a_merged_and_unloaded_model_is_the_adapted_one_and_a_copied_one_too(method, no_fbd):
    _, fast = pair(MAKE[method]())
    x = inputs()
    y = fast(x)
    copied = copy.deepcopy(fast)
    assert torch.equal(copied(x), y)
    assert copied.base_model.model.a.peftkern_cache is not fast.base_model.model.a.peftkern_cache
    merged = copied.merge_and_unload(safe_merge=True)
    assert type(merged.a) is nn.Linear and relative(merged(x), y) < 1e-13


@BOTH
def test_an_adapter_loads_with_little_memory_into_a_patched_model(method, unpatched, no_fbd, tmp_path):
    _, fast = pair(MAKE[method](), dtype=torch.float32)
    fast.save_pretrained(tmp_path)
    peftkern.patch_peft()
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True)
    x = inputs(torch.float32)
    assert isinstance(loaded.base_model.model.a, Accelerated) and torch.equal(loaded(x), fast(x))


# PEFT's OFT convolution


def _conv_pair(**settings):
    net = ConvNet(padding=1)
    net.conv = nn.Conv2d(8, 6, 3, padding=1)
    return pair(oft(target_modules=["conv"]), net, **settings)


def test_an_oft_convolution_is_its_merged_weight_and_says_so():
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(nn.Conv2d(8, 6, 3, padding=1)).double(), oft(target_modules=["0"]))
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    wrong = model(x)
    with pytest.warns(UserWarning, match="PEFT's OFT forward sums the rotated patches"):
        peftkern.accelerate(model)
    y = model(x)
    model.merge_adapter()
    assert relative(model(x), y) < 1e-13 and relative(wrong, y) > 0.1
    model.unmerge_adapter()
    assert relative(model(x), y) < 1e-13


def test_compat_keeps_pefts_convolution():
    plain, fast = _conv_pair(compat="peft")
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    assert torch.equal(fast(x), plain(x))
    assert peftkern.stats(reset=True)["oft"]["reasons"]['compat="peft"'] > 0


def test_identity_oft_convolutions_leave_the_output_of_the_base_model():
    net = nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, padding=1, padding_mode="circular"))
    x = torch.randn(2, 8, 9, 7)
    y = net(x)
    model = get_peft_model(net, OFTConfig(oft_block_size=4, target_modules=["0"]))
    peftkern.accelerate(model, compat=None)
    torch.testing.assert_close(model(x), y)


def test_a_grouped_or_oblong_convolution_stays_pefts_with_the_reason():
    for options, word in (({"groups": 2}, "groups = 2"), ({"kernel_size": (1, 3)}, "square kernels only")):
        net = nn.Sequential(nn.Conv2d(8, 6, **{"kernel_size": 1, **options}))
        model = get_peft_model(net, oft(target_modules=["0"]))
        report = peftkern.accelerate(model)
        assert not report.replaced and word in report.skipped[0][1]


# Versions


@pytest.mark.parametrize("patch", [False, True], ids=["recorded", "missing"])
def test_an_adapter_of_peft_017_takes_its_own_polynomial(patch, unpatched, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(Net(), oft())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    if patch:
        del saved["peft_version"]
        peftkern.patch_peft()
    else:
        saved["peft_version"] = "0.17.1"
    path.write_text(json.dumps(saved))
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        old = PeftModel.from_pretrained(Net(), tmp_path)
        if not patch:
            peftkern.accelerate(old)
    assert any("PEFT before 0.18" in message for message in messages(record))
    x, layer = inputs(torch.float32), old.base_model.model.a
    q = layer.oft_R["default"].weight.detach().double()
    Q = torch.zeros(len(q), 4, 4, dtype=torch.float64)
    rows, columns = torch.triu_indices(4, 4, 1)
    Q[:, rows, columns] = q
    Q = Q - Q.mT
    R = torch.eye(4, dtype=torch.float64) + 2 * sum(torch.linalg.matrix_power(Q, k) for k in range(1, 5))
    expected = layer.base_layer.double()(x.double() @ torch.block_diag(*R))
    layer.base_layer.float()
    assert relative(layer(x), expected) < 1e-6
    peftkern.accelerate(old, compat="peft")
    assert relative(old(x), model(x)) < 1e-6


def test_a_diverging_polynomial_is_computed_as_peft_does_with_a_warning():
    torch.manual_seed(1)
    plain = get_peft_model(Net().double(), oft())
    with torch.no_grad():
        plain.base_model.model.a.oft_R["default"].weight.mul_(30)
    fast = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match=r"\|Q\| reaches 1 in base_model.model.a, .* use_cayley_neumann=False"):
        peftkern.accelerate(fast)
    assert relative(fast(inputs()), plain(inputs())) < 1e-12


# Execution


def _grads(model, output):
    model.zero_grad(set_to_none=True)
    output.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["auto", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_a_compiled_model_has_one_graph_and_eagers_outputs_and_gradients(method, dtype, precision, no_fbd):
    torch._dynamo.reset()
    _, fast = pair(MAKE[method](), dtype=dtype, precision=precision)
    x = inputs(dtype)
    y = fast(x)
    grads = _grads(fast, y)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)
    for name, grad in _grads(fast, compiled(x)).items():
        assert torch.equal(grad, grads[name]), name


def test_compiled_convolutions_embeddings_and_coft_have_one_graph(no_fbd):
    for config, net, x in (
        (oft(target_modules=["0"]), nn.Conv2d(8, 6, 3), torch.randn(2, 8, 7, 6)),
        (boft(target_modules=["0"]), nn.Conv2d(8, 6, 3), torch.randn(2, 8, 7, 6)),
        (oft(target_modules=["0"]), nn.Embedding(9, 8), torch.randint(0, 9, (2, 5))),
        (oft(target_modules=["0"], coft=True, eps=1e-2), nn.Linear(8, 6), torch.randn(3, 8)),
    ):
        torch._dynamo.reset()
        _, fast = pair(config, nn.Sequential(net), dtype=torch.float32)
        y = fast(x)
        torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), y)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@BOTH
def test_activation_checkpointing_changes_no_bit(method, reentrant, no_fbd):
    _, fast = pair(MAKE[method](), second=MAKE[method](), dtype=torch.bfloat16)
    x = inputs(torch.bfloat16).requires_grad_(True)
    grads = _grads(fast, fast(x))
    checked = _grads(fast, checkpoint(fast, x, use_reentrant=reentrant))
    assert grads.keys() == checked.keys() and all(torch.equal(checked[name], grad) for name, grad in grads.items())


@BOTH
def test_generation_from_the_cache_is_bitwise_what_training_computes_and_follows_the_parameter(method, no_fbd):
    _, fast = pair(MAKE[method](), dtype=torch.float32)
    layer = fast.eval().base_model.model.a
    x = torch.randn(1, 24)
    for _ in range(2):
        y = layer(x).detach()
        with torch.no_grad():
            first, second = layer(x), layer(x)
            assert torch.equal(first, y) and torch.equal(second, y) and layer.peftkern_cache.kept is not None
            for p in fast.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
    assert copy.deepcopy(layer).peftkern_cache.kept is None


@BOTH
def test_verify_judges_layers_and_leaves_the_model_as_it_is(method, no_fbd):
    config = oft(coft=True, eps=1e-2) if method == "oft" else boft(boft_dropout=0.5)
    _, fast = pair(config, dtype=torch.float32)
    before = copy.deepcopy(fast.state_dict())
    result = peftkern.verify(fast, inputs(torch.float32), show=False)
    assert result.ok and len(result.rows) == 2 and all(row.peft_output_error is not None for row in result.rows)
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())


def test_verify_judges_what_peft_cannot_compute(unpatched, no_fbd):
    peftkern.patch_peft()
    model = get_peft_model(Net(), boft(boft_block_size=2, boft_n_butterfly_factor=3))
    rows = peftkern.verify(model, inputs(torch.float32), show=False).rows
    assert all(row.output_error < 1e-6 and row.grad_error < 1e-5 and "PEFT fails" in row.note for row in rows)


def test_verify_judges_embeddings_and_convolutions():
    for config, net, x in (
        (oft(target_modules=["0"]), nn.Embedding(9, 8), torch.randint(0, 9, (2, 5))),
        (oft(target_modules=["0"]), nn.Conv2d(8, 6, 3), torch.randn(2, 8, 7, 6)),
    ):
        _, fast = pair(config, nn.Sequential(net), dtype=torch.float32)
        (row,) = peftkern.verify(fast, x, show=False).rows
        assert row.ok and row.output_error < 1e-6


# Quantised bases


def _quantised(kind):
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "4 bit":
        layer = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 96).state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
@BOTH
def test_a_quantised_base_gives_pefts_output_gradients_and_merged_weight(method, kind, no_fbd):
    torch.manual_seed(1)
    config = MAKE[method](target_modules=["0"])
    # In training mode: bitsandbytes repacks a 4-bit weight for its CPU kernel in evaluation, and then misreads it.
    plain = get_peft_model(nn.Sequential(_quantised(kind)), config)
    fast = copy.deepcopy(plain)
    report = peftkern.accelerate(fast, precision="exact")
    name = type(fast.base_model.model[0].base_layer).__name__
    assert report.layers["base_model.model.0"].reason == f"the base layer is quantised ({name})"
    x = torch.randn(40, 64)
    outputs = [model(x) for model in (plain, fast)]
    # The 8-bit product quantises the rotated x, whose roundings differ.
    assert relative(outputs[1], outputs[0]) < (0.02 if kind == "8 bit" else 1e-5)
    grads = [_grads(model, y) for model, y in zip((plain, fast), outputs, strict=True)]
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert relative(grads[1][key], grad) < 0.03, key
    for model in (plain, fast):
        model.merge_adapter()
    weights = [model.base_model.model[0].get_base_weight() for model in (plain, fast)]
    assert relative(weights[1], weights[0]) < 2e-3
    assert relative(fast(x), outputs[1]) < 0.2
    fast.unmerge_adapter()
    assert relative(fast(x), outputs[1]) < 0.2


@torch.no_grad()
@BOTH
def test_a_4_bit_weight_that_was_packed_for_evaluation_merges_right(method, no_fbd):
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(_quantised("4 bit")), MAKE[method](target_modules=["0"])).eval()
    peftkern.accelerate(model)
    x = torch.randn(40, 64)
    y = model(x)
    model.merge_adapter()
    assert relative(model(x), y) < 0.2
    model.unmerge_adapter()
    assert relative(model(x), y) < 0.2


@pytest.mark.parametrize("base", [BOFTConfig, OFTConfig])
def test_default_initialisation_leaves_the_output_of_the_base_model(base, no_fbd):
    net = Net().double()
    y = net(inputs())
    size = "oft_block_size" if base is OFTConfig else "boft_block_size"
    model = get_peft_model(net, base(target_modules=["a", "b"], **{size: 8}))
    peftkern.accelerate(model)
    assert relative(model(inputs()), y) < 1e-14
