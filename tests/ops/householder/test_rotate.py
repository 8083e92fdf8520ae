"""The rotation against explicit products of reflections: values, gradients, shapes, strides, degenerate columns."""

import oracle
import pytest
import torch

import peftkern

# (shape of x, r): odd and prime widths, r = 1, odd r, r = K, r > K, one token, no token, no leading dimension at all
CASES = [
    ((5, 123, 123), 8),
    ((7, 127), 1),
    ((3, 2, 4, 31), 3),
    ((1, 61), 7),
    ((64,), 2),
    ((4, 5), 5),
    ((6, 1), 1),
    ((9, 3), 8),
    ((40, 130), 33),
    ((2, 16, 96), 96),
    ((150, 257), 128),
    ((0, 17), 4),
    ((2, 0, 19), 3),
]


def run(x, u, dz, reverse=False):
    return oracle.value_and_gradients(lambda x, u: peftkern.rotate(x, u, reverse), (x, u), dz)


def assert_equal(seen, wanted, tolerance=1e-12):
    for name, ours, exact in zip(("z", "dx", "du"), seen, wanted, strict=True):
        assert ours.shape == exact.shape and oracle.error(ours, exact) <= tolerance, (
            f"{name}: {oracle.error(ours, exact):.2e}"
        )


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("shape, r", CASES)
def test_value_and_gradients_equal_the_product_of_reflections(backend, shape, r, reverse):
    x, dz = torch.randn(2, *shape, dtype=torch.float64)
    u = torch.randn(shape[-1], r, dtype=torch.float64)
    truth = oracle.value_and_gradients(lambda x, u: oracle.rotate(x, u, reverse), (x, u), dz)
    seen = run(x, u, dz, reverse)
    assert_equal(seen, truth)
    assert seen[0].is_contiguous()


def test_reverse_is_the_inverse(backend):
    x, u = torch.randn(33, 77, dtype=torch.float64), torch.randn(77, 5, dtype=torch.float64)
    assert oracle.error(peftkern.rotate(peftkern.rotate(x, u), u, reverse=True), x) < 1e-13
    assert oracle.error(peftkern.rotate(x, u), peftkern.rotate(x, u, reverse=True)) > 0.1


def test_the_first_column_is_the_outermost_reflection(backend):
    """W H = W H_0 H_1: the row x meets H_1 first. Swapping the columns is the inverse of a pair."""
    x, u = torch.randn(4, 9, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    first, second = (oracle.chain(u[:, i : i + 1]) for i in (0, 1))
    assert oracle.error(peftkern.rotate(x, u), x @ second @ first) < 1e-14
    assert oracle.error(peftkern.rotate(x, u.flip(1)), peftkern.rotate(x, u, reverse=True)) < 1e-14


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second column": lambda t: torch.stack((t, torch.full_like(t, torch.nan)), -1).flatten(-2)[..., ::2],
    "every second row": lambda t: torch.stack((t, torch.full_like(t, torch.nan)), -2).flatten(-3, -2)[..., ::2, :],
    "inside a larger tensor": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 1), value=torch.nan)[..., 1:-1, 3:-2],
    "expanded rows": lambda t: t[..., :1, :].expand(t.shape),
    "expanded columns": lambda t: t[..., :1].expand(t.shape),
    "one number expanded": lambda t: t.flatten()[0].expand(t.shape),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("which", ("x", "u", "dz"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_and_inputs_are_not_written(backend, layout, which, dtype):
    tensors = {
        "x": torch.randn(3, 10, 37, dtype=dtype),
        "u": torch.randn(37, 6, dtype=torch.promote_types(dtype, torch.float32)),
        "dz": torch.randn(3, 10, 37, dtype=dtype),
    }
    strided = {**tensors, which: LAYOUTS[layout](tensors[which])}
    assert not strided[which].is_contiguous()
    before = strided[which].clone()
    x, u = (strided[name].detach().requires_grad_() for name in ("x", "u"))
    z = peftkern.rotate(x, u)
    seen = z.detach(), *torch.autograd.grad(z, (x, u), strided["dz"])
    packed = {name: t.contiguous() for name, t in strided.items()}
    wanted = run(packed["x"], packed["u"], packed["dz"])
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-3}[dtype]
    assert_equal(seen, wanted, tolerance)
    assert torch.equal(strided[which], before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_zero_column_is_the_identity_with_no_gradient(backend, dtype):
    x, dz = torch.randn(2, 11, 29, dtype=dtype)
    u = torch.randn(29, 5, dtype=dtype)
    u[:, (0, 3)] = 0
    z, dx, du = run(x, u, dz)
    z2, dx2, du2 = run(x, u[:, (1, 2, 4)], dz)
    assert oracle.error(z, z2) < 1e-6 and oracle.error(dx, dx2) < 1e-6 and oracle.error(du[:, (1, 2, 4)], du2) < 1e-6
    assert not du[:, (0, 3)].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("K, r", ((29, 1), (29, 6), (5, 7), (123, 128)))
def test_the_factor_is_the_inverse_of_the_gram_matrix(backend, dtype, K, r):
    """Upper triangular, entries at most 4 / (||v_i|| ||v_j||), zero rows and columns for zero columns."""
    V = torch.randn(K, r, dtype=dtype)
    V[:, r // 2 : r // 2 + (r > 1)] = 0
    T = torch.ops.peftkern.wy_factor(V)
    kept = V.any(0)
    assert T.dtype is torch.float64 and torch.equal(T, T.triu())
    assert not T[~kept].any() and not T[:, ~kept].any()
    V, T = V[:, kept].double(), T[kept][:, kept]
    A = (V.T @ V).triu(1) + torch.diag((V * V).sum(0) / 2)
    assert oracle.error(T @ A, torch.eye(len(A))) < 1e-12
    assert (T.abs() <= 4.0001 / torch.outer(V.norm(dim=0), V.norm(dim=0))).all()


def test_only_zero_columns_return_x_itself(backend):
    x, dz = torch.randn(2, 11, 29)
    z, dx, du = run(x, torch.zeros(29, 4), dz)
    assert torch.equal(z, x) and torch.equal(dx, dz) and not du.any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_equal_pairs_are_the_identity(backend, dtype):
    """PEFT's initial value. An fp32 chain of multiply-adds may leave one ulp; half precision rounds that away."""
    x = torch.randn(64, 250).to(dtype)
    u = torch.randn(250, 4).to(torch.promote_types(dtype, torch.float32)).repeat_interleave(2, 1)
    z = peftkern.rotate(x, u)
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(z, x)
    else:
        assert (z - x).abs().max() <= 4 * torch.finfo(dtype).eps * x.abs().max()
    assert torch.equal(peftkern.rotate(x, u[:, :2]), x) or dtype in (torch.float32, torch.float64)


def test_gradients_of_an_equal_pair_are_opposite(backend):
    x, dz = torch.randn(2, 50, 64, dtype=torch.float64)
    u = torch.randn(64, 3, dtype=torch.float64).repeat_interleave(2, 1)
    du = run(x, u, dz)[2]
    assert du.norm() > 1
    assert oracle.error(du[:, 0::2], -du[:, 1::2]) < 1e-12
    du = run(x.float(), u.float(), dz.float())[2]
    assert oracle.error(du[:, 0::2], -du[:, 1::2]) < 2e-6


@pytest.mark.parametrize("scale", (1e-20, 1e-6, 1e-3, 1e3, 1e6, 1e18))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_length_of_a_column_does_not_matter(backend, dtype, scale):
    x, dz = torch.randn(2, 20, 45, dtype=dtype)
    u = torch.randn(45, 6, dtype=dtype)
    scales = torch.ones(6, dtype=dtype)
    scales[1::2] = scale
    z, dx, du = run(x, u, dz)
    z2, dx2, du2 = run(x, u * scales, dz)
    tolerance = 30 * torch.finfo(dtype).eps
    assert_equal((z2, dx2, du2.double() * scales), (z, dx, du), tolerance)


def test_a_length_that_is_a_power_of_two_changes_no_bit(backend):
    x, dz = torch.randn(2, 20, 45)
    u = torch.randn(45, 6)
    z, dx, du = run(x, u, dz)
    z2, dx2, du2 = run(x, u * 2.0**-12, dz)
    assert torch.equal(z, z2) and torch.equal(dx, dx2) and torch.equal(du, du2 * 2.0**-12)


@pytest.mark.parametrize("dtype, bound", ((torch.float64, 1e-13), (torch.float32, 2e-6)))
def test_the_gradient_of_a_column_is_orthogonal_to_it(backend, dtype, bound):
    x, dz = torch.randn(2, 60, 101, dtype=dtype)
    u = torch.randn(101, 9, dtype=dtype)
    du = run(x, u, dz)[2]
    cosines = (u.double() * du.double()).sum(0) / (u.double().norm(dim=0) * du.double().norm(dim=0))
    assert cosines.abs().max() < bound


# Budget: METHODS' measurement at K = 1024, r = 32 in fp32 with the small algebra in fp64 is at most 2.3e-6.
@pytest.mark.parametrize("noise", (0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1))
@pytest.mark.parametrize("K, r", (pytest.param(1024, 32, marks=pytest.mark.big), (123, 128), (33, 2)))
def test_the_rotation_is_orthogonal_however_parallel_the_columns(backend, K, r, noise):
    u = torch.randn(K, 1) + noise * torch.randn(K, r)
    H = peftkern.rotate(torch.eye(K), u, reverse=True)
    assert oracle.orthogonality_error(H) <= 5e-6
    assert (H.double() - oracle.chain(u)).norm() <= 1e-5


def test_two_runs_are_bitwise_equal(backend):
    x, dz = torch.randn(2, 301, 200).bfloat16()
    u = torch.randn(200, 12)
    for first, second in zip(run(x, u, dz), run(x.clone(), u.clone(), dz.clone()), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_number_of_threads_changes_no_bit(backend, dtype):
    """Of what the kernels compute; y and dx of an exact layer contain torch's own product, which threads may split."""
    x, dz = torch.randn(2, 517, 515).to(dtype)
    u, weight, dy = torch.randn(515, 9), torch.randn(130, 515).to(dtype), torch.randn(517, 130).to(dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            T = torch.ops.peftkern.wy_factor(u)
            _, P, B = torch.ops.peftkern.rotated_linear(x, weight, None, u, T, True)
            _, dV, dT = torch.ops.peftkern.rotated_linear_backward(dy, x, weight, P, B, u, T, [True, True])
            results.append((*run(x, u, dz), T, P, B, dV, dT))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_non_finite_number_spoils_its_row_and_no_other(backend, bad):
    x, u = torch.randn(9, 40), torch.randn(40, 3)
    clean = peftkern.rotate(x, u)
    x[4, 7] = bad
    z = peftkern.rotate(x, u)
    assert not z[4].isfinite().all()
    assert torch.equal(z[:4], clean[:4]) and torch.equal(z[5:], clean[5:])


def test_a_non_finite_parameter_is_not_hidden(backend):
    u = torch.randn(40, 3)
    u[3, 1] = torch.nan
    assert peftkern.rotate(torch.randn(9, 40), u).isnan().all()
