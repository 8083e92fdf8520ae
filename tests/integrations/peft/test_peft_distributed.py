"""Accelerated models under DDP and FSDP2, two gloo processes on the CPU."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from peft_models import Net, config, inputs, relative
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern.integrations.peft.hra import Accelerated


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


def _work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x = inputs(rows=(8,))
    for name, wrap in WRAPPERS.items():
        torch.manual_seed(0)
        model = get_peft_model(Net().double(), config())
        alone = copy.deepcopy(model)
        peftkern.accelerate(model)
        wrapped = wrap(model)
        wrapped(x[4 * rank : 4 * rank + 4]).square().mean().backward()
        alone(x).square().mean().backward()
        for part in "ab":
            layer = getattr(model.base_model.model, part)
            grad = layer.hra_u["default"].grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            assert isinstance(layer, Accelerated)
            assert relative(grad, getattr(alone.base_model.model, part).hra_u["default"].grad) < 1e-12, name
        report = peftkern.accelerate(model, precision="fast")
        assert len(report.replaced) == 2 and not report.skipped, name
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one_under_ddp_and_fsdp():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_work, (port,), nprocs=2)
