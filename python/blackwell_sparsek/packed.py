"""The stages' operators for packed sequences, where gradients are wanted.

Without gradients ``attention_varlen_forward`` takes the fused operator (fused.py). These are its stages as operators of
their own, so that the selection can be saved for the backward. Their derivatives are in ``autograd.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from blackwell_sparsek import _arguments as arguments
from blackwell_sparsek import _core
from blackwell_sparsek._arguments import (
    CUDA,
    PACKED_DIMENSIONS,
    call_on,
    check_chunk_size,
    checked_view,
    gate_code,
    query_on,
    view_of,
)
from blackwell_sparsek._library import (
    ATTENTION,
    CONFIGURATION,
    SELECTION,
    define,
    fake,
    implement,
    lse_dtype,
    on_host,
)

_select_workspace_bytes = functools.lru_cache(maxsize=4096)(_core.select_varlen_workspace_bytes)
_attend_workspace_bytes = functools.lru_cache(maxsize=4096)(_core.attend_varlen_workspace_bytes)
_attend_backward_workspace_bytes = functools.lru_cache(maxsize=4096)(
    _core.attend_backward_varlen_workspace_bytes
)
STARTS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"


def _view(tensor: Tensor, name: str, device: torch.device) -> tuple:
    return checked_view(tensor, name, device, PACKED_DIMENSIONS)


def _optional_view(tensor: Tensor | None, name: str, device: torch.device) -> tuple | None:
    return None if tensor is None else _view(tensor, name, device)


def _call_with_workspace(device: torch.device, backend: str, workspace_bytes, *problem):
    """``(call, buffer)``: on CUDA, with a workspace from torch's allocator."""
    if device.type != "cuda":
        return call_on(device, backend), None
    num_bytes = workspace_bytes(query_on(CUDA, device.index, backend), *problem)
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return call_on(device, backend, buffer.data_ptr(), num_bytes), buffer


def _is_reference_on_cuda(device: torch.device, backend: str) -> bool:
    return backend == "reference" and device.type == "cuda"


# ---- select --------------------------------------------------------------------------------------

define(
    f"select_varlen(Tensor scores, Tensor cu_seqlens_k, {CONFIGURATION}, str backend)"
    " -> (Tensor expiry, Tensor threshold, Tensor last_candidate)"
)


def _select_varlen(scores: Tensor, cu_seqlens_k: Tensor, *options):
    *configuration, backend = options
    device = scores.device
    if _is_reference_on_cuda(device, backend):
        return on_host(_select_varlen, device, scores, cu_seqlens_k, *options)
    scores_view = _view(scores, "scores", device)
    starts_view = _view(cu_seqlens_k, "cu_seqlens_k", device)
    if cu_seqlens_k.shape[0] == 0:
        raise ValueError("cu_seqlens_k: expected shape [N + 1], got [0]")
    if device.type == "cuda" and arguments.CHECK_VALUES_ON_CUDA:
        arguments.check_values(scores, None, scores.shape[0])
        arguments.check_cu_seqlens(cu_seqlens_k, cu_seqlens_k, scores.shape[0], scores.shape[0])
    selection = _empty_selection(scores, cu_seqlens_k, *configuration)
    problem = (cu_seqlens_k.shape[0] - 1, scores.shape[1], scores.shape[0], *configuration)
    call, _buffer = _call_with_workspace(device, backend, _select_workspace_bytes, *problem)
    views = (view_of(tensor) for tensor in selection)
    _core.select_varlen(call, scores_view, starts_view, *configuration, *views)
    return selection


implement("select_varlen", _select_varlen)


def _empty_selection(scores, cu_seqlens_k, num_selected, window, chunk_size, num_candidates):
    check_chunk_size(chunk_size)
    total, heads = scores.shape
    chunks = (heads, total // chunk_size + cu_seqlens_k.shape[0] - 1)
    return (
        scores.new_empty((heads, total), dtype=torch.int32),
        scores.new_empty(chunks),
        scores.new_empty(chunks, dtype=torch.int32),
    )


@fake("select_varlen")
def _(scores, cu_seqlens_k, *options):
    return _empty_selection(scores, cu_seqlens_k, *options[:4])


# ---- attend --------------------------------------------------------------------------------------

define(
    f"attend_varlen(Tensor q, Tensor k, Tensor v, Tensor? scores, {SELECTION}, {STARTS},"
    f" {CONFIGURATION}, {ATTENTION}, str backend) -> (Tensor out, Tensor lse)"
)


def _attend_varlen(
    q, k, v, scores, expiry, threshold, last_candidate, cu_seqlens_q, cu_seqlens_k, *options
):
    *configuration, gate, sm_scale, backend = options
    device = q.device
    if _is_reference_on_cuda(device, backend):
        tensors = (q, k, v, scores, expiry, threshold, last_candidate, cu_seqlens_q, cu_seqlens_k)
        return on_host(_attend_varlen, device, *tensors, *options)
    code = gate_code(gate)
    q_view = _view(q, "q", device)
    k_view = _view(k, "k", device)
    out, lse = _empty_attention(q)
    num_sequences = max(0, cu_seqlens_k.shape[0] - 1)
    problem = (q_view[1], num_sequences, tuple(q.shape), tuple(k.shape), *configuration, code)
    call, _buffer = _call_with_workspace(device, backend, _attend_workspace_bytes, *problem)
    _core.attend_varlen(
        call,
        q_view,
        k_view,
        _view(v, "v", device),
        _optional_view(scores, "scores", device),
        _view(expiry, "expiry", device),
        _optional_view(threshold, "threshold", device),
        _view(cu_seqlens_q, "cu_seqlens_q", device),
        _view(cu_seqlens_k, "cu_seqlens_k", device),
        *configuration,
        code,
        sm_scale,
        view_of(out),
        view_of(lse),
    )
    return out, lse


implement("attend_varlen", _attend_varlen)


def _empty_attention(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=lse_dtype(q.dtype))


@fake("attend_varlen")
def _(q, *rest):
    return _empty_attention(q)


# ---- attend_backward -----------------------------------------------------------------------------

define(
    f"attend_backward_varlen(Tensor q, Tensor k, Tensor v, Tensor? scores, {SELECTION}, {STARTS},"
    f" {CONFIGURATION}, {ATTENTION}, Tensor out, Tensor lse, Tensor dout, bool needs_dscores,"
    " str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dscores)"
)


def _attend_backward_varlen(
    q, k, v, scores, expiry, threshold, last_candidate, cu_seqlens_q, cu_seqlens_k, *rest
):
    *configuration, gate, sm_scale, out, lse, dout, needs_dscores, backend = rest
    device = q.device
    if _is_reference_on_cuda(device, backend):
        tensors = (q, k, v, scores, expiry, threshold, last_candidate, cu_seqlens_q, cu_seqlens_k)
        return on_host(_attend_backward_varlen, device, *tensors, *rest)
    if dout.stride(-1) != 1:  # an expanded gradient, as sum().backward() makes it
        dout = dout.contiguous()
    code = gate_code(gate)
    q_view = _view(q, "q", device)
    k_view = _view(k, "k", device)
    dq, dk, dv, dscores = _empty_gradients(q, k, v, scores, needs_dscores)
    num_sequences = max(0, cu_seqlens_k.shape[0] - 1)
    problem = (q_view[1], num_sequences, tuple(q.shape), tuple(k.shape), *configuration, code)
    call, _buffer = _call_with_workspace(
        device, backend, _attend_backward_workspace_bytes, *problem
    )
    _core.attend_backward_varlen(
        call,
        q_view,
        k_view,
        _view(v, "v", device),
        _optional_view(scores, "scores", device),
        _view(expiry, "expiry", device),
        _optional_view(threshold, "threshold", device),
        _optional_view(last_candidate, "last_candidate", device),
        _view(cu_seqlens_q, "cu_seqlens_q", device),
        _view(cu_seqlens_k, "cu_seqlens_k", device),
        *configuration,
        code,
        sm_scale,
        view_of(out),
        view_of(lse),
        view_of(dout),
        view_of(dq),
        view_of(dk),
        view_of(dv),
        view_of(dscores) if needs_dscores else None,
    )
    return dq, dk, dv, dscores


implement("attend_backward_varlen", _attend_backward_varlen)


def _empty_gradients(q, k, v, scores, needs_dscores):
    """Like q, k and v; dscores contiguous, or empty where it is not wanted."""
    dscores = scores.new_empty(scores.shape) if needs_dscores else q.new_empty((0,))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dscores


@fake("attend_backward_varlen")
def _(q, k, v, scores, *rest):
    return _empty_gradients(q, k, v, scores, needs_dscores=rest[-2])
