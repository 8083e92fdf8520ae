"""Small models and comparisons for the tests of the PEFT drop-in."""

import copy
import warnings

import pytest
import torch
from peft import HRAConfig, get_peft_model
from torch import nn

import peftkern

DTYPES = {
    "fp64": (torch.float64, torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16 base, fp32 adapter": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16 base, bf16 adapter": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16 base, fp32 adapter": (torch.float16, torch.float16, torch.float32),
    "fp32 input, bf16 base, fp32 adapter": (torch.float32, torch.bfloat16, torch.float32),
    "bf16 input, fp32 base, fp32 adapter": (torch.bfloat16, torch.float32, torch.float32),
}


class Net(nn.Module):
    """Three linear layers, one of them without bias, and a head."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(24, 40)
        self.b = nn.Linear(40, 33, bias=False)
        self.c = nn.Linear(33, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x).tanh()).tanh()).tanh())


class ConvNet(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, **{"kernel_size": 3, **options})

    def forward(self, x):
        return self.conv(x)


def config(**options):
    return HRAConfig(**{"r": 4, "target_modules": ["a", "b"], "init_weights": False, **options})


def twins(base=None, second=None, dtype=torch.float64, **options):
    """The same PEFT model twice: (plain, accelerated); `second` is the config of another adapter, named "other"."""
    torch.manual_seed(1)
    plain = get_peft_model((Net() if base is None else base).to(dtype), config(**options))
    if second is not None:
        plain.add_adapter("other", second)
    fast = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = peftkern.accelerate(fast)
    assert report.replaced, report
    return plain, fast


def inputs(dtype=torch.float64, rows=(2, 5)):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*rows, 24, generator=generator).to(dtype)


def relative(value, exact):
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm())


def outcome(function, *args):
    """What a call gives: its value, or the type and the message of what it raises."""
    try:
        return "value", function(*args)
    except Exception as error:
        return type(error), str(error)


def messages(record, word="peftkern"):
    return [str(w.message) for w in record if word in str(w.message)]


def assert_twins_agree(plain, fast, x, tolerance=1e-12):
    """Both give the same output, gradients, parameters, trainability and printed form."""
    assert repr(plain) == repr(fast)
    ours, theirs = fast.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=tolerance)
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (plain, fast)]
    assert flags[0] == flags[1]
    outputs = [model(x) for model in (plain, fast)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    if not outputs[0].requires_grad:
        assert not outputs[1].requires_grad
        return
    for model, output in zip((plain, fast), outputs, strict=True):
        model.zero_grad(set_to_none=True)
        output.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.fixture
def unpatched():
    """Whatever a test patches is undone."""
    yield
    peftkern.unpatch_peft()
