"""What each of two gloo processes runs, one function per scenario; the figures go to a safetensors file.

Every scenario trains three steps, each process on its half of the batch, and returns the loss of every step and the
whole parameters at the end. `single` trains the same model on the whole batch in one process.
"""

import copy
import datetime
import sys
import traceback
import warnings
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from peftkern.nn import HRAConv2d, HRALinear, wrap
from peftkern.nn.forward import readable_weight

STEPS, BATCH = 3, 8


class Net(nn.Module):
    """A convolution, then two linear layers, all adapted."""

    def __init__(self, dtype=torch.float32, precision="auto", apply_gs=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(4 * 5 * 6, 32), nn.Linear(32, 10)
        self.to(dtype)
        wrap(self, ["conv", "fc1", "fc2"], r=4, precision=precision, apply_gs=apply_gs)
        for layer in self.adapted():
            nn.init.normal_(layer.hra_u)

    def adapted(self):
        return [m for m in self.modules() if isinstance(m, (HRALinear, HRAConv2d))]

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(torch.relu(self.conv(x)).flatten(1))))


def model(**options):
    torch.manual_seed(0)
    return Net(**options)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 2, 5, 6, generator=generator).to(dtype)
    return x, torch.randn(BATCH, 10, generator=generator).to(dtype)


def half(tensor):
    return tensor.chunk(2)[dist.get_rank()]


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def train(net, x, target, inspect=None):
    """Three steps of SGD on the mean squared error: losses, the sum of the gradients, and the model at the end."""
    trained = {name.removeprefix("module."): p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    losses, gradients = [], dict.fromkeys(trained, 0)
    for _ in range(STEPS):
        loss = (net(x).float() - target.float()).square().mean()
        loss.backward()
        if inspect:
            inspect(net)
        gradients = {name: gradients[name] + whole(p.grad).float() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    loss = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    final = {name.removeprefix("module."): whole(p).detach().float().clone() for name, p in net.named_parameters()}
    return {"loss": loss, **{f"gradient of {name}": g for name, g in gradients.items()}, **final}


def single(dtype=torch.float32, cast=None, **options):
    """One process; with `cast` the parameters and the input are cast for each forward, as FSDP's policy does."""
    net, (x, target) = model(dtype=dtype, **options), data(dtype)
    return train(net if cast is None else Cast(net, cast), x, target)


class Cast(nn.Module):
    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x):
        parameters = {name: p.to(self.dtype) for name, p in self.module.named_parameters()}
        return functional_call(self.module, parameters, (x.to(self.dtype),))


def ddp(**options):
    x, target = data(options.get("dtype", torch.float32))
    return train(nn.parallel.DistributedDataParallel(model(**options)), half(x), half(target))


def _mesh():
    return init_device_mesh("cpu", (2,))


def fsdp(policy=None, units=None, data_dtype=torch.float32, **options):
    """Layers sharded as whole units (the default), or `units(net)`, then the rest of the model."""
    net, mesh = model(**options), _mesh()
    kwargs = {"mesh": mesh, **({"mp_policy": policy} if policy else {})}
    for unit in net.adapted() if units is None else units(net):
        fully_shard(unit, **kwargs)
    fully_shard(net, **kwargs)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    x, target = data(data_dtype)
    return train(net, half(x), half(target), _gradients_in_parameter_dtype)


def _gradients_in_parameter_dtype(net):
    for layer in net.adapted():
        assert layer.hra_u.grad.dtype is layer.hra_u.dtype and layer.hra_u.grad.placements == layer.hra_u.placements


def fsdp_model_only(**options):
    return fsdp(units=lambda net: [], **options)


def fsdp_bases(**options):
    """The base layers of the linear layers are units of their own: their hooks must gather them before they run."""
    fired = []

    def units(net):
        for layer in (net.fc1, net.fc2):
            layer.base_layer.register_forward_pre_hook(lambda module, _: fired.append(type(module.weight)))
        return [net.fc1.base_layer, net.fc2.base_layer]

    result = fsdp(units=units, **options)
    assert len(fired) == 2 * STEPS
    return result


def fsdp_base_reason(**options):
    """A base layer that is sharded by itself is not read; one inside a larger unit is, while the unit runs."""
    net, mesh = model(**options), _mesh()
    seen = {}
    net.fc1.register_forward_pre_hook(lambda layer, _: seen.update(fc1=readable_weight(layer.base_layer)[1]))
    net.fc2.register_forward_pre_hook(lambda layer, _: seen.update(fc2=readable_weight(layer.base_layer)[1]))
    fully_shard(net.fc1.base_layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    net(half(data()[0]))
    assert seen == {"fc1": "the base layer has hooks", "fc2": None}, seen
    return {}


def fsdp_bfloat16(**options):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp(policy=policy, **options)


def fsdp_bases_bfloat16(**options):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp_bases(policy=policy, **options)


def fsdp_generation(**options):
    """Under no_grad the factor is kept; the optimizer's step on the shards must reach the next output."""
    net, alone = model(**options), model(**options)
    fully_shard(net, mesh=_mesh())
    x, target = data()
    outputs = []
    for _ in range(STEPS):
        with torch.no_grad():
            outputs.append(net(x))
            assert torch.equal(outputs[-1], net(x))
        net.reshard()
        train(net, half(x), half(target))
        with torch.no_grad():
            for ours, theirs in zip(alone.parameters(), net.parameters(), strict=True):
                ours.copy_(whole(theirs))
            assert torch.allclose(net(x), alone(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(outputs[0], outputs[1])
    return {}


def fsdp_refusals(**options):
    """A sharded weight cannot be merged, and an adapter outside the gathered unit says what to do."""
    net = model(**options)
    before = copy.deepcopy(net.state_dict())
    fully_shard(net, mesh=_mesh())
    try:
        net.fc1.merge()
    except TypeError as error:
        assert "merging needs a plain floating weight; " in str(error) and "DTensor" in str(error), error
    else:
        raise AssertionError("merge of a sharded weight was not refused")
    try:
        net.fc1(torch.randn(2, 120))
    except TypeError as error:
        assert "the hra_u must be a plain tensor; got a DTensor" in str(error), error
    else:
        raise AssertionError("a sharded adapter was taken for a plain tensor")
    assert all(torch.equal(whole(t), before[name]) for name, t in net.state_dict().items())
    return {}


HALF = {"dtype": torch.bfloat16, "data_dtype": torch.bfloat16}
SCENARIOS = {
    "ddp": (ddp, {}),
    "ddp, bfloat16": (ddp, {"dtype": torch.bfloat16}),
    "ddp, gram_schmidt": (ddp, {"apply_gs": True}),
    "fsdp, layers": (fsdp, {}),
    "fsdp, gram_schmidt": (fsdp, {"apply_gs": True}),
    "fsdp, model only": (fsdp_model_only, {}),
    "fsdp, bases apart": (fsdp_bases, {}),
    "fsdp, layers, bfloat16": (fsdp, HALF),
    "fsdp, bases apart, bfloat16": (fsdp_bases, HALF),
    "fsdp, mixed precision": (fsdp_bfloat16, {}),
    "fsdp, mixed precision, exact": (fsdp_bfloat16, {"precision": "exact"}),
    "fsdp, mixed precision, bases apart": (fsdp_bases_bfloat16, {}),
    "fsdp, reasons": (fsdp_base_reason, {}),
    "fsdp, generation": (fsdp_generation, {}),
    "fsdp, refusals": (fsdp_refusals, {}),
}


def main(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(folder)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
    for index, (name, (scenario, options)) in enumerate(SCENARIOS.items()):
        try:
            result, error = scenario(**options), ""
        except Exception:
            result, error = {}, traceback.format_exc()
        path = folder / f"{index}.{rank}.safetensors"
        safetensors.torch.save_file(
            {k: v.contiguous() for k, v in result.items()}, path, metadata={"name": name, "error": error}
        )
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
