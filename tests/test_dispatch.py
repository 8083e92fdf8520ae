"""Which backend serves, and what is said when none can: choice, fallback, environment, bad input."""

import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

import peftkern
from peftkern import dispatch
from peftkern.ops.householder import reference

rotate = torch.ops.peftkern.rotate


@pytest.fixture
def operation(monkeypatch):
    """The operation `rotate`, with nothing remembered from other tests and nothing left for them."""
    operation = peftkern.operations()["rotate"]
    monkeypatch.setattr(operation, "_serving", {})
    monkeypatch.setattr(operation, "_broken", {})
    return operation


@pytest.fixture
def call():
    V = torch.randn(8, 2)
    return torch.randn(3, 8), V, torch.ops.peftkern.wy_factor(V), False


def backends(operation, monkeypatch, **modules):
    """Let the operation find these modules in place of its own backends."""
    own = operation.backend

    def find(name):
        if name in operation._broken:
            return None, operation._broken[name]
        return (modules[name], None) if name in modules else own(name)

    monkeypatch.setattr(operation, "backend", find)


def stand_in(function, ok=True, reason=None):
    return types.SimpleNamespace(
        rotate=function, supports=lambda name, *args: (ok, reason), available=lambda: (ok, reason)
    )


def test_the_first_backend_that_can_serve_serves(operation, call, monkeypatch):
    calls = []

    def native(*args):
        calls.append(args)
        return reference.rotate(*args)

    backends(operation, monkeypatch, cpu=stand_in(native))
    rotate(*call)
    rotate(*call)
    assert len(calls) == 2
    assert peftkern.explain("rotate", *call) == "rotate: cpu serves"


def test_a_backend_that_cannot_serve_is_passed_over_with_its_reason(operation, call, monkeypatch):
    def native(*args):
        raise AssertionError("must not be called")

    backends(operation, monkeypatch, cpu=stand_in(native, False, "serves even r only"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(rotate(*call)[0], reference.rotate(*call)[0])
    assert peftkern.explain("rotate", *call) == "rotate: reference serves\n  cpu: serves even r only"


def test_the_choice_is_made_once_for_each_kind_of_call(operation, call, monkeypatch):
    asked = []
    native = stand_in(reference.rotate)
    native.supports = lambda name, *args: (asked.append(name) or True, None)
    backends(operation, monkeypatch, cpu=native)
    x, V, T, reverse = call
    rotate(x, V, T, reverse)
    rotate(x[:1], V, T, True)
    assert len(asked) == 1
    rotate(x.bfloat16(), V, T, reverse)
    assert len(asked) == 2


def test_a_failure_at_the_first_use_falls_back_once_aloud(operation, call, monkeypatch):
    calls = []

    def native(*args):
        calls.append(args)
        raise OSError("symbol not found")

    backends(operation, monkeypatch, cpu=stand_in(native))
    with pytest.warns(
        UserWarning, match=r"backend cpu of rotate failed at its first use \(OSError: symbol not found\)"
    ):
        z, _ = rotate(*call)
    assert torch.equal(z, reference.rotate(*call)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rotate(*call)
        rotate(call[0].bfloat16(), *call[1:])
    assert len(calls) == 1
    assert "cpu: failed at its first use (OSError: symbol not found)" in peftkern.explain("rotate", *call)
    with peftkern.use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: failed at its first use"):
        rotate(*call)


def test_a_chosen_backend_that_fails_raises_its_own_error(operation, call, monkeypatch):
    def native(*args):
        raise OSError("symbol not found")

    backends(operation, monkeypatch, cpu=stand_in(native))
    with peftkern.use_backend("cpu"), pytest.raises(OSError, match="symbol not found"):
        rotate(*call)
    assert not operation._broken


@pytest.mark.parametrize("kind", (ValueError, TypeError))
def test_an_error_about_the_arguments_is_not_a_broken_backend(operation, call, monkeypatch, kind):
    def native(*args):
        raise kind("x must be smaller")

    backends(operation, monkeypatch, cpu=stand_in(native))
    with pytest.raises(kind, match="x must be smaller"):
        rotate(*call)
    assert not operation._broken


def test_a_chosen_backend_that_cannot_serve_raises_with_the_reason(call):
    with peftkern.use_backend("cuda"):
        with pytest.raises(RuntimeError, match=r"no backend serves rotate here \(cuda: .+\)"):
            rotate(*call)
        assert peftkern.explain("rotate", *call).startswith("rotate: nothing serves\n  cuda: ")


def test_use_backend_ends_with_its_block_even_after_an_error(call):
    before = peftkern.explain("rotate", *call)
    with peftkern.use_backend("reference"):
        with pytest.raises(RuntimeError), peftkern.use_backend("triton"):
            rotate(*call)
        assert peftkern.explain("rotate", *call) == "rotate: reference serves"
    assert peftkern.explain("rotate", *call) == before
    rotate(*call)


@pytest.mark.parametrize("name", ("cudnn", "", "Reference", None))
def test_an_unknown_backend_is_refused_before_anything_changes(name, call):
    before = peftkern.explain("rotate", *call)
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda; got"):
        with peftkern.use_backend(name):
            pass
    assert peftkern.explain("rotate", *call) == before


def test_explain_knows_every_operation_and_no_other():
    for name in peftkern.operations():
        text = peftkern.explain(name)
        assert text.splitlines()[0] in (f"{name}: {backend} serves" for backend in dispatch.BACKENDS)
    with pytest.raises(ValueError, match=r"name must be one of .*orthogonality_penalty, .*; got 'rotat'"):
        peftkern.explain("rotat")


def test_a_device_without_backends_of_its_own_gets_the_reference():
    operation = peftkern.operations()["rotate"]
    assert operation.candidates("mps") == ("reference",)
    assert operation.candidates("cuda") == ("cuda", "triton", "reference")


def test_every_preference_ends_with_the_reference():
    assert all(order[-1] == "reference" for order in dispatch.PREFERENCE.values())
    assert {name for order in dispatch.PREFERENCE.values() for name in order} == set(dispatch.BACKENDS)


def in_a_new_process(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PEFTKERN_BACKEND", "PEFTKERN_DISABLE")}
    paths = [os.path.dirname(os.path.dirname(peftkern.__file__)), clean.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


WHO_SERVES = "import peftkern; print(peftkern.explain('rotate').splitlines()[0])"


def test_the_environment_names_the_backend():
    assert in_a_new_process(WHO_SERVES, PEFTKERN_BACKEND="reference").stdout == "rotate: reference serves\n"
    assert in_a_new_process(WHO_SERVES, PEFTKERN_BACKEND="triton").stdout == "rotate: nothing serves\n"
    refused = in_a_new_process(WHO_SERVES, PEFTKERN_BACKEND="fast")
    assert refused.returncode != 0
    assert "backend must be one of reference, cpu, triton, cuda; got 'fast'" in refused.stderr


def test_the_environment_switches_native_code_off():
    assert in_a_new_process(WHO_SERVES, PEFTKERN_DISABLE="1").stdout == "rotate: reference serves\n"
    code = "from peftkern import dispatch; print(dispatch.DISABLED)"
    assert in_a_new_process(code, PEFTKERN_DISABLE="0").stdout == "False\n"


x, u, W, b = torch.randn(2, 8), torch.randn(8, 3), torch.randn(5, 8), torch.randn(5)
BAD = {  # call: (exception, what the sentence must name)
    "x, width": (lambda: peftkern.rotate(x[:, :7], u), ValueError, "rotate.* x must be 8.*float32 of shape \\[2, 7\\]"),
    "x, no dimension": (lambda: peftkern.rotate(x[0, 0], u), ValueError, "rotate.* x must be 8.*shape \\[\\]"),
    "x, integer": (lambda: peftkern.rotate(x.long(), u), TypeError, "rotate: x must be one of float64.*got int64"),
    "x, complex": (lambda: peftkern.rotate(x + 0j, u), TypeError, "rotate: x must be one of float64.*got complex64"),
    "x, sparse": (lambda: peftkern.rotate(x.to_sparse(), u), TypeError, "rotate: x must be a plain strided tensor"),
    "x, negative bit": (
        lambda: peftkern.rotate(torch.complex(x, x).conj().imag, u),
        TypeError,
        "rotate: x must be a plain strided tensor without conjugate or negative bit",
    ),
    "x, other device": (
        lambda: peftkern.rotate(x, u.to("meta")),
        ValueError,
        "rotate: all tensors must be on one device; got u on meta, x on cpu",
    ),
    "u, integer": (lambda: peftkern.rotate(x, u.int()), TypeError, "rotate: u must be one of float64.*got int32"),
    "u, one dimension": (
        lambda: peftkern.rotate(x, u[:, 0]),
        ValueError,
        "u must have shape \\[K, r\\].*got .*\\[8\\]",
    ),
    "u, no column": (lambda: peftkern.rotate(x, u[:, :0]), ValueError, "u must have shape .* r >= 1; got .*\\[8, 0\\]"),
    "weight, width": (lambda: peftkern.hra_linear(x, W[:, :7], b, u), ValueError, "weight must be 8.*\\[5, 7\\]"),
    "weight, dtype": (
        lambda: peftkern.hra_linear(x, W.half(), b, u),
        ValueError,
        "weight must be \\[N, 8\\] in x's dtype torch.float32; got float16",
    ),
    "weight, three dimensions": (
        lambda: peftkern.hra_linear(x, W[None], b, u),
        ValueError,
        "weight must be \\[N, 8\\]",
    ),
    "bias, shape": (lambda: peftkern.hra_linear(x, W, b[:4], u), ValueError, "bias must be .*\\[5\\]; got .*\\[4\\]"),
    "bias, dtype": (
        lambda: peftkern.hra_linear(x, W, b.double(), u),
        ValueError,
        "bias must be torch.float32 .*float64",
    ),
    "bias, device": (
        lambda: peftkern.hra_linear(x, W, b.to("meta"), u),
        ValueError,
        "hra_linear: all tensors must be on one device.*bias on meta",
    ),
    "precision": (
        lambda: peftkern.hra_linear(x, W, b, u, precision="exakt"),
        ValueError,
        "precision must be one of auto, fast, exact; got 'exakt'",
    ),
    "low rank, weight": (lambda: peftkern.low_rank_form(W[:, :7], u), ValueError, "weight must be 8.*\\[5, 7\\]"),
    "low rank, three dimensions": (
        lambda: peftkern.low_rank_form(W[None], u),
        ValueError,
        "weight must be \\[N, K = 8\\]",
    ),
    "penalty, u": (lambda: peftkern.orthogonality_penalty(u[0]), ValueError, "u must have shape .*got .*\\[3\\]"),
    "penalty, integer": (lambda: peftkern.orthogonality_penalty(u.long()), TypeError, "u must be one of float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_argument_wanted_and_seen(case):
    function, kind, sentence = BAD[case]
    with pytest.raises(kind, match=sentence) as caught:
        function()
    assert "\n" not in str(caught.value)


T = torch.eye(3, dtype=torch.float64)
ops = torch.ops.peftkern
BAD_CALLS = {
    "V, half": (
        lambda: ops.wy_factor(u.half()),
        TypeError,
        "wy_factor: V must be one of float64, float32; got float16",
    ),
    "V, one dimension": (lambda: ops.wy_factor(u[0]), ValueError, "wy_factor: V must have shape \\[K, r\\]"),
    "V and x": (lambda: ops.rotate(x, u.double(), T, False), TypeError, "V must be float64 exactly when x is"),
    "T, dtype": (
        lambda: ops.rotate(x, u, T.float(), False),
        ValueError,
        "rotate: T must be float64 of shape \\[3, 3\\]",
    ),
    "T, shape": (
        lambda: ops.rotate(x, u, T[:2], False),
        ValueError,
        "rotate: T must be .*got float64 of shape \\[2, 3\\]",
    ),
    "T, device": (lambda: ops.rotate(x, u, T.to("meta"), False), ValueError, "rotate: all tensors .*T on meta"),
    "x, on meta": (
        lambda: ops.rotate(x.to("meta"), u, T, False),
        ValueError,
        "rotate: all tensors .*x on meta, V on cpu",
    ),
    "dz": (
        lambda: ops.rotate_backward(x[:1], x, x[:, :3], u, T, False, [True, True]),
        ValueError,
        "dz must be like x; got .*\\[1, 8\\]",
    ),
    "dz, dtype": (
        lambda: ops.rotate_backward(x.half(), x, x[:, :3], u, T, False, [True, True]),
        ValueError,
        "dz must be like x",
    ),
    "P": (
        lambda: ops.rotate_backward(x, x, x[:, :2], u, T, False, [True, True]),
        ValueError,
        "P must be .*\\[M, r\\]; got .*\\[2, 2\\]",
    ),
    "dT": (lambda: ops.wy_factor_backward(T[:1], u, T), ValueError, "wy_factor_backward: dT must be like T"),
    "dT, Gram-Schmidt": (
        lambda: ops.orthonormal_factor_backward(u, T[:1], u, T),
        ValueError,
        "orthonormal_factor_backward: dT must be",
    ),
    "weight": (
        lambda: ops.rotated_linear(x, W.half(), None, u, T, True),
        TypeError,
        "weight must be one of float32; got float16",
    ),
    "weight, width": (
        lambda: ops.rotated_linear(x, W[:, :4], None, u, T, True),
        ValueError,
        "weight must be \\[N, K = 8\\]",
    ),
    "bias": (lambda: ops.rotated_linear(x, W, b[:2], u, T, True), ValueError, "bias must be .*\\[5\\]; got .*\\[2\\]"),
    "dy": (
        lambda: ops.rotated_linear_backward(x, x, W, x[:, :3], x[:0, :3], u, T, [True, True]),
        ValueError,
        "rotated_linear_backward: dy must be .*got float32 of shape \\[2, 8\\]",
    ),
    "B": (
        lambda: ops.rotated_linear_backward(
            x[:, :5].half(), x.half(), W.half(), x[:, :3], x[:4, :3], u, T, [True, True]
        ),
        ValueError,
        "rotated_linear_backward: B must be torch.float32 of shape \\[5, 3\\]; got float32 of shape \\[2, 3\\]",
    ),
    "project, x": (lambda: ops.project(x[:, :2], u), ValueError, "project: x must have K = 8 columns"),
    "dP": (
        lambda: ops.project_backward(x, x, u, [True, True]),
        ValueError,
        "dP must be .*\\[M, r\\]; got .*\\[2, 8\\]",
    ),
    "grad": (
        lambda: ops.orthogonality_penalty_backward(b, u, True),
        ValueError,
        "grad must be one number; got .*\\[5\\]",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_an_operation_refuses_bad_arguments_real_and_fake_alike(case):
    function, kind, sentence = BAD_CALLS[case]
    with pytest.raises(kind, match=sentence):
        function()


class Wrapped(torch.Tensor):
    """A subclass that owns no memory of its own, like DTensor."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("must be refused before anything runs")

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)


@pytest.mark.parametrize("argument", ("x", "u", "weight"))
def test_a_subclass_without_memory_is_refused_in_a_sentence(argument):
    tensors = {"x": x, "weight": W, "u": u}
    tensors[argument] = Wrapped(tensors[argument])
    with pytest.raises(TypeError, match=f"hra_linear: {argument} must be a plain tensor; got Wrapped"):
        peftkern.hra_linear(tensors["x"], tensors["weight"], None, tensors["u"])


def test_dtensor_is_refused_in_a_sentence():
    from torch import distributed
    from torch.distributed.tensor import DTensor, Replicate

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        sharded = DTensor.from_local(u, mesh, [Replicate()])
        with pytest.raises(TypeError, match="rotate: u must be a plain tensor; got DTensor"):
            peftkern.rotate(x, sharded)
        with pytest.raises(TypeError, match="orthogonality_penalty: u must be a plain tensor; got DTensor"):
            peftkern.orthogonality_penalty(sharded)
    finally:
        distributed.destroy_process_group()


def test_parameters_plain_subclasses_and_fakes_are_not_refused():
    class Named(torch.Tensor):
        pass

    wanted = peftkern.rotate(x, u)
    assert torch.equal(peftkern.rotate(x, torch.nn.Parameter(u)), wanted)
    assert torch.equal(peftkern.rotate(x.as_subclass(Named), u).as_subclass(torch.Tensor), wanted)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = peftkern.rotate(mode.from_tensor(x), mode.from_tensor(u))
    assert fake.shape == x.shape and fake.dtype is x.dtype
    assert peftkern.rotate(x.to("meta"), u.to("meta")).shape == x.shape
