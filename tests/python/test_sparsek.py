"""The SPARSEK operator against bisection, finite differences and its definition."""

from __future__ import annotations

import blackwell_sparsek as bs
import pytest
import torch
from blackwell_sparsek.projection import sparsek_backward_by_masking, sparsek_by_sorting
from conftest import needs_cuda


def by_bisection(z: torch.Tensor, k: int) -> torch.Tensor:
    """Along the last dimension, for 0 < k < n."""
    low = z.amin(dim=-1, keepdim=True) - 1
    high = z.amax(dim=-1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        reaches = (z - middle).clamp(0, 1).sum(dim=-1, keepdim=True) >= k
        low, high = torch.where(reaches, middle, low), torch.where(reaches, high, middle)
    return (z - low).clamp(0, 1)


def scores_of(kind: str, rows: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    return {
        "normal": noise,
        "tiny": 1e-4 * noise,
        "huge": 500 * noise,
        "ties": (2 * noise).round() / 2,
        "equal": torch.full((rows, n), 0.25, dtype=torch.float64),
    }[kind]


KINDS = ["normal", "tiny", "huge", "ties", "equal"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(2, 1), (7, 3), (64, 1), (64, 63), (500, 40)])
def test_against_bisection(kind, n, k):
    z = scores_of(kind, 6, n)
    p = bs.sparsek(z, k)
    torch.testing.assert_close(p, by_bisection(z, k), rtol=0, atol=1e-11)
    torch.testing.assert_close(p.sum(dim=-1), torch.full((6,), float(k), dtype=torch.float64))
    assert ((p >= 0) & (p <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (7, 3), (64, 63), (500, 40), (9, 20)])
def test_by_sorting_equals_the_core(kind, n, k):
    """What CUDA tensors take is plain torch: it can be held against the core on the CPU."""
    z = scores_of(kind, 6, n)
    p = bs.sparsek(z, k)
    torch.testing.assert_close(sparsek_by_sorting(z, k), p, rtol=0, atol=1e-9)
    dp = torch.randn(p.shape, dtype=torch.float64)
    expected = torch.ops.blackwell_sparsek.sparsek_backward(p, dp)
    torch.testing.assert_close(sparsek_backward_by_masking(p, dp), expected, rtol=0, atol=1e-12)


def test_extremes():
    z = torch.randn(3, 5)
    assert torch.equal(bs.sparsek(z, 0), torch.zeros(3, 5))
    assert torch.equal(bs.sparsek(z, 5), torch.ones(3, 5))
    assert torch.equal(bs.sparsek(z, 9), torch.ones(3, 5))
    assert bs.sparsek(torch.empty(0, 4), 2).shape == (0, 4)


def test_documented_example():
    p = bs.sparsek(torch.tensor([2.0, 0.4, 0.2, -1.0]), k=2)
    torch.testing.assert_close(p, torch.tensor([1.0, 0.6, 0.4, 0.0]))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_dim(dim):
    z = torch.randn(4, 6, 5)
    expected = bs.sparsek(z.movedim(dim, -1).contiguous(), 2).movedim(-1, dim)
    assert torch.equal(bs.sparsek(z, 2, dim), expected)


def test_gradcheck():
    z = scores_of("normal", 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: bs.sparsek(z, 3), (z,))
    assert torch.autograd.gradcheck(
        lambda z: bs.sparsek(z, 3, dim=0), (z.detach().T.requires_grad_(),)
    )


def test_second_derivative_is_refused():
    z = torch.randn(2, 8, requires_grad=True)
    (dz,) = torch.autograd.grad(bs.sparsek(z, 3).square().sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dz.sum().backward()


def test_opcheck():
    z = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.blackwell_sparsek.sparsek.default, (z, 3))


@needs_cuda
def test_on_cuda():
    z = scores_of("normal", 6, 500)
    torch.testing.assert_close(bs.sparsek(z.cuda(), 40).cpu(), bs.sparsek(z, 40))
    z = z[:, :9].cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: bs.sparsek(z, 3), (z,))
