"""Fused operators for inference: score, select and attend in one call, dense and packed.

One operator call instead of three, and one buffer for everything that lives between the stages, keeps
the host's share of a call below 25 us. They have no derivatives: where gradients are wanted
``attention_forward`` composes the stages' operators instead.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from blackwell_sparsek import _arguments as arguments
from blackwell_sparsek import _core
from blackwell_sparsek._arguments import (
    CPU,
    CUDA,
    DTYPE_CODES,
    PACKED_DIMENSIONS,
    align,
    call_on,
    check_chunk_size,
    checked_view,
    gate_code,
    name_of,
    optional_view,
    query_on,
    view_of,
)
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

_FLOAT32 = DTYPE_CODES[torch.float32]
_FLOAT64 = DTYPE_CODES[torch.float64]
_INT32 = DTYPE_CODES[torch.int32]


class _Layout(NamedTuple):
    """The one buffer of a fused call: [scores | expiry | threshold | the stages' workspace].

    Shapes and strides are those of contiguous tensors; offsets count bytes. last_candidate is left
    out: only a backward reads it.
    """

    scores: tuple[int, tuple, tuple]  # dtype, shape, strides
    expiry: tuple[int, tuple, tuple]
    threshold: tuple[int, tuple, tuple]
    expiry_offset: int
    threshold_offset: int
    workspace_offset: int
    workspace_bytes: int


def _contiguous(dtype: int, *shape: int) -> tuple[int, tuple, tuple]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return dtype, shape, tuple(reversed(strides))


def _make_layout(scores, expiry, threshold, makes_scores: bool, workspace_bytes: int) -> _Layout:
    def num_bytes(tensor) -> int:
        dtype, shape, _ = tensor
        size = 8 if dtype == _FLOAT64 else 4
        for extent in shape:
            size *= extent
        return align(size)

    expiry_offset = num_bytes(scores) if makes_scores else 0
    threshold_offset = expiry_offset + num_bytes(expiry)
    workspace_offset = threshold_offset + num_bytes(threshold)
    offsets = (expiry_offset, threshold_offset, workspace_offset)
    return _Layout(scores, expiry, threshold, *offsets, workspace_bytes)


# `dtype` is q's; scores and thresholds are float32, or float64 where q is.
@functools.lru_cache(maxsize=4096)
def _dense_layout(device, backend, dtype, q_shape, k_shape, configuration, gate, makes_scores):
    batch, heads, seq_len, _ = k_shape
    chunk_size = configuration[2]
    check_chunk_size(chunk_size)
    # Asking for sizes also checks shapes, dtypes and options against each other, before any stage has run.
    query = query_on(*device, backend)
    workspace_bytes = max(
        _core.attend_workspace_bytes(
            query, dtype, q_shape, k_shape, *configuration, False, None, gate
        ),
        _core.select_workspace_bytes(query, batch, heads, seq_len, *configuration),
    )
    score_dtype = _FLOAT64 if dtype == _FLOAT64 else _FLOAT32
    num_chunks = (seq_len + chunk_size - 1) // chunk_size
    return _make_layout(
        _contiguous(score_dtype, batch, heads, seq_len),
        _contiguous(_INT32, batch, heads, seq_len),
        _contiguous(score_dtype, batch, heads, num_chunks),
        makes_scores,
        workspace_bytes,
    )


@functools.lru_cache(maxsize=4096)
def _packed_layout(
    device, backend, dtype, num_sequences, q_shape, k_shape, configuration, gate, makes_scores
):
    total_k, heads, _ = k_shape
    chunk_size = configuration[2]
    check_chunk_size(chunk_size)
    query = query_on(*device, backend)
    workspace_bytes = max(
        _core.attend_varlen_workspace_bytes(
            query, dtype, num_sequences, q_shape, k_shape, *configuration, gate
        ),
        _core.select_varlen_workspace_bytes(query, num_sequences, heads, total_k, *configuration),
    )
    score_dtype = _FLOAT64 if dtype == _FLOAT64 else _FLOAT32
    return _make_layout(
        _contiguous(score_dtype, total_k, heads),
        _contiguous(_INT32, heads, total_k),
        _contiguous(score_dtype, heads, total_k // chunk_size + num_sequences),
        makes_scores,
        workspace_bytes,
    )


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"torch.ops.blackwell_sparsek.{name} has no backward: call blackwell_sparsek.{name}, "
            "which uses differentiable operators where gradients are wanted, or work under "
            "torch.no_grad()"
        )


def _check_scores(scores: Tensor, view: tuple, expected: tuple) -> None:
    """ValueError unless scores have the dtype and the shape that go with q and k."""
    if view[1] != expected[0]:
        expected_name = "float64, as q" if expected[0] == _FLOAT64 else "float32"
        raise ValueError(f"scores: expected dtype {expected_name}, got {name_of(scores.dtype)}")
    if view[2] != expected[1]:
        raise ValueError(
            f"scores: expected shape {list(expected[1])}, as k, got {list(scores.shape)}"
        )


def _empty_attention(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """out like q; lse of q's shape without the last dimension, or empty where it is not wanted."""
    lse_shape = q.shape[:-1] if return_lse else (0,)
    return torch.empty_like(q), q.new_empty(lse_shape, dtype=lse_dtype(q.dtype))


# ---- dense ---------------------------------------------------------------------------------------

define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? scores, Tensor? lengths,"
    f" {CONFIGURATION}, {ATTENTION}, bool return_lse, str backend) -> (Tensor out, Tensor lse)"
)


def _attention_forward(q, k, v, scores, lengths, *options):
    _refuse_gradients("attention_forward", q, k, v, scores)
    *configuration, gate, sm_scale, return_lse, backend = options
    device = q.device
    device_key = (CPU, 0)
    if device.type == "cuda":
        device_key = (CUDA, device.index)
        if backend == "reference":
            return on_host(_attention_forward, device, q, k, v, scores, lengths, *options)
        if arguments.CHECK_VALUES_ON_CUDA:
            arguments.check_values(scores, lengths, k.shape[2])
    code = gate_code(gate)
    q_view = checked_view(q, "q", device)
    k_view = checked_view(k, "k", device)
    v_view = checked_view(v, "v", device)
    lengths_view = optional_view(lengths, "lengths", device)
    layout = _dense_layout(
        device_key,
        backend,
        q_view[1],
        q_view[2],
        k_view[2],
        tuple(configuration),
        code,
        scores is None,
    )
    workspace_bytes = layout.workspace_bytes
    buffer = torch.empty(
        layout.workspace_offset + workspace_bytes, dtype=torch.uint8, device=device
    )
    address = buffer.data_ptr()
    call = call_on(device, backend, address + layout.workspace_offset, workspace_bytes)

    if scores is None:
        scores_view = (address, *layout.scores)
        _core.key_norm_scores(call, k_view, lengths_view, scores_view)
    else:
        scores_view = checked_view(scores, "scores", device)
        _check_scores(scores, scores_view, layout.scores)
    expiry_view = (address + layout.expiry_offset, *layout.expiry)
    threshold_view = (address + layout.threshold_offset, *layout.threshold)
    _core.select(call, scores_view, lengths_view, *configuration, expiry_view, threshold_view, None)
    out, lse = _empty_attention(q, return_lse)
    _core.attend(
        call,
        q_view,
        k_view,
        v_view,
        scores_view,
        expiry_view,
        threshold_view,
        lengths_view,
        *configuration,
        False,
        None,
        code,
        sm_scale,
        view_of(out),
        view_of(lse) if return_lse else None,
    )
    return out, lse


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


def _attention_varlen_forward(q, k, v, scores, cu_seqlens_q, cu_seqlens_k, *options):
    _refuse_gradients("attention_varlen_forward", q, k, v, scores)
    *configuration, gate, sm_scale, return_lse, backend = options
    device = q.device
    device_key = (CPU, 0)
    if device.type == "cuda":
        device_key = (CUDA, device.index)
        if backend == "reference":
            tensors = (q, k, v, scores, cu_seqlens_q, cu_seqlens_k)
            return on_host(_attention_varlen_forward, device, *tensors, *options)
    code = gate_code(gate)
    q_view = checked_view(q, "q", device, PACKED_DIMENSIONS)
    k_view = checked_view(k, "k", device, PACKED_DIMENSIONS)
    v_view = checked_view(v, "v", device, PACKED_DIMENSIONS)
    starts_q_view = checked_view(cu_seqlens_q, "cu_seqlens_q", device, PACKED_DIMENSIONS)
    starts_k_view = checked_view(cu_seqlens_k, "cu_seqlens_k", device, PACKED_DIMENSIONS)
    for name, starts in (("q", cu_seqlens_q), ("k", cu_seqlens_k)):
        if starts.shape[0] == 0 or starts.shape[0] != cu_seqlens_q.shape[0]:
            raise ValueError(
                f"cu_seqlens_{name}: expected shape [N + 1], the same for queries and keys, got "
                f"{list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
            )
    if device.type == "cuda" and arguments.CHECK_VALUES_ON_CUDA:
        arguments.check_values(scores, None, k.shape[0])
        arguments.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    layout = _packed_layout(
        device_key,
        backend,
        q_view[1],
        cu_seqlens_k.shape[0] - 1,
        q_view[2],
        k_view[2],
        tuple(configuration),
        code,
        scores is None,
    )
    workspace_bytes = layout.workspace_bytes
    buffer = torch.empty(
        layout.workspace_offset + workspace_bytes, dtype=torch.uint8, device=device
    )
    address = buffer.data_ptr()
    call = call_on(device, backend, address + layout.workspace_offset, workspace_bytes)

    if scores is None:
        scores_view = (address, *layout.scores)
        _core.key_norm_scores_varlen(call, k_view, scores_view)
    else:
        scores_view = checked_view(scores, "scores", device, PACKED_DIMENSIONS)
        _check_scores(scores, scores_view, layout.scores)
    expiry_view = (address + layout.expiry_offset, *layout.expiry)
    threshold_view = (address + layout.threshold_offset, *layout.threshold)
    _core.select_varlen(
        call, scores_view, starts_k_view, *configuration, expiry_view, threshold_view, None
    )
    out, lse = _empty_attention(q, return_lse)
    _core.attend_varlen(
        call,
        q_view,
        k_view,
        v_view,
        scores_view,
        expiry_view,
        threshold_view,
        starts_q_view,
        starts_k_view,
        *configuration,
        code,
        sm_scale,
        view_of(out),
        view_of(lse) if return_lse else None,
    )
    return out, lse


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
