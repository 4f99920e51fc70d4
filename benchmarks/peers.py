"""What BlackwellSparseK is compared with. A peer that cannot run here says why in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from configuration import Configuration, Inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from report import Row

_BLOCK = 128  # FlexAttention's block of queries and keys
_STRUCTURED_WINDOW = 512  # the window of the structured sparse peers: T2's peer, see the anchors


class UnavailableError(Exception):
    """The peer cannot run here; the message says why, and how to get it."""


@contextmanager
def refusal_in(row: Row) -> Iterator[None]:
    """A peer that refuses this shape or device must not end the benchmark: its row says why."""
    try:
        yield
    except UnavailableError as reason:
        row.unavailable = str(reason)
    except torch.OutOfMemoryError:
        row.unavailable = "out of device memory"
        torch.cuda.empty_cache()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        row.unavailable = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


@dataclass(frozen=True)
class Peer:
    """`prepare` makes the call to time, or raises UnavailableError; the call returns [B, H, Sq, D] or what
    `to_bhsd` makes that of. `dense` says that it computes full causal attention and is checked."""

    name: str
    prepare: Callable[[Configuration, Inputs], Callable[[], torch.Tensor]]
    dense: bool
    to_bhsd: Callable[[torch.Tensor], torch.Tensor] = lambda out: out


def transposed(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2)


def _repeated_heads(inputs: Inputs, configuration: Configuration) -> tuple[torch.Tensor, ...]:
    """k and v with as many heads as q, for libraries without grouped heads."""
    group = configuration.heads // configuration.kv_heads
    if group == 1:
        return inputs.k, inputs.v
    return tuple(t.repeat_interleave(group, dim=1) for t in (inputs.k, inputs.v))


def _bshd(inputs: Inputs, configuration: Configuration) -> tuple[torch.Tensor, ...]:
    """q, k, v as [B, S, H, D] in memory, KV heads repeated."""
    k, v = _repeated_heads(inputs, configuration)
    return tuple(t.transpose(1, 2).contiguous() for t in (inputs.q, k, v))


def _require_square(configuration: Configuration, name: str) -> None:
    if configuration.seq_len_q != configuration.seq_len:
        raise UnavailableError(f"{name} aligns its causal mask with the first keys; needs Sq = Sk")


def _prepare_sdpa(configuration: Configuration, inputs: Inputs) -> Callable[[], torch.Tensor]:
    gqa = configuration.heads != configuration.kv_heads
    if configuration.seq_len_q == configuration.seq_len:
        return lambda: F.scaled_dot_product_attention(
            inputs.q, inputs.k, inputs.v, is_causal=True, enable_gqa=gqa
        )
    # is_causal aligns with the first keys; ours, like decoding, with the last. That mask has no form
    # for grouped heads, so the KV heads are repeated beforehand.
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(configuration.seq_len_q, configuration.seq_len)
    k, v = _repeated_heads(inputs, configuration)
    return lambda: F.scaled_dot_product_attention(inputs.q, k, v, attn_mask=bias)


def _sdpa_backend(backend: SDPBackend):
    def prepare(configuration: Configuration, inputs: Inputs) -> Callable[[], torch.Tensor]:
        plain = _prepare_sdpa(configuration, inputs)

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return plain()

        return call

    return prepare


def _xformers_ops(configuration: Configuration):
    how = "pip install xformers, a build for this torch and CUDA"
    if not configuration.is_cuda:
        raise UnavailableError(f"its attention has GPU kernels only; on a GPU: {how}")
    try:
        import xformers.ops as xops
    except ImportError as error:
        raise UnavailableError(f"not importable ({error}); {how}") from error
    return xops


def _prepare_xformers(configuration: Configuration, inputs: Inputs) -> Callable[[], torch.Tensor]:
    xops = _xformers_ops(configuration)
    _require_square(configuration, "LowerTriangularMask")
    q, k, v = _bshd(inputs, configuration)
    mask = xops.LowerTriangularMask()
    return lambda: xops.memory_efficient_attention(q, k, v, attn_bias=mask)


def _prepare_xformers_local(
    configuration: Configuration, inputs: Inputs
) -> Callable[[], torch.Tensor]:
    xops = _xformers_ops(configuration)
    _require_square(configuration, "this mask")
    c = configuration
    # The local mask that has a backward is the one of packed sequences.
    mask = xops.fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(
        [c.seq_len] * c.batch, device=torch.device(c.device)
    ).make_local_attention(_STRUCTURED_WINDOW)
    q, k, v = (t.reshape(1, -1, c.heads, c.head_dim) for t in _bshd(inputs, configuration))
    shape = (c.batch, c.seq_len, c.heads, c.head_dim)
    return lambda: xops.memory_efficient_attention(q, k, v, attn_bias=mask).view(shape)


def blocks_of_budget(num_selected: int, window: int) -> int:
    """Blocks of keys before the diagonal one that hold as many keys as SparseK's budget k + w."""
    return math.ceil((num_selected + window) / _BLOCK)


def block_table(num_blocks: int, visible: int, generator: torch.Generator) -> torch.Tensor:
    """bool [num_blocks, num_blocks]: each query block sees itself and `visible` random earlier ones."""
    table = torch.eye(num_blocks, dtype=torch.bool)
    for row in range(1, num_blocks):
        table[row, torch.randperm(row, generator=generator)[:visible]] = True
    return table


def _flex(mask_of: Callable[[Configuration], Callable]):
    def prepare(configuration: Configuration, inputs: Inputs) -> Callable[[], torch.Tensor]:
        if not configuration.is_cuda:
            raise UnavailableError("compared on a GPU only")
        _require_square(configuration, "this mask")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        c = configuration
        mask = create_block_mask(
            mask_of(c), B=None, H=None, Q_LEN=c.seq_len_q, KV_LEN=c.seq_len, device=c.device
        )
        # A fresh compilation each time: sweeps would otherwise meet dynamic shapes after the first.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        gqa = c.heads != c.kv_heads
        return lambda: compiled(inputs.q, inputs.k, inputs.v, block_mask=mask, enable_gqa=gqa)

    return prepare


def _causal_mask(configuration: Configuration) -> Callable:
    return lambda b, h, q, kv: q >= kv


def _window_mask(configuration: Configuration) -> Callable:
    return lambda b, h, q, kv: (q >= kv) & (q - kv <= _STRUCTURED_WINDOW)


def _block_sparse_mask(configuration: Configuration) -> Callable:
    table = block_table(
        math.ceil(configuration.seq_len / _BLOCK),
        blocks_of_budget(configuration.num_selected, configuration.window),
        torch.Generator().manual_seed(0),
    ).to(configuration.device)
    return lambda b, h, q, kv: (q >= kv) & table[q // _BLOCK, kv // _BLOCK]


def _flash_attention_3(window: int | None):
    def prepare(configuration: Configuration, inputs: Inputs) -> Callable[[], torch.Tensor]:
        try:
            from flash_attn_interface import flash_attn_func
        except ImportError as error:
            raise UnavailableError(
                f"not importable ({error}); build flash-attention's hopper folder"
            ) from error
        if not configuration.is_cuda:
            raise UnavailableError("has GPU kernels only")
        q, k, v = (t.transpose(1, 2).contiguous() for t in (inputs.q, inputs.k, inputs.v))
        window_size = (-1, -1) if window is None else (window, 0)

        def call() -> torch.Tensor:
            out = flash_attn_func(q, k, v, causal=True, window_size=window_size)
            return out[0] if isinstance(out, tuple) else out

        return call

    return prepare


SDPA = Peer("PyTorch SDPA (dense floor)", _prepare_sdpa, dense=True)
XFORMERS = Peer("xFormers Sparse (structured)", _prepare_xformers, dense=True, to_bhsd=transposed)

XFORMERS_LOCAL = Peer(
    f"xFormers, local window {_STRUCTURED_WINDOW}",
    _prepare_xformers_local,
    dense=False,
    to_bhsd=transposed,
)
SDPA_FLASH = Peer(
    "SDPA, FlashAttention-2 back end", _sdpa_backend(SDPBackend.FLASH_ATTENTION), dense=True
)
SDPA_CUDNN = Peer("SDPA, cuDNN back end", _sdpa_backend(SDPBackend.CUDNN_ATTENTION), dense=True)
FLEX_CAUSAL = Peer("FlexAttention, causal", _flex(_causal_mask), dense=True)
FLEX_WINDOW = Peer(f"FlexAttention, window {_STRUCTURED_WINDOW}", _flex(_window_mask), dense=False)

# What --peers all adds.
FURTHER = (
    SDPA_FLASH,
    Peer(
        "SDPA, memory-efficient back end", _sdpa_backend(SDPBackend.EFFICIENT_ATTENTION), dense=True
    ),
    SDPA_CUDNN,
    FLEX_CAUSAL,
    FLEX_WINDOW,
    Peer("FlexAttention, block-sparse, same budget", _flex(_block_sparse_mask), dense=False),
    XFORMERS_LOCAL,
    Peer("FlashAttention-3, causal", _flash_attention_3(None), dense=True, to_bhsd=transposed),
    Peer(
        f"FlashAttention-3, window {_STRUCTURED_WINDOW}",
        _flash_attention_3(_STRUCTURED_WINDOW),
        dense=False,
        to_bhsd=transposed,
    ),
)
