"""Fused operators for inference: score, select and attend in one call, dense and packed.

Small calls cost what the host does for them. So one C++ function does everything: it reads the tensors, allocates
the outputs and one buffer for what lives between the stages, and launches. The public functions call ``run_dense``
and ``run_packed`` themselves where torch's dispatcher would do nothing else.

The operators have no derivatives: where gradients are wanted ``attention_forward`` composes the stages' operators
instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blackwell_sparsek import _arguments as arguments
from blackwell_sparsek import _core
from blackwell_sparsek._arguments import backend_code, gate_code
from blackwell_sparsek._library import (
    ATTENTION,
    CONFIGURATION,
    LIBRARY,
    define,
    fake,
    implement,
    lse_dtype,
    on_host,
)


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"torch.ops.blackwell_sparsek.{name} has no backward: call blackwell_sparsek.{name}, "
            "which uses differentiable operators where gradients are wanted, or work under "
            "torch.no_grad()"
        )


def _empty_attention(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """out like q; lse of q's shape without the last dimension, or empty where it is not wanted."""
    lse_shape = q.shape[:-1] if return_lse else (0,)
    return torch.empty_like(q), q.new_empty(lse_shape, dtype=lse_dtype(q.dtype))


def _as_operator(q: Tensor, results: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """An operator returns tensors only: an lse that is not wanted is empty."""
    out, lse = results
    return out, q.new_empty((0,), dtype=lse_dtype(q.dtype)) if lse is None else lse


# ---- dense ---------------------------------------------------------------------------------------

define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? scores, Tensor? lengths,"
    f" {CONFIGURATION}, {ATTENTION}, bool return_lse, str backend) -> (Tensor out, Tensor lse)"
)


def run_dense(
    q,
    k,
    v,
    scores,
    lengths,
    num_selected,
    window,
    chunk_size,
    num_candidates,
    gate,
    sm_scale,
    return_lse,
    backend,
):
    """``(out, lse)``, lse None where it is not wanted."""
    if q.is_cuda:
        if backend == "reference":
            configuration = (num_selected, window, chunk_size, num_candidates)
            rest = (*configuration, gate, sm_scale, return_lse, backend)
            return on_host(run_dense, q.device, q, k, v, scores, lengths, *rest)
        if arguments.CHECK_VALUES_ON_CUDA:
            arguments.check_values(scores, lengths, k.shape[2])
    return _core.attention_forward(
        q,
        k,
        v,
        scores,
        lengths,
        num_selected,
        window,
        chunk_size,
        num_candidates,
        gate_code(gate),
        sm_scale,
        bool(return_lse),
        backend_code(backend),
    )


def _attention_forward(q, k, v, scores, lengths, *options):
    _refuse_gradients("attention_forward", q, k, v, scores)
    return _as_operator(q, run_dense(q, k, v, scores, lengths, *options))


implement("attention_forward", _attention_forward)


@fake("attention_forward")
def _(q, k, v, scores, *rest):
    _refuse_gradients("attention_forward", q, k, v, scores)
    return _empty_attention(q, return_lse=rest[-2])


# ---- packed --------------------------------------------------------------------------------------

define(
    "attention_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor? scores, Tensor cu_seqlens_q,"
    f" Tensor cu_seqlens_k, {CONFIGURATION}, {ATTENTION}, bool return_lse, str backend)"
    " -> (Tensor out, Tensor lse)"
)


def run_packed(
    q,
    k,
    v,
    scores,
    cu_seqlens_q,
    cu_seqlens_k,
    num_selected,
    window,
    chunk_size,
    num_candidates,
    gate,
    sm_scale,
    return_lse,
    backend,
):
    """``(out, lse)``, lse None where it is not wanted."""
    if q.is_cuda:
        if backend == "reference":
            tensors = (q, k, v, scores, cu_seqlens_q, cu_seqlens_k)
            configuration = (num_selected, window, chunk_size, num_candidates)
            rest = (*configuration, gate, sm_scale, return_lse, backend)
            return on_host(run_packed, q.device, *tensors, *rest)
        if arguments.CHECK_VALUES_ON_CUDA:
            arguments.check_values(scores, None, k.shape[0])
            arguments.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    return _core.attention_varlen_forward(
        q,
        k,
        v,
        scores,
        cu_seqlens_q,
        cu_seqlens_k,
        num_selected,
        window,
        chunk_size,
        num_candidates,
        gate_code(gate),
        sm_scale,
        bool(return_lse),
        backend_code(backend),
    )


def _attention_varlen_forward(q, k, v, scores, cu_seqlens_q, cu_seqlens_k, *options):
    _refuse_gradients("attention_varlen_forward", q, k, v, scores)
    return _as_operator(q, run_packed(q, k, v, scores, cu_seqlens_q, cu_seqlens_k, *options))


implement("attention_varlen_forward", _attention_varlen_forward)


@fake("attention_varlen_forward")
def _(q, k, v, scores, *rest):
    _refuse_gradients("attention_varlen_forward", q, k, v, scores)
    return _empty_attention(q, return_lse=rest[-2])


# The implementations themselves refuse inputs that require grad. Falling through the autograd keys saves the few microseconds
# that a kernel there would cost.
for _name in ("attention_forward", "attention_varlen_forward"):
    for _key in ("AutogradCPU", "AutogradCUDA"):
        LIBRARY.impl(_name, torch.library.fallthrough_kernel, _key)
