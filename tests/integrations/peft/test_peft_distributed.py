"""Accelerated models under DDP and FSDP2, two gloo processes on the CPU."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.tuners.boft import layer as boft_layer
from peft_models import Net, config, inputs, relative
from rotation_models import boft, oft
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern.integrations.peft.layer import Accelerated


def _ddp(model):
    return DistributedDataParallel(model)


def _fsdp(*parts):
    def shard(model):
        for part in parts:
            fully_shard(model.get_submodule(f"base_model.model.{part}"))
        return fully_shard(model)

    return shard


WRAPPERS = {
    "ddp": _ddp,
    "fsdp of the model": _fsdp(),
    "fsdp of each layer": _fsdp("a", "b"),
    "fsdp of each base layer": _fsdp("a.base_layer", "b.base_layer"),
}


CONFIGS = {"hra": config, "oft": oft, "boft": boft}


def _parameters(layer):
    return [tensor for *_, tensor in layer.adapter_tensors()]


def _work(rank, port, method):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    boft_layer.get_fbd_cuda = lambda: None
    x = inputs(rows=(8,))
    for name, wrap in WRAPPERS.items():
        torch.manual_seed(0)
        model = get_peft_model(Net().double(), CONFIGS[method]())
        alone = copy.deepcopy(model)
        peftkern.accelerate(model)
        wrapped = wrap(model)
        wrapped(x[4 * rank : 4 * rank + 4]).square().mean().backward()
        alone(x).square().mean().backward()
        for part in "ab":
            layer, other = (getattr(m.base_model.model, part) for m in (model, alone))
            assert isinstance(layer, Accelerated)
            peftkern.accelerate(other)
            for ours, theirs in zip(_parameters(layer), _parameters(other), strict=True):
                grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
                assert relative(grad, theirs.grad) < 1e-12, name
        report = peftkern.accelerate(model, precision="fast")
        assert len(report.replaced) == 2 and not report.skipped, name
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_gradients_of_two_processes_are_those_of_one_under_ddp_and_fsdp(method):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_work, (port, method), nprocs=2)
