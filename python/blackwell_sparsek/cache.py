"""The cache of generation: what a sequence needs from its past, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor

from blackwell_sparsek._arguments import gate_code, name_of
from blackwell_sparsek.capability import capability
from blackwell_sparsek.decode import state_layout
from blackwell_sparsek.selection import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_NUM_SELECTED,
    DEFAULT_WINDOW,
)

_OPS = torch.ops.blackwell_sparsek


class SparseKCache:
    """Keys and values for generation with SparseK attention, in memory that does not grow.

    Per sequence and KV head the cache holds ``num_selected + window + chunk_size`` rows of k and v with their scores,
    and ``num_candidates`` scores for the threshold, however long the sequence gets. A key that is evicted is never
    needed again, so prefill and steps give exactly the rows of one :func:`attention_forward` over the whole sequence
    with the same options.

    On CUDA nothing waits for the device: the counters lie in the state, so a step may be captured in a CUDA graph and
    replayed for ever, its q, k, v and scores at fixed addresses.

    Each row of the batch is a sequence of its own length, with its own position and chunk borders. ``prefill`` and
    ``step`` may alternate. Nothing here is differentiable: generate under ``torch.no_grad()``.

    Args:
        batch_size, num_kv_heads, head_dim: of k and v.
        num_selected, window, chunk_size, num_candidates, gate, sm_scale: as :func:`attention_forward` takes them.
        dtype: of q, k and v: float16, bfloat16 or, on the CPU, float32. None: torch's default dtype.
        device: cpu or cuda. None: the CPU.

    Attributes:
        state: uint8 ``[batch_size, bytes of a block]``, everything that changes; fixed in place and size.
        num_bytes: how much memory that is.

    Raises:
        ValueError: a wrong option, shape, dtype, device or value (values on CUDA: with ``BLACKWELL_SPARSEK_CHECK=1``).
            The cache is unchanged then.
        NotImplementedError: a device or dtype that is not served.

    Example:
        >>> cache = SparseKCache(1, 8, 64, num_selected=256, window=128, dtype=torch.float32)
        >>> cache.prefill(k, v, scores)  # the prompt: k, v [1, 8, S, 64], scores [1, 8, S]
        >>> out = cache.step(q_new, k_new, v_new, scores_new)  # q_new [1, 32, 1, 64]
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_selected: int = DEFAULT_NUM_SELECTED,
        window: int = DEFAULT_WINDOW,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        num_candidates: int | None = None,
        gate: str = "softmax",
        sm_scale: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 0:
            raise ValueError(f"batch_size: expected a number >= 0, got {batch_size}")
        gate_code(gate)  # raises where it is none
        self.batch_size = batch_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.gate = gate
        self.sm_scale = sm_scale
        self.dtype = dtype or torch.get_default_dtype()
        self.device = torch.device(device or "cpu")
        options = (num_selected, window, chunk_size, num_candidates)
        layout = state_layout(self.dtype, num_kv_heads, head_dim, *options)
        if self.device.type != "cpu":
            self._require_kernel(*options)
            if self.device.index is None:  # tensors name theirs
                self.device = torch.device(self.device.type, torch.cuda.current_device())
        self.num_selected = num_selected
        self.window = window
        self.chunk_size = chunk_size
        self.num_candidates = layout["num_candidates"]
        self.state = torch.zeros(
            batch_size, layout["block_bytes"], dtype=torch.uint8, device=self.device
        )
        self._block_index = torch.arange(batch_size, dtype=torch.int32, device=self.device)
        self._is_prefilled = False

    def _require_kernel(self, *configuration: int | None) -> None:
        names = ("num_selected", "window", "chunk_size", "num_candidates")
        shape = (self.batch_size, self.num_kv_heads, 1, self.head_dim)
        answer = capability(
            shape,
            shape,
            dtype=self.dtype,
            device=self.device,
            stage="decode",
            **dict(zip(names, configuration, strict=True)),
        )
        if not answer.supported:
            raise NotImplementedError(f"SparseKCache: {answer.reason}")

    @property
    def num_bytes(self) -> int:
        """Bytes of the state, whatever the sequences' lengths."""
        return self.state.numel()

    @property
    def num_tokens(self) -> Tensor:
        """int32 ``[batch_size]``: how many tokens each sequence has seen."""
        if self.state.numel() == 0:
            return torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
        return self.state[:, :4].contiguous().view(torch.int32)[:, 0]

    def prefill(
        self, k: Tensor, v: Tensor, scores: Tensor | None, lengths: Tensor | None = None
    ) -> None:
        """Appends a prompt, or a piece of one.

        The prompt's own output is that of :func:`attention_forward`; or of :meth:`step` with all its queries.

        Args:
            k, v: ``[batch_size, Hkv, S, D]``, any strides with a contiguous last dimension.
            scores: float32 ``[batch_size, Hkv, S]``, any strides. None: ``key_norm_scores(k)``.
            lengths: int32 ``[batch_size]``: of row b only the first ``lengths[b]`` tokens of this call exist.
        """
        self._check(k=k, v=v)
        if scores is None:
            scores = _OPS.key_norm_scores(k.detach(), lengths, "auto")
        _OPS.decode_append(
            k, v, scores, lengths, self.state, self._block_index, None, *self._configuration
        )
        self._is_prefilled = True

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Tensor | None,
        *,
        lengths: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Appends the next tokens of every sequence and attends from them.

        Args:
            q: ``[batch_size, Hq, n, D]``, any strides with a contiguous last dimension; n = 1, or more in speculative
                decoding.
            k, v: ``[batch_size, Hkv, n, D]``: the same tokens' keys and values.
            scores: float32 ``[batch_size, Hkv, n]``. None: ``key_norm_scores(k)``.
            lengths: int32 ``[batch_size]``: of row b only the first ``lengths[b]`` tokens of this call exist; the others'
                output is 0.
            return_lse: also return lse, float32 ``[batch_size, Hq, n]``.

        Returns:
            out like q, or ``(out, lse)``, as :func:`attention_forward` defines them.
        """
        if not self._is_prefilled:
            raise ValueError(
                "step: expected a prefill before the first step (prefill with no tokens starts "
                "empty sequences), got an empty cache"
            )
        self._check(q=q, k=k, v=v)
        if scores is None:
            scores = _OPS.key_norm_scores(k.detach(), lengths, "auto")
        blocks = (self.state, self._block_index, None)
        attention = (self.gate, self.sm_scale, return_lse)
        out, lse = _OPS.decode(q, k, v, scores, lengths, *blocks, *self._configuration, *attention)
        return (out, lse) if return_lse else out

    def reset(self) -> None:
        """Forgets every sequence."""
        self.state.zero_()
        self._is_prefilled = False

    def reorder(self, batch_indices: Tensor) -> None:
        """Row b becomes what row ``batch_indices[b]`` was, as beam search needs it.

        Args:
            batch_indices: integers ``[batch_size]``; an index may occur several times.
        """
        if batch_indices.shape != (self.batch_size,) or batch_indices.is_floating_point():
            raise ValueError(
                f"batch_indices: expected integers of shape [{self.batch_size}], got "
                f"{name_of(batch_indices.dtype)} {list(batch_indices.shape)}"
            )
        self.state.copy_(self.state.index_select(0, batch_indices.to(self.device, torch.int64)))

    def state_dict(self) -> dict:
        """A copy of the state and the options that it was made with; for :meth:`load_state_dict`."""
        return {
            "options": self._options,
            "state": self.state.clone(),
            "is_prefilled": self._is_prefilled,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes over a state; ValueError where it belongs to a cache with other options or another shape."""
        expected = {"options", "state", "is_prefilled"}
        if state_dict.keys() != expected:
            raise ValueError(
                f"state_dict: expected the keys {sorted(expected)}, got {sorted(state_dict)}"
            )
        for name, value in self._options.items():
            got = state_dict["options"].get(name)
            if got != value:
                raise ValueError(f"state_dict: expected {name} = {value}, got {got}")
        state = state_dict["state"]
        if state.shape != self.state.shape or state.dtype != torch.uint8:
            raise ValueError(
                f"state_dict: expected a state uint8 {list(self.state.shape)}, got "
                f"{name_of(state.dtype)} {list(state.shape)}"
            )
        self.state.copy_(state)
        self._is_prefilled = state_dict["is_prefilled"]

    @property
    def _configuration(self) -> tuple[int, int, int, int]:
        return self.num_selected, self.window, self.chunk_size, self.num_candidates

    @property
    def _options(self) -> dict:
        """What decides how a state is laid out and what is in it."""
        return {
            "batch_size": self.batch_size,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": name_of(self.dtype),
            "num_selected": self.num_selected,
            "window": self.window,
            "chunk_size": self.chunk_size,
            "num_candidates": self.num_candidates,
        }

    def _check(self, **tensors: Tensor) -> None:
        """What belongs to the cache: batch, heads, head_dim, dtype and device. The core checks the rest."""
        for name, tensor in tensors.items():
            heads = self.num_kv_heads if name != "q" else None
            expected = f"[{self.batch_size}, {heads or 'Hq'}, tokens, {self.head_dim}]"
            shape = tensor.shape
            if (
                len(shape) != 4
                or shape[0] != self.batch_size
                or shape[3] != self.head_dim
                or heads not in (None, shape[1])
            ):
                raise ValueError(
                    f"{name}: expected shape {expected} as the cache has it, got {list(shape)}"
                )
            if tensor.dtype != self.dtype:
                raise ValueError(
                    f"{name}: expected dtype {name_of(self.dtype)} as the cache has it, got "
                    f"{name_of(tensor.dtype)}"
                )
            if tensor.device != self.device:
                raise ValueError(
                    f"{name}: expected a tensor on {self.device} as the cache is, got one on "
                    f"{tensor.device}"
                )
