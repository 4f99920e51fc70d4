"""Derivatives of the stages' operators.

attend is differentiable in q, k, v and the scores wherever attend_backward runs; elsewhere a call whose
inputs require grad is refused, never silently detached. select is not differentiable: attend_backward
carries the gradient of the thresholds to the scores.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from blackwell_sparsek._arguments import CPU, CUDA
from blackwell_sparsek._library import LIBRARY
from blackwell_sparsek.capability import query

# Positions in attend's schema.
_Q, _K, _V, _SCORES, _EXPIRY, _THRESHOLD, _LAST_CANDIDATE, _LENGTHS = range(8)
_NUM_ARGUMENTS = 17
# And in attend_varlen's, where the first seven are the same.
_STARTS_K, _NUM_PACKED_ARGUMENTS = 8, 16


def require_backward(
    q, k, configuration, is_foreign: bool, max_keys_per_tile, gate: str, backend: str
) -> None:
    """NotImplementedError unless attend_backward serves this problem here.

    q and k are ``[B, H, S, D]``, or ``[S, H, D]`` of packed sequences.
    """
    answer = query(
        "attend_backward",
        (CUDA if q.device.type == "cuda" else CPU, q.device.index or 0),
        backend,
        q.dtype,
        # Batch and lengths do not matter; leaving them out keeps traced shapes dynamic.
        (1, int(q.shape[1]), 1, int(q.shape[-1])),
        (1, int(k.shape[1]), 1, int(k.shape[-1])),
        tuple(configuration),
        is_foreign,
        max_keys_per_tile,
        gate,
    )
    if not answer.supported:
        raise NotImplementedError(
            f"attend_backward is missing here, but an input requires grad: {answer.reason}. "
            'backend="reference" has a backward; torch.no_grad() does without one'
        )


def wants_gradients(*tensors) -> bool:
    """Whether a call must be differentiable; NotImplementedError for transforms that it cannot follow."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            _refuse_forward_mode(tensors)
        if wanted and torch._C._functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "torch.func transforms that differentiate are not supported: use torch.autograd"
            )
    return wanted


def _refuse_forward_mode(tensors) -> None:
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("forward-mode derivatives are not supported")


def _save_for_backward(ctx, inputs, output):
    *configuration, max_keys_per_tile, gate, sm_scale, return_lse, backend = inputs[_LENGTHS + 1 :]
    q, k = inputs[_Q], inputs[_K]
    is_foreign = inputs[_THRESHOLD] is None
    require_backward(q, k, configuration, is_foreign, max_keys_per_tile, gate, backend)
    if not return_lse:
        raise ValueError("return_lse: expected True where gradients are wanted, got False")
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs[: _LENGTHS + 1], out, lse)
    ctx.options = (*configuration, max_keys_per_tile, gate, sm_scale)
    ctx.backend = backend


def _backward(ctx, dout, _dlse):
    *inputs, out, lse = ctx.saved_tensors
    needs_dscores = ctx.needs_input_grad[_SCORES] and inputs[_SCORES] is not None
    dq, dk, dv, dscores = torch.ops.blackwell_sparsek.attend_backward(
        *inputs, *ctx.options, out, lse, dout, needs_dscores, ctx.backend
    )
    rest = [None] * (_NUM_ARGUMENTS - _SCORES - 1)
    return dq, dk, dv, dscores if needs_dscores else None, *rest


def _save_packed_for_backward(ctx, inputs, output):
    *configuration, gate, sm_scale, backend = inputs[_STARTS_K + 1 :]
    require_backward(inputs[_Q], inputs[_K], configuration, False, None, gate, backend)
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs[: _STARTS_K + 1], out, lse)
    ctx.options = (*configuration, gate, sm_scale)
    ctx.backend = backend


def _packed_backward(ctx, dout, _dlse):
    *inputs, out, lse = ctx.saved_tensors
    needs_dscores = ctx.needs_input_grad[_SCORES] and inputs[_SCORES] is not None
    dq, dk, dv, dscores = torch.ops.blackwell_sparsek.attend_backward_varlen(
        *inputs, *ctx.options, out, lse, dout, needs_dscores, ctx.backend
    )
    rest = [None] * (_NUM_PACKED_ARGUMENTS - _SCORES - 1)
    return dq, dk, dv, dscores if needs_dscores else None, *rest


def _refuse_second_derivative(ctx, *gradients):
    raise NotImplementedError("attend_backward has no derivative: double backward is not supported")


def _mark_selection(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def _no_gradients(ctx, *gradients):
    return (None,) * 7  # of select and select_varlen


def _mark_scores(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def _no_key_gradient(ctx, gradient):
    return None, None, None


for _name, _function, _setup in (
    ("key_norm_scores", _no_key_gradient, _mark_scores),
    ("select", _no_gradients, _mark_selection),
    ("attend", _backward, _save_for_backward),
    ("attend_backward", _refuse_second_derivative, None),
    ("select_varlen", _no_gradients, _mark_selection),
    ("attend_varlen", _packed_backward, _save_packed_for_backward),
    ("attend_backward_varlen", _refuse_second_derivative, None),
):
    torch.library.register_autograd(
        f"blackwell_sparsek::{_name}", _function, setup_context=_setup, lib=LIBRARY
    )
