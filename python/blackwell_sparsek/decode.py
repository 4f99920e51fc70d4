"""The operators of stage 5, decode: append tokens to state blocks and attend from them.

``state`` is a pool of blocks, uint8 ``[num_blocks, >= block_bytes]``; ``block_index`` (int32 ``[N]``) says
which block each sequence uses, ``continues`` (int32 ``[N]``, None: all do) is 0 where a sequence starts
afresh. Both are tensors, and so is everything that changes from step to step: a step reads nothing on
the host. :class:`blackwell_sparsek.SparseKCache` owns such a pool; a serving engine may own it instead
and call the operators, the packed ones for prompts and single steps in one batch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from blackwell_sparsek import _arguments as arguments
from blackwell_sparsek import _core
from blackwell_sparsek._arguments import (
    CUDA,
    DTYPE_CODES,
    call_on,
    checked_view,
    gate_code,
    name_of,
    query_on,
    view_of,
)
from blackwell_sparsek._library import ATTENTION, CONFIGURATION, LIBRARY, define, fake, implement

_STATE = "Tensor(a!) state, Tensor block_index, Tensor? continues"

_DIMENSIONS = {
    "q": ("N", "Hq", "S", "D"),
    "k": ("N", "Hkv", "S", "D"),
    "v": ("N", "Hkv", "S", "D"),
    "scores": ("N", "Hkv", "S"),
    "lengths": ("N",),
    "block_index": ("N",),
    "continues": ("N",),
}
_PACKED_DIMENSIONS = {
    **_DIMENSIONS,
    "q": ("total", "Hq", "D"),
    "k": ("total", "Hkv", "D"),
    "v": ("total", "Hkv", "D"),
    "scores": ("total", "Hkv"),
    "cu_seqlens": ("N + 1",),
}


@functools.lru_cache(maxsize=1024)
def state_layout(
    dtype: torch.dtype,
    num_kv_heads: int,
    head_dim: int,
    num_selected: int,
    window: int,
    chunk_size: int,
    num_candidates: int | None,
) -> dict[str, int]:
    """Sizes and offsets of a state block, in bytes (sparsek::DecodeStateLayout)."""
    if dtype not in DTYPE_CODES:
        raise ValueError(f"dtype: expected a floating-point dtype, got {name_of(dtype)}")
    return _core.decode_state_layout(
        DTYPE_CODES[dtype],
        num_kv_heads,
        head_dim,
        num_selected,
        window,
        chunk_size,
        num_candidates,
    )


def _pool_of(state: Tensor, block_bytes: int, device: torch.device) -> tuple[int, int, int]:
    if state.dtype != torch.uint8 or state.dim() != 2 or state.stride(1) != 1:
        raise ValueError(
            "state: expected uint8 [num_blocks, block_bytes] with a contiguous last dimension, got "
            f"{name_of(state.dtype)} {list(state.shape)} with strides {list(state.stride())}"
        )
    if state.device != device:
        raise ValueError(f"state: expected a tensor on {device} like k, got one on {state.device}")
    num_blocks, row_bytes = state.shape
    stride = state.stride(0) if num_blocks > 1 else row_bytes
    if row_bytes < block_bytes or stride < row_bytes:
        raise ValueError(
            f"state: expected blocks of at least {block_bytes} bytes, as dtype, shape and options "
            f"need, got shape {list(state.shape)} with strides {list(state.stride())}"
        )
    return state.data_ptr(), num_blocks, stride


def _views(device: torch.device, dimensions: dict, **tensors: Tensor | None) -> list:
    return [
        None if tensor is None else checked_view(tensor, name, device, dimensions)
        for name, tensor in tensors.items()
    ]


def _refuse_gradients(name: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(
            f"{name} has no backward: generate under torch.no_grad() or torch.inference_mode(); "
            "train with attention_forward"
        )


def _empty_attention(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """out like q; lse of q's shape without the last dimension, or empty where it is not wanted."""
    lse_shape = q.shape[:-1] if return_lse else (0,)
    return torch.empty_like(q), q.new_empty(lse_shape, dtype=torch.float32)


_workspace_bytes = functools.lru_cache(maxsize=1024)(_core.decode_workspace_bytes)


def _check_values(scores: Tensor, split: dict, block_index: Tensor, num_blocks: int) -> None:
    """What the core checks on the CPU alone; for CUDA with BLACKWELL_SPARSEK_CHECK=1."""
    if "cu_seqlens" in split:
        starts, total = split["cu_seqlens"], scores.shape[0]
        arguments.check_cu_seqlens(starts, starts, total, total)
        arguments.check_values(scores, None, total)
    else:
        arguments.check_values(scores, split["lengths"], scores.shape[2])
    blocks = block_index.tolist()
    if len(set(blocks)) < len(blocks) or not all(0 <= b < num_blocks for b in blocks):
        raise ValueError(
            f"block_index: expected a block of its own for each sequence, from 0 to {num_blocks - 1}, "
            f"got {blocks}"
        )


def _run(stage, dimensions, q, k, v, scores, split, state, block_index, continues, *options):
    """Calls a stage of the core; ``split`` is lengths or cu_seqlens by name, q None where nothing attends."""
    configuration, attention = options[:4], options[4:]
    device = k.device
    named = {"k": k, "v": v, "scores": scores, **split}
    if q is not None:
        named = {"q": q, **named}
    views = _views(device, dimensions, **named)
    blocks = _views(device, dimensions, block_index=block_index, continues=continues)
    layout = state_layout(k.dtype, k.shape[1], k.shape[-1], *configuration)
    pool = _pool_of(state, layout["block_bytes"], device)
    workspace = (0, 0)
    if device.type == "cuda":
        if arguments.CHECK_VALUES_ON_CUDA:
            _check_values(scores, split, block_index, pool[1])
        shape = (DTYPE_CODES[k.dtype], block_index.shape[0], k.shape[1], k.shape[-1])
        num_bytes = _workspace_bytes(query_on(CUDA, device.index, "auto"), *shape, *configuration)
        if num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            workspace = (buffer.data_ptr(), num_bytes)
    call = call_on(device, "auto", *workspace)
    stage(call, *views, pool, *blocks, *configuration, *attention)


# ---- dense ---------------------------------------------------------------------------------------

define(
    f"decode(Tensor q, Tensor k, Tensor v, Tensor scores, Tensor? lengths, {_STATE},"
    f" {CONFIGURATION}, {ATTENTION}, bool return_lse) -> (Tensor out, Tensor lse)"
)


def _decode(q, k, v, scores, lengths, state, block_index, continues, *options):
    _refuse_gradients("decode", q, k, v, scores)
    *configuration, gate, sm_scale, return_lse = options
    out, lse = _empty_attention(q, return_lse)
    attention = (gate_code(gate), sm_scale, view_of(out), view_of(lse) if return_lse else None)
    blocks = (state, block_index, continues)
    split = {"lengths": lengths}
    _run(_core.decode, _DIMENSIONS, q, k, v, scores, split, *blocks, *configuration, *attention)
    return out, lse


implement("decode", _decode)


@fake("decode")
def _(q, k, v, scores, *rest):
    _refuse_gradients("decode", q, k, v, scores)
    return _empty_attention(q, return_lse=rest[-1])


define(
    f"decode_append(Tensor k, Tensor v, Tensor scores, Tensor? lengths, {_STATE},"
    f" {CONFIGURATION}) -> ()"
)


def _decode_append(k, v, scores, lengths, *rest):
    _refuse_gradients("decode_append", k, v, scores)
    _run(_core.decode_append, _DIMENSIONS, None, k, v, scores, {"lengths": lengths}, *rest)


implement("decode_append", _decode_append)


@fake("decode_append")
def _(k, v, scores, *rest):
    _refuse_gradients("decode_append", k, v, scores)


# ---- packed --------------------------------------------------------------------------------------

define(
    f"decode_varlen(Tensor q, Tensor k, Tensor v, Tensor scores, Tensor cu_seqlens, {_STATE},"
    f" {CONFIGURATION}, {ATTENTION}, bool return_lse) -> (Tensor out, Tensor lse)"
)


def _decode_varlen(q, k, v, scores, cu_seqlens, state, block_index, continues, *options):
    _refuse_gradients("decode_varlen", q, k, v, scores)
    *configuration, gate, sm_scale, return_lse = options
    out, lse = _empty_attention(q, return_lse)
    attention = (gate_code(gate), sm_scale, view_of(out), view_of(lse) if return_lse else None)
    blocks = (state, block_index, continues)
    split = {"cu_seqlens": cu_seqlens}
    _run(
        _core.decode_varlen,
        _PACKED_DIMENSIONS,
        q,
        k,
        v,
        scores,
        split,
        *blocks,
        *configuration,
        *attention,
    )
    return out, lse


implement("decode_varlen", _decode_varlen)


@fake("decode_varlen")
def _(q, k, v, scores, *rest):
    _refuse_gradients("decode_varlen", q, k, v, scores)
    return _empty_attention(q, return_lse=rest[-1])


define(
    f"decode_append_varlen(Tensor k, Tensor v, Tensor scores, Tensor cu_seqlens, {_STATE},"
    f" {CONFIGURATION}) -> ()"
)


def _decode_append_varlen(k, v, scores, cu_seqlens, *rest):
    _refuse_gradients("decode_append_varlen", k, v, scores)
    split = {"cu_seqlens": cu_seqlens}
    _run(_core.decode_append_varlen, _PACKED_DIMENSIONS, None, k, v, scores, split, *rest)


implement("decode_append_varlen", _decode_append_varlen)


@fake("decode_append_varlen")
def _(k, v, scores, *rest):
    _refuse_gradients("decode_append_varlen", k, v, scores)


# The implementations themselves refuse inputs that require grad.
for _name in ("decode", "decode_append", "decode_varlen", "decode_append_varlen"):
    for _key in ("AutogradCPU", "AutogradCUDA"):
        LIBRARY.impl(_name, torch.library.fallthrough_kernel, _key)
