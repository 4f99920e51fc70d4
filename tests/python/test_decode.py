"""Decode: prefill and steps reproduce the rows of the one-shot forward, in constant memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import blackwell_sparsek as bs
import pytest
import torch
from blackwell_sparsek.decode import state_layout
from case_table import make_scores
from conftest import assert_out_close
from torch import Tensor

OPS = torch.ops.blackwell_sparsek


@dataclass(frozen=True)
class Sequences:
    """A batch of whole sequences, in float64 values that every dtype represents, and what the options make of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    options: dict
    gate: str
    expected: Tensor
    lse: Tensor
    selection: bs.Selection

    @property
    def seq_len(self) -> int:
        return self.k.shape[2]

    def tokens(self, begin: int, end: int, dtype=torch.float32) -> tuple[Tensor, ...]:
        """q, k, v and scores of tokens begin … end - 1."""
        q, k, v = (t[:, :, begin:end].to(dtype) for t in (self.q, self.k, self.v))
        return q, k, v, self.scores[:, :, begin:end]


def make_sequences(
    batch=2, heads=4, kv_heads=2, seq_len=300, head_dim=16, kind="normal", gate="softmax", **options
) -> Sequences:
    generator = torch.Generator().manual_seed(seq_len * 31 + head_dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().half().double()

    q = normal(batch, heads, seq_len, head_dim)
    k, v = (normal(batch, kv_heads, seq_len, head_dim) for _ in range(2))
    scores = make_scores(kind, (batch, kv_heads, seq_len), generator)
    double = scores.double()
    selection = bs.select(double, **options, backend="reference")
    expected, lse = bs.attention_forward(
        q, k, v, double, selection=selection, gate=gate, return_lse=True, backend="reference"
    )
    return Sequences(q, k, v, scores, options, gate, expected, lse, selection)


def make_cache(sequences: Sequences, dtype=torch.float32) -> bs.SparseKCache:
    batch, kv_heads, _, head_dim = sequences.k.shape
    return bs.SparseKCache(
        batch, kv_heads, head_dim, **sequences.options, gate=sequences.gate, dtype=dtype
    )


def layout_of(cache: bs.SparseKCache) -> dict[str, int]:
    options = (cache.num_selected, cache.window, cache.chunk_size, cache.num_candidates)
    return state_layout(cache.dtype, cache.num_kv_heads, cache.head_dim, *options)


def head_bytes_of(cache: bs.SparseKCache, b: int, h: int) -> Tensor:
    layout = layout_of(cache)
    return cache.state[b, h * layout["head_bytes"] : (h + 1) * layout["head_bytes"]]


def assert_state(cache: bs.SparseKCache, sequences: Sequences, num_tokens: list[int]) -> None:
    """The selected positions are exactly those of select, and the threshold to the last bit but one."""
    layout = layout_of(cache)
    k, window, chunk_size = cache.num_selected, cache.window, cache.chunk_size
    assert cache.num_tokens.tolist() == num_tokens
    for b, h in itertools.product(range(cache.batch_size), range(cache.num_kv_heads)):
        if num_tokens[b] == 0:
            continue
        head = head_bytes_of(cache, b, h)
        chunk = (num_tokens[b] - 1) // chunk_size
        pool_end = max(0, chunk * chunk_size - window)
        begin = layout["positions_offset"]
        positions = head[begin : begin + 4 * k].view(torch.int32)[: min(k, pool_end)]
        alive = sequences.selection.expiry[b, h, :pool_end] > num_tokens[b] - 1
        assert sorted(positions.tolist()) == alive.nonzero()[:, 0].tolist()
        threshold = head[8:12].view(torch.float32)
        # The reference's thresholds are float64; as float32 they round down.
        expected = sequences.selection.threshold[b, h, chunk]
        torch.testing.assert_close(threshold[0].double(), expected, rtol=2e-7, atol=2e-7)


def run_pieces(sequences, cache, pieces, dtype=torch.float32, steps_from=0) -> Tensor:
    """Feeds the sequences in pieces: ("prefill" | "step", tokens). Returns the rows of the steps, NaN elsewhere."""
    out = torch.full(sequences.q.shape, float("nan"), dtype=dtype)
    begin = 0
    for kind, count in pieces:
        q, k, v, scores = sequences.tokens(begin, begin + count, dtype)
        if kind == "prefill":
            cache.prefill(k, v, scores)
        else:
            out[:, :, begin : begin + count] = cache.step(q, k, v, scores)
        begin += count
    return out


def assert_rows(out: Tensor, sequences: Sequences, dtype=torch.float32) -> None:
    """Every row that was computed equals the one-shot forward's."""
    seen = ~out[0, 0, :, 0].isnan()
    expected = sequences.expected[:, :, seen]
    plain = None
    if dtype != torch.float32:
        # The same rows by the CPU's one-shot forward at that dtype: the error to compare with.
        q, k, v, scores = sequences.tokens(0, sequences.seq_len, dtype)
        plain = bs.attention_forward(q, k, v, scores, **sequences.options, gate=sequences.gate)
        plain = plain[:, :, seen].double()
    assert_out_close(out[:, :, seen], expected, plain, gate_error=4e-6)


def steps(count: int, size: int = 1) -> list[tuple[str, int]]:
    return [("step", size)] * (count // size) + ([("step", count % size)] if count % size else [])


@pytest.mark.parametrize("gate", ["softmax", "value", "none"])
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
@pytest.mark.parametrize("window", [0, 1, 100])
@pytest.mark.parametrize("num_selected", [0, 1, 64])
def test_steps_equal_one_shot(gate, chunk_size, window, num_selected):
    sequences = make_sequences(
        gate=gate,
        chunk_size=chunk_size,
        window=window,
        num_selected=num_selected,
        num_candidates=None,
    )
    cache = make_cache(sequences)
    out = run_pieces(sequences, cache, [("prefill", 37), *steps(263)])
    assert_rows(out, sequences)
    assert_state(cache, sequences, [300, 300])
