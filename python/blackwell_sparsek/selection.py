"""Which keys each query sees, as data."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

DEFAULT_NUM_SELECTED = 256
DEFAULT_WINDOW = 128
DEFAULT_CHUNK_SIZE = 128


@dataclass(frozen=True)
class SelectionConfiguration:
    """How a selection was made. See :func:`blackwell_sparsek.select` for what the numbers mean."""

    num_selected: int = DEFAULT_NUM_SELECTED
    window: int = DEFAULT_WINDOW
    chunk_size: int = DEFAULT_CHUNK_SIZE
    num_candidates: int = 4 * DEFAULT_NUM_SELECTED


@dataclass(frozen=True, eq=False)
class Selection:
    """Which keys each query sees: key j is visible to the queries at positions ``j <= i < expiry[j]``.

    :func:`blackwell_sparsek.select` makes one. A foreign selection, from any other rule that evicts keys irrevocably, is
    ``Selection(expiry, max_keys_per_tile=None)``: it has no thresholds and therefore no gates.

    Attributes:
        expiry: int32 ``[B, Hkv, Sk]``, the first query position that no longer sees the key; Sk (or ``lengths[b]``) if none.
        max_keys_per_tile: foreign selections only: an upper bound on the keys that any 128 consecutive queries see besides
            the last 128 before them and themselves. With it the kernels skip the rest; without it they walk every tile of
            keys that has not wholly expired.
        threshold: float32 ``[B, Hkv, ceil(Sk / chunk_size)]``, the SPARSEK threshold of each chunk of queries (float64 where
            scores were); None if foreign. Not differentiable on its own: attention carries its gradient to the scores.
        last_candidate: int32 ``[B, Hkv, ceil(Sk / chunk_size)]``, the position of the last key that the threshold was
            computed from, -1 where that is the whole pool; None if foreign.
        configuration: how the selection was made; None if foreign.

    Example:
        >>> # Every key is visible to the 64 queries from its own position on: a sliding window.
        >>> expiry = torch.clamp(torch.arange(Sk) + 64, max=Sk).int().expand(B, Hkv, Sk).contiguous()
        >>> out = attention_forward(q, k, v, selection=Selection(expiry))
    """

    expiry: Tensor
    _: KW_ONLY
    max_keys_per_tile: int | None = None
    threshold: Tensor | None = None
    last_candidate: Tensor | None = None
    configuration: SelectionConfiguration | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether the selection was made by other means than ``select``."""
        return self.configuration is None
