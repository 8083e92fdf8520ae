"""verify: what it measures, what it leaves alone, what it refuses."""

import copy
import random

import numpy
import pytest
import torch
from peft import HRAConfig, get_peft_model
from peft_models import ConvNet, Net, config, inputs, twins
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.integrations.peft import hra


@pytest.mark.parametrize("gs", [False, True], ids=["product", "gs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_layer_is_compared_with_peft_and_float64(dtype, gs, capsys):
    _, fast = twins(dtype=dtype, second=config(r=3), apply_GS=gs)
    fast.base_model.set_adapter(["default", "other"])
    result = peftkern.verify(fast, inputs(dtype))
    assert [row.name for row in result.rows] == ["base_model.model.a", "base_model.model.b"]
    roundoff = torch.finfo(dtype).eps / 2
    for row in result.rows:
        assert row.shape[:2] == (2, 5) and row.note == ""
        assert row.seconds > 0 and row.peft_seconds > 0
        for error in (row.output_error, row.grad_error, row.peft_output_error, row.peft_grad_error):
            assert error <= 20 * roundoff
    assert result.ok
    printed = capsys.readouterr().out
    assert printed.strip() == str(result) and len(printed.splitlines()) == 4


def test_a_wrong_layer_is_found(monkeypatch):
    _, fast = twins()
    exact = hra.HRALinear._adapted
    monkeypatch.setattr(hra.HRALinear, "_adapted", staticmethod(lambda *args: 1.001 * exact(*args)))
    result = peftkern.verify(fast, inputs(), show=False)
    assert not result.ok and all(row.ok is False for row in result.rows)
    assert all(9e-4 < error < 1.1e-3 for row in result.rows for error in (row.output_error, row.grad_error))
    assert "FURTHER FROM FLOAT64 THAN PEFT" in str(result)


def test_an_output_that_is_not_finite_is_found(monkeypatch):
    _, fast = twins()
    exact = hra.HRALinear._adapted
    monkeypatch.setattr(hra.HRALinear, "_adapted", staticmethod(lambda *args: exact(*args) * float("nan")))
    assert not peftkern.verify(fast, inputs(), show=False).ok


class _Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 8)
        self.norm, self.dropout = nn.BatchNorm1d(40), nn.Dropout(0.5)

    def forward(self, x):
        random.random()
        numpy.random.rand()
        return self.b(self.dropout(self.norm(self.a(x))))


def test_the_model_its_gradients_buffers_random_state_and_counters_are_left_as_they_are():
    model = get_peft_model(_Stateful(), config())
    peftkern.accelerate(model)
    x = torch.randn(6, 24)
    model(x).sum().backward()
    model.base_model.model.b.hra_u["default"].requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    attributes = [(type(m), m.training, sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()]
    counts, generators = (
        peftkern.stats(),
        (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()),
    )
    with torch.no_grad():
        result = peftkern.verify(model, (x,), show=False)
    assert result.ok and all(row.output_error is not None for row in result.rows)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [(type(m), m.training, sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()] == attributes
    assert peftkern.stats() == counts
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert (numpy.random.get_state()[1] == generators[2]).all()


@pytest.mark.parametrize("kind", ["mapping", "tuple", "one argument"])
def test_a_batch_is_a_mapping_a_tuple_or_one_argument(kind):
    _, fast = twins()
    x = inputs()
    batch = {"mapping": {"x": x}, "tuple": (x,), "one argument": x}[kind]
    assert peftkern.verify(fast, batch, show=False).ok


def test_a_transformer_is_verified_from_its_loss_under_autocast():
    transformers = pytest.importorskip("transformers")
    settings = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    net = transformers.BertForSequenceClassification(settings)
    model = get_peft_model(net, HRAConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS"))
    peftkern.accelerate(model)
    batch = {"input_ids": torch.randint(0, 64, (3, 9)), "labels": torch.tensor([0, 1, 1])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = peftkern.verify(model, transformers.BatchEncoding(batch), show=False)
    assert result.ok and len(result.rows) == len(peftkern.accelerate(model).replaced)
    assert all(1e-4 < row.output_error < 2e-2 for row in result.rows)


class _Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        return self.a(x), checkpoint(self.b, x, use_reentrant=True)


def test_layers_that_are_not_reached_disabled_or_hidden_by_checkpointing_say_so_or_are_compared():
    model = get_peft_model(_Branches().double(), config(target_modules=["a", "b", "c"]))
    peftkern.accelerate(model)
    x = inputs().requires_grad_(True)
    rows = {row.name[-1]: row for row in peftkern.verify(model, x, show=False).rows}
    assert rows["a"].ok and rows["b"].ok
    assert (rows["c"].ok, rows["c"].note) == (None, "not reached by this batch")
    model.base_model.disable_adapter_layers()
    assert {row.note for row in peftkern.verify(model, x, show=False).rows} == {"adapters disabled"}


def test_where_peft_fails_or_is_wrong_the_row_says_so():
    model = get_peft_model(ConvNet(padding="same").double(), config(target_modules=["conv"]))
    peftkern.accelerate(model)
    (row,) = peftkern.verify(model, torch.randn(2, 3, 7, 6).double(), show=False).rows
    assert row.note.startswith("PEFT fails: RuntimeError") and row.output_error < 1e-14
    model = get_peft_model(ConvNet(padding=1, padding_mode="circular").double(), config(target_modules=["conv"]))
    with pytest.warns(UserWarning, match="padding_mode"):
        peftkern.accelerate(model)
    (row,) = peftkern.verify(model, torch.randn(2, 3, 7, 6).double(), show=False).rows
    assert row.ok and row.output_error < 1e-14 and row.peft_output_error > 0.1


def test_a_model_that_is_not_accelerated_or_not_finite_is_refused():
    model = get_peft_model(Net().double(), config())
    with pytest.raises(ValueError, match=r"no accelerated layer; call peftkern.accelerate"):
        peftkern.verify(model, inputs())
    peftkern.accelerate(model)
    with torch.no_grad():
        model.base_model.model.a.hra_u["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"hra_u of layer 'base_model.model.a', adapter 'default', has values"):
        peftkern.verify(model, inputs())
