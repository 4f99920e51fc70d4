"""SparseK attention as one dense formula in torch's own operators: masks, sorting, bisection, autograd.

Written from the mathematics (README, docs), sharing nothing with the library: what the float64 reference
is held against, and the yardstick of what a dtype can do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Scores that are closer than this to a threshold, or to a threshold + 1, count as equal to it.
BOUNDARY = 1e-9


@dataclass(frozen=True, eq=False)
class DenseSelection:
    """For chunk c and key j of each (batch, KV head); all [B, Hkv, num_chunks, Sk] but threshold."""

    selected: Tensor  # j is one of the first-ranked num_selected of the pool
    candidate: Tensor  # j is one of the first-ranked num_candidates of the pool
    pool: Tensor  # j is in the pool
    threshold: Tensor  # float64 [B, Hkv, num_chunks]
    rank: Tensor  # int64 [B, Hkv, Sk]: the key's rank among all keys, 0 first
    chunk_size: int
    window: int


def existing(lengths: Tensor | None, batch: int, seq_len: int) -> Tensor:
    """bool [B, 1, Sk]: the position exists."""
    positions = torch.arange(seq_len)
    if lengths is None:
        return torch.ones(batch, 1, seq_len, dtype=torch.bool)
    return positions < lengths[:, None, None]


def window_begin(chunk: Tensor, chunk_size: int, window: int) -> Tensor:
    """b_c."""
    return (chunk * chunk_size - window).clamp(min=0)


def dense_selection(
    scores: Tensor,
    lengths: Tensor | None,
    num_selected: int,
    window: int,
    chunk_size: int,
    num_candidates: int,
) -> DenseSelection:
    batch, heads, seq_len = scores.shape
    exists = existing(lengths, batch, seq_len)
    # A position that does not exist may hold NaN; it is in no pool, so any score does.
    u = torch.where(exists, scores.detach().double(), 0.0)
    order = (-u).argsort(dim=-1, stable=True)  # stable: of equal scores the smaller position first
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(seq_len).expand_as(order).contiguous()
    )
    chunks = torch.arange(-(-seq_len // chunk_size))
    begin = window_begin(chunks, chunk_size, window)
    pool = (torch.arange(seq_len) < begin[:, None]) & exists[:, :, None, :]
    pool = pool.expand(batch, heads, len(chunks), seq_len)
    # How many of the pool rank no later than the key: a running count in ranked order, put back in place.
    by_rank = order[:, :, None, :].expand_as(pool)
    count = pool.gather(-1, by_rank).cumsum(dim=-1, dtype=torch.int32)
    place = torch.empty_like(count).scatter_(-1, by_rank, count)
    selected = pool & (place <= num_selected)
    candidate = pool & (place <= num_candidates)
    # A chunk that starts beyond the sequence still has a pool here; nobody reads what follows from it.
    threshold = _threshold(u, pool, candidate, num_selected, num_candidates)
    return DenseSelection(selected, candidate, pool, threshold, rank, chunk_size, window)


def _threshold(u, pool, candidate, num_selected, num_candidates) -> Tensor:
    """sup{t : sum over candidates of clip(u - t, 0, 1) >= k}, by bisection."""
    pool_size = pool.sum(dim=-1)
    infinity = float("inf")
    if num_selected == 0:
        return torch.where(pool_size > 0, infinity, -infinity).double()
    values = torch.where(candidate, u[:, :, None, :].expand_as(candidate), -infinity)
    values = values.sort(dim=-1, descending=True).values[..., :num_candidates]
    if values.shape[-1] < num_selected:  # no pool has as many keys
        return torch.full(pool_size.shape, -infinity, dtype=torch.float64)
    kth = values[..., num_selected - 1]
    infinite = pool_size <= num_selected
    high = torch.where(infinite, 0.0, kth)
    low = high - 1
    for _ in range(60):
        middle = (low + high) / 2
        total = (values - middle[..., None]).clamp(0, 1).sum(dim=-1)
        reaches = total >= num_selected - 1e-12
        low, high = torch.where(reaches, middle, low), torch.where(reaches, high, middle)
    return torch.where(infinite, -infinity, low)


def expiry_of(selection: DenseSelection, lengths: Tensor | None) -> Tensor:
    """The first query position that no longer sees the key, by looking at all of them."""
    batch, heads, num_chunks, seq_len = selection.selected.shape
    end = torch.full((batch, 1, 1), seq_len) if lengths is None else lengths[:, None, None].long()
    first_query = torch.arange(num_chunks) * selection.chunk_size
    begins = first_query < end  # [B, 1, num_chunks]
    dropped = selection.pool & ~selection.selected & begins[..., None]
    first_drop = torch.where(dropped, first_query[:, None], seq_len).amin(dim=2)
    expiry = torch.minimum(first_drop, end.expand_as(first_drop))
    positions = torch.arange(seq_len).expand(batch, heads, seq_len)
    return torch.where(positions < end, expiry, positions).int()


def last_candidate_of(selection: DenseSelection) -> Tensor:
    """The position of the last-ranked candidate; -1 where the candidates are the whole pool (or none)."""
    rank = selection.rank[:, :, None, :].expand_as(selection.candidate)
    last = torch.where(selection.candidate, rank, -1).argmax(dim=-1)
    everything = (selection.candidate == selection.pool).all(dim=-1)
    none = ~selection.candidate.any(dim=-1)
    return torch.where(everything | none, -1, last).int()


def gates(scores: Tensor, selection: DenseSelection, num_selected: int) -> Tensor:
    """clip(u_j - tau_c, 0, 1), [B, Hkv, num_chunks, Sk], differentiable in the scores.

    tau_c depends on the scores through the candidates strictly between tau_c and tau_c + 1, of which it is
    (their sum + how many candidates are above - k) / their number.
    """
    u = scores.double()[:, :, None, :]
    tau = selection.threshold[..., None]
    finite = torch.isfinite(tau)
    level = torch.where(finite, tau, 0.0)
    distance = torch.where(finite, u.detach() - level, 0.5)
    inside = selection.candidate & finite & (distance > BOUNDARY) & (distance < 1 - BOUNDARY)
    above = selection.candidate & finite & (distance >= 1 - BOUNDARY)
    number = inside.sum(dim=-1, keepdim=True)
    total = torch.where(inside, u, 0.0).sum(dim=-1, keepdim=True)
    solved = (total + above.sum(dim=-1, keepdim=True) - num_selected) / number.clamp(min=1)
    level = torch.where(number > 0, solved, level)
    gate = torch.where(inside, u - level, (distance >= 1 - BOUNDARY).double())
    return torch.where(finite, gate, (tau < 0).double())


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    lengths: Tensor | None,
    selection: DenseSelection,
    num_selected: int,
    gate: str,
    sm_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse in the dtype of q, one (batch, head) at a time to keep memory small."""
    batch, num_q_heads, seq_len_q, head_dim = q.shape
    num_kv_heads, seq_len = k.shape[1:3]
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    position = torch.arange(seq_len - seq_len_q, seq_len)
    chunk = position // selection.chunk_size
    keys = torch.arange(seq_len)
    begin = window_begin(chunk, selection.chunk_size, selection.window)
    in_window = (keys >= begin[:, None]) & (keys <= position[:, None])
    all_gates = None if gate == "none" else gates(scores, selection, num_selected)
    outs, lses = [], []
    for b in range(batch):
        length = seq_len if lengths is None else int(lengths[b])
        exists = (keys < length) & (position < length)[:, None]
        for h in range(num_q_heads):
            g = h // (num_q_heads // num_kv_heads)
            chosen = selection.selected[b, g, chunk]
            visible = (in_window | chosen) & exists
            if all_gates is None:
                m = visible.to(q.dtype)
            else:
                m = torch.where(chosen, all_gates[b, g, chunk], 1.0).to(q.dtype)
                m = torch.where(visible, m, 0.0)
            # Keys that do not exist may hold NaN.
            key = torch.where((keys < length)[:, None], k[b, g], 0.0)
            value = torch.where((keys < length)[:, None], v[b, g], 0.0)
            query = torch.where((position < length)[:, None], q[b, h], 0.0)
            s = torch.where(visible, scale * (query @ key.T), -torch.inf)
            top = s.detach().amax(dim=-1, keepdim=True)
            weight = torch.exp(s - torch.where(torch.isfinite(top), top, 0.0))
            if gate == "softmax":
                weight = weight * m
            total = weight.sum(dim=-1, keepdim=True)
            p = weight / torch.where(total > 0, total, 1.0)
            if gate == "value":
                p = p * m
            outs.append(p @ value)
            lses.append((torch.log(total.detach()) + top)[:, 0])
    shape = (batch, num_q_heads, seq_len_q)
    return torch.stack(outs).reshape(*shape, head_dim), torch.stack(lses).reshape(shape)
