"""torch.compile: one graph, at most one recompilation over batch sizes, the same numbers."""

import oracle
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import peftkern
from peftkern.ops import householder

CASES = {
    "rotate": (torch.float32, lambda x, W, b, u: peftkern.rotate(x, u)),
    "rotate, bfloat16": (torch.bfloat16, lambda x, W, b, u: peftkern.rotate(x, u)),
    "rotate, reversed": (torch.float32, lambda x, W, b, u: peftkern.rotate(x, u, reverse=True)),
    "fast": (torch.float32, lambda x, W, b, u: peftkern.hra_linear(x, W, b, u, "fast")),
    "exact": (torch.bfloat16, lambda x, W, b, u: peftkern.hra_linear(x, W, b, u, "exact")),
    "auto": (torch.bfloat16, lambda x, W, b, u: peftkern.hra_linear(x, W, b, u)),
    "Gram-Schmidt": (
        torch.float32,
        lambda x, W, b, u: householder.apply_factor(x, *householder.factor(u, gram_schmidt=True)),
    ),
    "penalty": (torch.float32, lambda x, W, b, u: peftkern.orthogonality_penalty(u) + x.sum()),
    "low_rank_form": (
        torch.float32,
        lambda x, W, b, u: (lambda A, B: x @ A.T @ B.T)(*peftkern.low_rank_form(W, u)),
    ),
}


def run(function, x, W, b, u):
    leaves = [t.detach().clone().requires_grad_() for t in (x, W, b, u)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)]


@pytest.mark.parametrize("case", CASES)
def test_one_graph_and_at_most_one_recompilation(case):
    dtype, function = CASES[case]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    W, b, u = torch.randn(20, 33).to(dtype), torch.randn(20).to(dtype), torch.randn(33, 4)
    for tokens in (2, 3, 7, 16):
        x = torch.randn(tokens, 5, 33).to(dtype)
        for seen, wanted in zip(run(compiled, x, W, b, u), run(function, x, W, b, u), strict=True):
            assert (seen is None and wanted is None) or oracle.error(seen, wanted) < 1e-6
    assert counter.frame_count <= 2


def test_no_recompilation_between_training_steps():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, u: peftkern.rotate(x, u).square().sum(), backend=counter, fullgraph=True)
    u = torch.nn.Parameter(torch.randn(33, 4))
    optimiser = torch.optim.SGD([u], 1e-3)
    for _ in range(4):
        compiled(torch.randn(6, 33, requires_grad=True), u).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert counter.frame_count == 1


def test_inductor_gives_the_numbers_of_eager():
    dtype, function = CASES["exact"]
    torch._dynamo.reset()
    x, W, b, u = (
        torch.randn(6, 33).to(dtype),
        torch.randn(20, 33).to(dtype),
        torch.randn(20).to(dtype),
        torch.randn(33, 4),
    )
    truth = oracle.linear(x, W, b, u)
    y = torch.compile(function, fullgraph=True)(x, W, b, u)
    assert oracle.error(y, truth) <= 1.1 * oracle.error(function(x, W, b, u), truth)
