"""Argument checks shared by the contracts: each raises one sentence with the argument, what was wanted and seen."""

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WORKING = (torch.float64, torch.float32)


def describe(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)} on {tensor.device}"


def floating(op, name, tensor, dtypes=FLOATS):
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be one of {wanted}; got {describe(tensor)}")
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        raise TypeError(f"{op}: {name} must be a plain strided tensor without conjugate or negative bit")


def same_device(op, **tensors):
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        seen = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {seen}")


def _is_fake(tensor):
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _owns_no_memory(tensor):
    kind = type(tensor)
    if kind in (torch.Tensor, torch.nn.Parameter) or not hasattr(kind, "__torch_dispatch__"):
        return False
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not _is_fake(tensor)


def plain(op, **tensors):
    """Refuse tensor subclasses that own no memory of their own (DTensor and the like), before a pointer is taken."""
    for name, tensor in tensors.items():
        if _owns_no_memory(tensor):
            raise TypeError(
                f"{op}: {name} must be a plain tensor; got {type(tensor).__name__} (gather it first, e.g. by "
                f"applying the parallel wrapper to the adapted layer as a whole)"
            )
