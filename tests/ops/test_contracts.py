"""Completeness: every operation has a schema, a fake that agrees with it, a reference, and passes opcheck."""

import importlib
import inspect

import devices
import oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peftkern


def factor(K=13, r=3, dtype=torch.float32):
    V = torch.randn(K, r, dtype=dtype)
    with peftkern.use_backend("reference"):
        return V, torch.ops.peftkern.wy_factor(V)


def rows(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, 13).to(dtype)


def small(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


torch.manual_seed(0)
V, T = factor()
V64, T64 = factor(dtype=torch.float64)
with peftkern.use_backend("reference"):
    Q, _, B = torch.ops.peftkern.orthonormal_factor(V)
wide = small(6, 13).T[:, ::2]  # [13, 3], neither stride 1
strided = rows(4, 5).transpose(0, 1)

packed, shared = 0.1 * small(3, 6), 0.1 * small(1, 15)
R, R_shared = torch.eye(4) + small(3, 4, 4), small(1, 6, 6)
R64 = R.double()
stages, one_stage = 0.3 * small(2, 4, 4, 4), small(1, 2, 7, 7)
stages64 = stages.double()


def wide_rows(*shape, K=12, dtype=torch.bfloat16):
    return torch.randn(*shape, K).to(dtype)


def bf16(*shape):
    return small(*shape).bfloat16()


# At least one call of every operation; the last ones of each have strided, empty or single-row arguments.
SAMPLES = {
    "wy_factor": [(V,), (V64,), (wide,)],
    "wy_factor_backward": [(small(3, 3, dtype=torch.float64), V, T), (T.T, wide, T)],
    "rotate": [
        (rows(4, 5), V, T, False),
        (rows(4, 5, dtype=torch.float64), V64, T64, True),
        (strided, wide, T.T, True),
        (rows(0), V, T, False),
        (rows(), V, T, False),
    ],
    "rotate_backward": [
        (rows(4, 5), rows(4, 5), small(20, 3), V, T, False, [True, True]),
        (rows(4, 5), rows(4, 5), small(20, 3), V, T, True, [False, True]),
        (rows(4, 5), rows(4, 5), small(20, 3), V, T, True, [True, False]),
        (rows(1)[0].expand(5, 4, 13), strided, small(3, 20).T, wide, T, False, [True, True]),
        (rows(0), rows(0), small(0, 3), V, T, False, [True, True]),
    ],
    "rotated_linear": [
        (rows(4, 5), small(7, 13).bfloat16(), small(7).bfloat16(), V, T, True),
        (rows(4, 5), small(7, 13).bfloat16(), None, V, T, False),
        (rows(4, 5, dtype=torch.float32), small(7, 13), None, V, T, True),
        (rows(40, dtype=torch.float16), small(7, 13).half(), None, V, T, True),
        (strided, small(13, 7).bfloat16().T, small(14).bfloat16()[::2], wide, T, True),
        (rows(1), small(7, 13).bfloat16(), None, V, T, True),
        (rows(0), small(7, 13).bfloat16(), None, V, T, True),
        (rows(), small(7, 13).bfloat16(), None, V, T, False),
    ],
    "rotated_linear_backward": [
        (rows(4, 5)[..., :7], rows(4, 5), small(7, 13).bfloat16(), small(20, 3), small(7, 3), V, T, [True, True]),
        (rows(4, 5)[..., :7], rows(4, 5), small(7, 13).bfloat16(), small(20, 3), small(7, 3), V, T, [False, True]),
        (rows(4)[:, :7], rows(4), small(7, 13).bfloat16(), small(4, 3), small(3, 7).T, V, T, [True, False]),
        (small(4, 7), rows(4, dtype=torch.float32), small(7, 13), small(4, 3), small(0, 3), V, T, [True, True]),
        (
            rows(1)[0, :7].expand(5, 4, 7),
            strided,
            small(13, 7).bfloat16().T,
            small(3, 20).T,
            small(7, 3),
            wide,
            T,
            [True, True],
        ),
        (rows(0)[:, :7], rows(0), small(7, 13).bfloat16(), small(0, 3), small(7, 3), V, T, [True, True]),
    ],
    "project": [(rows(4, 5), V), (rows(4, dtype=torch.float64), V64), (strided, wide), (rows(0), V)],
    "project_backward": [
        (small(20, 3), rows(4, 5), V, [True, True]),
        (small(3, 20).T, strided, wide, [False, True]),
        (small(0, 3), rows(0), V, [True, True]),
    ],
    "orthogonality_penalty": [(V, True), (V64, False), (wide, True)],
    "orthogonality_penalty_backward": [
        (small(), V, True),
        (small(dtype=torch.float64), V64, False),
        (small(), wide, True),
    ],
    "orthonormal_factor": [(V,), (V64,), (wide,)],
    "orthonormal_factor_backward": [
        (small(13, 3), small(3, 3, dtype=torch.float64), Q, B),
        (small(13, 3, dtype=torch.float64), T64, Q.double(), B),
        (wide, T.T, Q.T.contiguous().T, B.T.contiguous().T),
    ],
    "skew_polynomial": [
        (packed, [1.0, 2.0, 2.0, 2.0, 1.0]),
        (shared.double(), [1.0]),
        (0.1 * small(6, 3).T, [1.0, 2.0]),
        (small(3, 0), [1.0, 2.0]),
    ],
    "skew_polynomial_backward": [
        (small(3, 4, 4), packed, [1.0, 2.0, 2.0, 2.0, 1.0]),
        (small(3, 4, 4).mT, 0.1 * small(6, 3).T, [1.0, 2.0, 2.0, 1.0]),
        (small(1, 6, 6, dtype=torch.float64), shared.double(), [1.0]),
    ],
    "skew_cayley": [(packed,), (shared.double(),), (small(6, 3).T,), (small(2, 0),)],
    "skew_cayley_backward": [(small(3, 4, 4), R), (small(3, 4, 4, dtype=torch.float64), R64), (R.mT, R.mT)],
    "block_rotate": [
        (wide_rows(4, 5), R, False),
        (wide_rows(4, 5, dtype=torch.float64), R64, True),
        (wide_rows(4, 5).transpose(0, 1), R_shared.mT, False),
        (wide_rows(0), R, False),
        (wide_rows(), R, True),
    ],
    "block_rotate_backward": [
        (wide_rows(4, 5), wide_rows(4, 5), R, False, [True, True]),
        (wide_rows(4, 5), wide_rows(4, 5), R_shared, True, [True, True]),
        (wide_rows(4, 5), wide_rows(4, 5), R, True, [False, True]),
        (wide_rows(1)[0].expand(5, 4, 12), wide_rows(4, 5).transpose(0, 1), R.mT, False, [True, True]),
        (wide_rows(4, dtype=torch.float64), wide_rows(4, dtype=torch.float64), R64, False, [True, False]),
        (wide_rows(0), wide_rows(0), R_shared, False, [True, True]),
    ],
    "block_rotated_linear": [
        (wide_rows(4, 5), bf16(7, 12), bf16(7), R),
        (wide_rows(4, 5, dtype=torch.float32), bf16(7, 12), None, R_shared),
        (wide_rows(4, dtype=torch.float32), small(7, 12), small(7), R),
        (wide_rows(40, dtype=torch.float16), small(12, 7).half().T, None, R.mT),
        (wide_rows(0), bf16(7, 12), bf16(7), R),
        (wide_rows(), bf16(7, 12), bf16(14)[::2], R),
    ],
    "block_rotated_linear_backward": [
        (bf16(4, 5, 7), wide_rows(4, 5), bf16(7, 12), R, [True, True]),
        (bf16(4, 7), wide_rows(4, dtype=torch.float32), bf16(7, 12), R_shared, [True, True]),
        (small(4, 7), wide_rows(4, dtype=torch.float32), small(12, 7).T, R, [False, True]),
        (bf16(7).expand(5, 4, 7), wide_rows(4, 5).transpose(0, 1), bf16(7, 12), R.mT, [True, False]),
        (bf16(0, 7), wide_rows(0), bf16(7, 12), R, [True, True]),
    ],
    "dense_cayley": [(stages,), (stages64,), (one_stage.mT,)],
    "dense_cayley_backward": [(small(2, 4, 4, 4), stages), (stages64, stages64), (one_stage.mT, one_stage)],
    "butterfly_rotate": [
        (wide_rows(4, 5, K=16), stages, False),
        (wide_rows(4, 5, K=16, dtype=torch.float64), stages64, True),
        (wide_rows(4, 5, K=14).transpose(0, 1), one_stage.mT, True),
        (wide_rows(0, K=16), stages, False),
        (wide_rows(K=16), stages.mT, False),
    ],
    "butterfly_rotate_backward": [
        (wide_rows(4, 5, K=16), wide_rows(4, 5, K=16), stages, False, [True, True]),
        (wide_rows(4, 5, K=16), wide_rows(4, 5, K=16), stages, True, [False, True]),
        (bf16(1, 16)[0].expand(5, 4, 16), bf16(4, 5, 16).transpose(0, 1), stages.mT, False, [True, True]),
        (small(4, 14), small(4, 14), one_stage, True, [True, False]),
        (wide_rows(0, K=16), wide_rows(0, K=16), stages, False, [True, True]),
    ],
    "butterfly_rotate_weight": [
        (bf16(7, 16), small(7), stages),
        (small(16, 7, dtype=torch.float64).T, small(7, dtype=torch.float64), stages64),
        (small(7, 28)[:, :14], small(14)[::2], one_stage.mT),
        (bf16(0, 16), small(0), stages),
    ],
    "scale_outputs": [
        (bf16(4, 5, 7), small(7), bf16(7)),
        (small(4, 7, dtype=torch.float64), small(7, dtype=torch.float64), None),
        (bf16(7, 4).T, small(14)[::2], bf16(14)[::2]),
        (bf16(0, 7), small(7), None),
        (bf16(7), small(7), bf16(7)),
    ],
    "scale_outputs_backward": [
        (bf16(4, 5, 7), bf16(4, 5, 7), small(7), bf16(7), [True, True]),
        (bf16(1, 7)[0].expand(4, 7), bf16(7, 4).T, small(14)[::2], None, [True, True]),
        (small(4, 7), small(4, 7), small(7), small(7), [False, True]),
        (small(4, 7), small(4, 7), small(7), None, [True, False]),
        (bf16(0, 7), bf16(0, 7), small(7), None, [True, True]),
    ],
    "butterfly_rotated_linear": [
        (wide_rows(4, 5, K=16), bf16(7, 16), bf16(7), small(7), stages),
        (wide_rows(4, 5, K=16), bf16(7, 16), bf16(7), None, stages),
        (wide_rows(4, K=14, dtype=torch.float32), bf16(14, 7).T, None, small(14)[::2], one_stage.mT),
        (small(4, 16, dtype=torch.float64), small(7, 16, dtype=torch.float64), None, small(7).double(), stages64),
        (wide_rows(0, K=16), bf16(7, 16), None, small(7), stages),
        (wide_rows(K=16, dtype=torch.float16), small(7, 16).half(), None, small(7), stages),
    ],
    "butterfly_rotated_linear_backward": [
        (bf16(4, 5, 7), bf16(4, 5, 16), bf16(7, 16), small(7), bf16(4, 5, 7), stages, [True, True, True]),
        (bf16(4, 5, 7), bf16(4, 5, 16), bf16(7, 16), None, bf16(0), stages, [True, True, True]),
        (bf16(4, 7), small(4, 16), bf16(16, 7).T, small(7), bf16(4, 7), stages.mT, [False, True, True]),
        (small(4, 7), small(4, 16), small(7, 16), small(7), small(0), stages, [True, False, False]),
        (bf16(0, 7), bf16(0, 16), bf16(7, 16), small(7), bf16(0, 7), stages, [True, True, True]),
    ],
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CALLS = [f"{name} {i}" for name, samples in SAMPLES.items() for i in range(len(samples))]


def op(name):
    return getattr(torch.ops.peftkern, name)


def sample(call):
    """The name of an operation and the arguments of one of its calls, on the device that tests run on."""
    name, i = call.split()
    return name, devices.on_default_device(SAMPLES[name][int(i)])


@pytest.fixture
def served(backend, call):
    """The name and the arguments of a call that the backend serves; skipped where it does not."""
    name, arguments = sample(call)
    _, ok, reason = peftkern.operations()[name].explain(*arguments)[0]
    if not ok:
        pytest.skip(f"backend {backend}: {name}: {reason}")
    return name, arguments


def test_every_operation_has_a_sample():
    assert set(SAMPLES) == set(peftkern.operations())


def test_every_registered_operation_is_known():
    registered = {
        schema.name.removeprefix("peftkern::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("peftkern::")
    }
    assert registered == set(peftkern.operations())


@pytest.mark.parametrize("name", SAMPLES)
def test_every_operation_has_a_schema_a_fake_a_reference_and_a_check(name):
    operation = peftkern.operations()[name]
    schema = op(name).default._schema
    assert schema.returns and not schema.is_mutable
    assert not any(argument.alias_info for argument in [*schema.arguments, *schema.returns])
    names = [argument.name for argument in schema.arguments]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peftkern::{name}", "Meta")
    for function in (getattr(importlib.import_module(f"{operation.family}.reference"), name), operation.check):
        assert list(inspect.signature(function).parameters) == names
    family = importlib.import_module(operation.family)
    for module in ("cpu_backend", "triton_backend", "cuda_backend"):
        if importlib.util.find_spec(f"{family.__name__}.{module}"):
            native = importlib.import_module(f"{family.__name__}.{module}")
            assert {"supports", "available"} <= set(vars(native))
            if hasattr(native, name):
                assert list(inspect.signature(getattr(native, name)).parameters) == names


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(served):
    name, arguments = served
    results = torch.library.opcheck(op(name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def described(result):
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type, t.storage_offset()) for t in tensors]


@pytest.mark.parametrize("call", CALLS)
def test_the_fake_tells_shape_strides_and_dtype_of_the_real_result(served):
    name, arguments = served
    real = op(name)(*arguments)
    with FakeTensorMode() as mode:
        fake = op(name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    assert described(fake) == described(real)
    on_meta = op(name)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    assert [d[:3] for d in described(on_meta)] == [d[:3] for d in described(real)]


@pytest.mark.parametrize("call", CALLS)
def test_outputs_share_no_memory_and_inputs_are_not_written(served):
    name, arguments = served
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    results = op(name)(*arguments)
    results = results if isinstance(results, (tuple, list)) else (results,)
    pointers = [
        t.untyped_storage().data_ptr() for t in (*results, *(a for a in arguments if isinstance(a, torch.Tensor)))
    ]
    outputs = [p for p in pointers[: len(results)] if p]
    assert len(set(outputs)) == len(outputs) and not set(outputs) & set(pointers[len(results) :])
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("backend", ("cpu", "triton", "cuda"), indirect=True)
@pytest.mark.parametrize("call", CALLS)
def test_a_native_backend_agrees_with_the_reference(served):
    name, arguments = served
    results = op(name)(*arguments)
    with peftkern.use_backend("reference"):
        wanted = op(name)(*arguments)
    for ours, theirs in zip(*((r if isinstance(r, (tuple, list)) else (r,)) for r in (results, wanted)), strict=True):
        assert oracle.error(ours, theirs) <= TOLERANCE[ours.dtype]
