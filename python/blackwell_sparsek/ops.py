"""One torch operator per stage: key_norm_scores, select, attend and attend_backward.

Each has one implementation for CPU and CUDA tensors and a fake kernel for tracing; derivatives are in
``autograd.py``. No implementation waits for the device, except ``backend="reference"``, which copies
CUDA tensors to the host and back.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from blackwell_sparsek import _arguments as arguments
from blackwell_sparsek import _core
from blackwell_sparsek._arguments import (
    CUDA,
    call_on,
    check_chunk_size,
    checked_view,
    gate_code,
    optional_view,
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

# Workspace sizes depend on shapes and options alone: asked once, remembered.
_select_workspace_bytes = functools.lru_cache(maxsize=4096)(_core.select_workspace_bytes)
_attend_workspace_bytes = functools.lru_cache(maxsize=4096)(_core.attend_workspace_bytes)
_attend_backward_workspace_bytes = functools.lru_cache(maxsize=4096)(
    _core.attend_backward_workspace_bytes
)


def _call_with_workspace(device: torch.device, backend: str, workspace_bytes, *problem):
    """``(call, buffer)``: on CUDA, with a workspace from torch's allocator."""
    if device.type != "cuda":
        return call_on(device, backend), None
    num_bytes = workspace_bytes(query_on(CUDA, device.index, backend), *problem)
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return call_on(device, backend, buffer.data_ptr(), num_bytes), buffer


def _num_chunks(seq_len: int, chunk_size: int) -> int:
    return (seq_len + chunk_size - 1) // chunk_size


# ---- score ---------------------------------------------------------------------------------------

define("key_norm_scores(Tensor k, Tensor? lengths, str backend) -> Tensor")


def _key_norm_scores(k: Tensor, lengths: Tensor | None, backend: str) -> Tensor:
    device = k.device
    if backend == "reference" and device.type == "cuda":
        return on_host(_key_norm_scores, device, k, lengths, backend)
    k_view = checked_view(k, "k", device)
    lengths_view = optional_view(lengths, "lengths", device)
    scores = torch.empty(k.shape[:3], dtype=lse_dtype(k.dtype), device=device)
    _core.key_norm_scores(call_on(device, backend), k_view, lengths_view, view_of(scores))
    return scores


implement("key_norm_scores", _key_norm_scores)


@fake("key_norm_scores")
def _(k, lengths, backend):
    return k.new_empty(k.shape[:3], dtype=lse_dtype(k.dtype))


# ---- select --------------------------------------------------------------------------------------

define(
    f"select(Tensor scores, Tensor? lengths, {CONFIGURATION}, str backend)"
    " -> (Tensor expiry, Tensor threshold, Tensor last_candidate)"
)


def _select(scores: Tensor, lengths: Tensor | None, *options):
    *configuration, backend = options
    device = scores.device
    if backend == "reference" and device.type == "cuda":
        return on_host(_select, device, scores, lengths, *options)
    scores_view = checked_view(scores, "scores", device)
    lengths_view = optional_view(lengths, "lengths", device)
    if device.type == "cuda" and arguments.CHECK_VALUES_ON_CUDA:
        arguments.check_values(scores, lengths, scores.shape[2])
    expiry, threshold, last_candidate = _empty_selection(scores, *configuration)
    call, _buffer = _call_with_workspace(
        device, backend, _select_workspace_bytes, *scores.shape, *configuration
    )
    _core.select(
        call,
        scores_view,
        lengths_view,
        *configuration,
        view_of(expiry),
        view_of(threshold),
        view_of(last_candidate),
    )
    return expiry, threshold, last_candidate


implement("select", _select)


def _empty_selection(scores, num_selected, window, chunk_size, num_candidates):
    check_chunk_size(chunk_size)
    batch, heads, seq_len = scores.shape
    chunks = (batch, heads, _num_chunks(seq_len, chunk_size))
    return (
        scores.new_empty((batch, heads, seq_len), dtype=torch.int32),
        scores.new_empty(chunks),
        scores.new_empty(chunks, dtype=torch.int32),
    )


@fake("select")
def _(scores, lengths, *options):
    return _empty_selection(scores, *options[:4])


# ---- attend --------------------------------------------------------------------------------------

define(
    f"attend(Tensor q, Tensor k, Tensor v, Tensor? scores, {SELECTION}, Tensor? lengths,"
    f" {CONFIGURATION}, int? max_keys_per_tile, {ATTENTION}, bool return_lse, str backend)"
    " -> (Tensor out, Tensor lse)"
)


def _attend(q, k, v, scores, expiry, threshold, last_candidate, lengths, *options):
    *configuration, max_keys_per_tile, gate, sm_scale, return_lse, backend = options
    device = q.device
    if backend == "reference" and device.type == "cuda":
        selection = (expiry, threshold, last_candidate)
        return on_host(_attend, device, q, k, v, scores, *selection, lengths, *options)
    problem = (*configuration, threshold is None, max_keys_per_tile, gate_code(gate))
    q_view = checked_view(q, "q", device)
    k_view = checked_view(k, "k", device)
    v_view = checked_view(v, "v", device)
    scores_view = optional_view(scores, "scores", device)
    expiry_view = checked_view(expiry, "expiry", device)
    threshold_view = optional_view(threshold, "threshold", device)
    lengths_view = optional_view(lengths, "lengths", device)
    out, lse = _empty_attention(q, return_lse)
    call, _buffer = _call_with_workspace(
        device,
        backend,
        _attend_workspace_bytes,
        q_view[1],
        tuple(q.shape),
        tuple(k.shape),
        *problem,
    )
    _core.attend(
        call,
        q_view,
        k_view,
        v_view,
        scores_view,
        expiry_view,
        threshold_view,
        lengths_view,
        *problem,
        sm_scale,
        view_of(out),
        view_of(lse) if return_lse else None,
    )
    return out, lse


implement("attend", _attend)


def _empty_attention(q, return_lse):
    """out like q; lse ``[B, Hq, Sq]``, or empty where it is not wanted."""
    lse_shape = q.shape[:3] if return_lse else (0,)
    return torch.empty_like(q), q.new_empty(lse_shape, dtype=lse_dtype(q.dtype))


@fake("attend")
def _(q, k, v, scores, *rest):
    return _empty_attention(q, return_lse=rest[-2])


# ---- attend_backward -----------------------------------------------------------------------------

define(
    f"attend_backward(Tensor q, Tensor k, Tensor v, Tensor? scores, {SELECTION},"
    f" Tensor? lengths, {CONFIGURATION}, int? max_keys_per_tile, {ATTENTION}, Tensor out,"
    " Tensor lse, Tensor dout, bool needs_dscores, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dscores)"
)


def _attend_backward(q, k, v, scores, expiry, threshold, last_candidate, lengths, *rest):
    *configuration, max_keys_per_tile, gate, sm_scale, out, lse, dout = rest[:10]
    needs_dscores, backend = rest[10:]
    device = q.device
    if backend == "reference" and device.type == "cuda":
        selection = (expiry, threshold, last_candidate)
        return on_host(_attend_backward, device, q, k, v, scores, *selection, lengths, *rest)
    if dout.stride(-1) != 1:  # an expanded gradient, as sum().backward() makes it
        dout = dout.contiguous()
    problem = (*configuration, threshold is None, max_keys_per_tile, gate_code(gate))
    q_view = checked_view(q, "q", device)
    k_view = checked_view(k, "k", device)
    dq, dk, dv, dscores = _empty_gradients(q, k, v, scores, needs_dscores)
    call, _buffer = _call_with_workspace(
        device,
        backend,
        _attend_backward_workspace_bytes,
        q_view[1],
        tuple(q.shape),
        tuple(k.shape),
        *problem,
    )
    _core.attend_backward(
        call,
        q_view,
        k_view,
        checked_view(v, "v", device),
        optional_view(scores, "scores", device),
        checked_view(expiry, "expiry", device),
        optional_view(threshold, "threshold", device),
        optional_view(last_candidate, "last_candidate", device),
        optional_view(lengths, "lengths", device),
        *problem,
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


implement("attend_backward", _attend_backward)


def _empty_gradients(q, k, v, scores, needs_dscores):
    """Like q, k and v; dscores contiguous, or empty where it is not wanted."""
    dscores = scores.new_empty(scores.shape) if needs_dscores else q.new_empty((0,))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dscores


@fake("attend_backward")
def _(q, k, v, scores, *rest):
    return _empty_gradients(q, k, v, scores, needs_dscores=rest[-2])
