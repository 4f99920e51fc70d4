"""The case table (cases/attend.csv) as Python objects, for tests and benchmarks."""

from __future__ import annotations

import csv
import functools
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TABLE = Path(__file__).resolve().parents[2] / "cases" / "attend.csv"


@dataclass(frozen=True)
class Case:
    """One row of the table; see cases/README.md for the columns."""

    name: str
    batch: int
    num_q_heads: int
    num_kv_heads: int
    seq_len_q: int
    seq_len_k: int
    head_dim: int
    num_selected: int
    window: int
    chunk_size: int
    num_candidates: int
    gate: str
    scores: str
    lengths: str
    layout: str

    def __str__(self) -> str:
        return self.name

    @property
    def resolved_num_candidates(self) -> int:
        """M as a number: the table's 0 is the default 4 k, -1 all keys."""
        if self.num_candidates == 0:
            return 4 * self.num_selected
        if self.num_candidates == -1:
            return max(self.num_selected, self.seq_len_k)
        return self.num_candidates

    @property
    def configuration(self) -> dict[str, int]:
        """The options of select."""
        return {
            "num_selected": self.num_selected,
            "window": self.window,
            "chunk_size": self.chunk_size,
            "num_candidates": self.resolved_num_candidates,
        }

    @property
    def options(self) -> dict:
        """The options of attention_forward."""
        return {**self.configuration, "gate": self.gate}

    @property
    def num_chunks(self) -> int:
        return -(-self.seq_len_k // self.chunk_size)


@dataclass(frozen=True, eq=False)
class Inputs:
    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hkv, Sk, D]
    v: Tensor  # [B, Hkv, Sk, D]
    scores: Tensor  # float32 [B, Hkv, Sk]
    lengths: Tensor | None  # int32 [B]

    def to(self, dtype: torch.dtype, device: torch.device | str, layout: str) -> Inputs:
        """q, k and v in another dtype (exactly: see make_inputs), everything on a device and in a layout."""
        q, k, v = (lay_out(t.to(device, dtype), layout) for t in (self.q, self.k, self.v))
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Inputs(q, k, v, lay_out(self.scores.to(device), layout), lengths)


@functools.cache
def load_cases() -> tuple[Case, ...]:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = {"name", "gate", "scores", "lengths", "layout"}
    return tuple(Case(**{c: x if c in text else int(x) for c, x in row.items()}) for row in rows)


def make_inputs(case: Case) -> Inputs:
    """Contiguous float64 q, k and v, float32 scores, on the CPU; the same ones at every call.

    The values of q, k and v are exact in float16, bfloat16 and float32, so that one expected result serves all.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().half().double()

    q = normal(case.batch, case.num_q_heads, case.seq_len_q, case.head_dim)
    k = normal(case.batch, case.num_kv_heads, case.seq_len_k, case.head_dim)
    v = normal(case.batch, case.num_kv_heads, case.seq_len_k, case.head_dim)
    shape = (case.batch, case.num_kv_heads, case.seq_len_k)
    return Inputs(q, k, v, make_scores(case.scores, shape, generator), make_lengths(case))


def make_scores(kind: str, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    seq_len = shape[2]
    noise = torch.randn(shape, generator=generator)
    position = torch.arange(seq_len, dtype=torch.float32).expand(shape)
    if kind == "normal":
        return noise
    if kind == "ties":
        negative_zero = torch.rand(shape, generator=generator) < 0.5
        rounded = (2 * noise).round() / 2 + 0.0
        return torch.where((rounded == 0) & negative_zero, -0.0, rounded)
    if kind == "equal":
        return torch.full(shape, 0.25)
    if kind == "huge":
        return noise * 300
    if kind == "tiny":
        return noise * 1e-3
    if kind == "ascending":
        return position * 0.01
    if kind == "descending":
        return position * -0.01
    if kind == "half_gap":
        return noise.argsort(dim=-1) * 0.5 - 0.25 * seq_len
    raise ValueError(f"scores: unknown kind {kind!r}")


def make_lengths(case: Case) -> Tensor | None:
    if case.lengths == "none":
        return None
    seq_len = case.seq_len_k
    values = [seq_len, 0, 1] + [max(1, seq_len - 1 - 37 * b) for b in range(3, case.batch)]
    return torch.tensor(values[: case.batch], dtype=torch.int32)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; ``tensor`` is [B, H, S] or [B, H, S, D]."""
    if layout == "bhsd":
        return tensor.contiguous()
    if layout == "bshd":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        if tensor.dim() == 3:
            buffer = tensor.new_full((*tensor.shape, 2), float("nan"))
            view = buffer[..., 1]
        else:
            # Gaps that keep rows aligned to 16 bytes, as slices of a fused qkv tensor have.
            batch, heads, seq_len, dim = tensor.shape
            buffer = tensor.new_full((batch + 1, heads + 1, seq_len + 3, dim + 8), float("nan"))
            view = buffer[1:, :heads, 2 : 2 + seq_len, :dim]
        view.copy_(tensor)
        return view
    raise ValueError(f"layout: unknown kind {layout!r}")


def poison(inputs: Inputs) -> Inputs:
    """NaN wherever a position does not exist because of lengths."""
    if inputs.lengths is None:
        return inputs
    seq_len_q, seq_len_k = inputs.q.shape[2], inputs.k.shape[2]
    positions = torch.arange(seq_len_k, device=inputs.k.device)
    missing = positions >= inputs.lengths[:, None, None]  # [B, 1, Sk]
    missing_q = missing[..., seq_len_k - seq_len_q :]
    nan = float("nan")
    return Inputs(
        inputs.q.masked_fill(missing_q[..., None], nan),
        inputs.k.masked_fill(missing[..., None], nan),
        inputs.v.masked_fill(missing[..., None], nan),
        inputs.scores.masked_fill(missing, nan),
        inputs.lengths,
    )
