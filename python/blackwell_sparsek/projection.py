"""The SPARSEK operator as a torch operator, with its derivative.

On the CPU the core computes it; on CUDA torch's own operators do, without waiting for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blackwell_sparsek import _core
from blackwell_sparsek._arguments import call_on, checked_view, name_of, view_of
from blackwell_sparsek._library import LIBRARY, define, fake, implement

define("sparsek(Tensor z, int k) -> Tensor")
define("sparsek_backward(Tensor p, Tensor dp) -> Tensor")


def _sparsek(z: Tensor, k: int) -> Tensor:
    p = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    z_view = checked_view(z, "z", z.device)
    _core.sparsek_projection(call_on(z.device, "auto"), z_view, k, view_of(p))
    return p


def _sparsek_backward(p: Tensor, dp: Tensor) -> Tensor:
    dz = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    call = call_on(p.device, "auto")
    _core.sparsek_projection_backward(call, view_of(p), view_of(dp), view_of(dz))
    return dz


def sparsek_by_sorting(z: Tensor, k: int) -> Tensor:
    """The projection in torch's operators, in O(n log n) and float64.

    f(tau) = sum_j clip(z_j - tau, 0, 1) falls piecewise linearly, with kinks at z_j and z_j - 1. The
    largest kink with f >= k is found by evaluating f at all of them from prefix sums; from there f is
    a line, and the solution a division.
    """
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z: expected float32 or float64, got {name_of(z.dtype)}")
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    num_scores = z.shape[-1]
    if k == 0 or k >= num_scores:
        return z.new_full(z.shape, 0.0 if k == 0 else 1.0)
    ascending = z.double().sort(dim=-1).values.contiguous()
    # sums[i] is the sum of the i smallest.
    sums = torch.nn.functional.pad(ascending.cumsum(dim=-1), (1, 0))
    saturates = ascending - 1  # at and below these, a score contributes 1
    kinks = torch.cat([ascending, saturates], dim=-1)

    def line_at(tau: Tensor) -> tuple[Tensor, Tensor]:
        """(constant, slope) with f = constant - slope * t for t from tau to the next kink."""
        zeros = torch.searchsorted(ascending, tau, right=True)
        not_ones = torch.searchsorted(saturates, tau, right=True)
        slope = not_ones - zeros
        constant = (num_scores - not_ones) + sums.gather(-1, not_ones) - sums.gather(-1, zeros)
        return constant, slope

    constant, slope = line_at(kinks)
    # The smallest kink has f = n > k, so there always is one.
    reaches_k = constant - slope * kinks >= k
    kink = torch.where(reaches_k, kinks, -torch.inf).amax(dim=-1, keepdim=True)
    constant, slope = line_at(kink)
    tau = torch.where(slope > 0, (constant - k) / slope.clamp(min=1), kink)
    return (z.double() - tau).clamp(0, 1).to(z.dtype).contiguous()


def sparsek_backward_by_masking(p: Tensor, dp: Tensor) -> Tensor:
    """dz_j = dp_j - mean over I of dp for j in I = {j : 0 < p_j < 1}, else 0."""
    inside = (p > 0) & (p < 1)
    total = torch.where(inside, dp, 0).sum(dim=-1, keepdim=True)
    mean = total / inside.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(inside, dp - mean, 0).contiguous()


implement("sparsek", _sparsek, ["CPU"])
implement("sparsek", sparsek_by_sorting, ["CUDA"])
implement("sparsek_backward", _sparsek_backward, ["CPU"])
implement("sparsek_backward", sparsek_backward_by_masking, ["CUDA"])


@fake("sparsek")
def _(z, k):
    return z.new_empty(z.shape)


@fake("sparsek_backward")
def _(p, dp):
    return p.new_empty(p.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output)


def _derive(ctx, dp):
    (p,) = ctx.saved_tensors
    return torch.ops.blackwell_sparsek.sparsek_backward(p, dp), None


def _refuse_second_derivative(ctx, *gradients):
    raise NotImplementedError("sparsek has no second derivative: it is piecewise linear")


torch.library.register_autograd(
    "blackwell_sparsek::sparsek", _derive, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd(
    "blackwell_sparsek::sparsek_backward", _refuse_second_derivative, lib=LIBRARY
)
