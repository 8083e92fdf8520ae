"""OFT and BOFT models for the tests of the PEFT drop-in, and PEFT's butterfly extension in plain torch."""

import copy
import types
import warnings

import pytest
import torch
from peft import BOFTConfig, OFTConfig, get_peft_model
from peft.tuners.boft import layer as boft_layer
from peft_models import Net

import peftkern


def oft(**options):
    return OFTConfig(**{"oft_block_size": 4, "target_modules": ["a", "b"], "init_weights": False, **options})


def boft(**options):
    return BOFTConfig(**{"boft_block_size": 4, "target_modules": ["a", "b"], "init_weights": False, **options})


def _forward(blocks):
    return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


def _backward(grad, blocks):
    f, n, b, _ = blocks.shape
    diagonal = grad.view(f, n, b, n, b).diagonal(dim1=1, dim2=3)
    return [diagonal.permute(0, 3, 1, 2).contiguous()]


@pytest.fixture
def fbd(monkeypatch):
    """PEFT's CUDA extension, whose only work is to scatter blocks into a dense matrix, done by torch."""
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", types.SimpleNamespace(forward=_forward, backward=_backward))


@pytest.fixture
def no_fbd(monkeypatch):
    """A machine without the extension, without the attempt to compile it."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: None)


def pair(config, base=None, second=None, dtype=torch.float64, quiet=True, **settings):
    """The same PEFT model twice: (plain, accelerated); `second` is the config of another adapter, named "other"."""
    torch.manual_seed(1)
    plain = get_peft_model((Net() if base is None else base).to(dtype), config)
    if second is not None:
        plain.add_adapter("other", second)
        plain.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "boft_R" in name:
                p.normal_(std=0.4)
    fast = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if quiet else "error")
        report = peftkern.accelerate(fast, **settings)
    assert report.replaced and not report.skipped, report
    return plain, fast


def gradients(model, x, weights):
    """(y, gradients of <y, weights> by parameter name, and "x" where x is floating)."""
    names, wanted = map(list, zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True))
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_(True)
        names, wanted = ["x", *names], [x, *wanted]
    y = model(x)
    grads = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    return y, {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
