"""The public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from blackwell_sparsek import fused, ops, packed, projection  # noqa: F401  (they define the operators)
from blackwell_sparsek._arguments import name_of
from blackwell_sparsek._library import need_no_dispatcher
from blackwell_sparsek.autograd import require_backward, wants_gradients
from blackwell_sparsek.selection import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_NUM_SELECTED,
    DEFAULT_WINDOW,
    Selection,
    SelectionConfiguration,
)

_OPS = torch.ops.blackwell_sparsek


def key_norm_scores(
    k: Tensor, *, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Scores that need no training: ``u_j = -‖k_j‖₂``.

    Tokens with a small key norm tend to be the ones that later queries attend to. Accumulated in float32;
    not differentiable (the result is detached).

    Args:
        k: ``[B, Hkv, Sk, D]``, float16, bfloat16 or float32, any strides with a contiguous last dimension.
        lengths: int32 ``[B]``; scores at positions ``>= lengths[b]`` are 0 and their keys are not read.
        backend: None, or ``"reference"``.

    Returns:
        float32 ``[B, Hkv, Sk]`` (float64 on the reference backend where k is).

    Raises:
        ValueError: a wrong shape, dtype or device.

    Example:
        >>> attention_forward(q, k, v, key_norm_scores(k), gate="none")  # what attention_forward(q, k, v) does
    """
    return _OPS.key_norm_scores(k, lengths, backend or "auto")


def select(
    scores: Tensor,
    *,
    num_selected: int = DEFAULT_NUM_SELECTED,
    window: int = DEFAULT_WINDOW,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    num_candidates: int | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Decides which keys each query sees.

    The query at position i is in chunk ``c = i // chunk_size``. The keys ``b_c … i`` with
    ``b_c = max(0, c · chunk_size - window)`` are always visible. Of the pool ``{0 … b_c - 1}`` the
    ``num_selected`` keys with the largest scores are; of equal scores the smaller position ranks first.
    ``chunk_size=1`` is the paper's selection per query (arXiv 2406.16747, section 3).

    The SPARSEK threshold of a chunk is ``τ_c = sup{τ : Σ_j clip(u_j - τ, 0, 1) >= num_selected}`` over the
    ``num_candidates`` first-ranked keys of the pool; gates are ``clip(u_j - τ_c, 0, 1)``.

    Args:
        scores: float32 ``[B, Hkv, Sk]``, finite, any strides: the importance of each key. Keep them below about 2¹⁰.
        num_selected: k >= 0.
        window: w >= 0.
        chunk_size: C >= 1.
        num_candidates: M >= num_selected; None: 4 · num_selected. ``M >= Sk`` is the paper's form; a finite M keeps
            decoding in constant memory and exact.
        lengths: int32 ``[B]``; positions ``>= lengths[b]`` do not exist.
        backend: None, ``"cpu"`` or ``"reference"``.

    Returns:
        A :class:`Selection`. Its tensors are not differentiable; attention carries the thresholds' gradient to the
        scores. Deterministic, and the same keys on every backend.

    Raises:
        ValueError: a wrong shape, dtype, device or value (values on CUDA: with ``BLACKWELL_SPARSEK_CHECK=1``).

    Example:
        >>> selection = select(scores, num_selected=256, window=128)
        >>> out = attention_forward(q, k, v, scores, selection=selection)
    """
    tensors = _OPS.select(
        scores.detach(),
        lengths,
        num_selected,
        window,
        chunk_size,
        num_candidates,
        backend or "auto",
    )
    if num_candidates is None:
        num_candidates = 4 * num_selected
    configuration = SelectionConfiguration(num_selected, window, chunk_size, num_candidates)
    expiry, threshold, last_candidate = tensors
    return Selection(
        expiry,
        threshold=threshold,
        last_candidate=last_candidate,
        configuration=configuration,
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor | None = None,
    *,
    num_selected: int | None = None,
    window: int | None = None,
    chunk_size: int | None = None,
    num_candidates: int | None = None,
    gate: str | None = None,
    sm_scale: float | None = None,
    selection: Selection | None = None,
    lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each query over its window and its selected keys.

    With ``s_ij = sm_scale · q_i·k_j`` over the keys j that query i sees (see :func:`select`) and the gate
    ``m_ij = clip(u_j - τ_c, 0, 1)`` of selected keys (1 for window keys):

    - ``gate="softmax"``: ``p_ij ∝ m_ij exp(s_ij)``, ``o_i = Σ_j p_ij v_j``
    - ``gate="value"``: ``p_ij ∝ exp(s_ij)``, ``o_i = Σ_j p_ij m_ij v_j`` (the paper's form; arXiv 2406.16747, section 3)
    - ``gate="none"``: ``m = 1``

    Queries are the last Sq positions: row r has position ``Sk - Sq + r``. Query head h reads KV head ``h // (Hq / Hkv)``.

    Args:
        q: ``[B, Hq, Sq, D]``, any strides with a contiguous last dimension. float16, bfloat16 or, on the CPU, float32.
        k, v: ``[B, Hkv, Sk, D]``, like q; Hkv divides Hq, Sq <= Sk.
        scores: float32 ``[B, Hkv, Sk]``, any strides. None: ``key_norm_scores(k)``.
        num_selected, window, chunk_size, num_candidates: as :func:`select` takes them. None: the selection's, without one
            256, 128, 128 and 4 · num_selected.
        gate: None: ``"softmax"`` with scores, ``"none"`` without or with a foreign selection.
        sm_scale: None: ``D ** -0.5``.
        selection: from :func:`select` with the same scores, or a foreign one.
        lengths: int32 ``[B]``; keys and queries at positions ``>= lengths[b]`` do not exist: their memory is never used, their
            output is 0.
        return_lse: also return lse.
        backend: None: the fastest. ``"reference"``: the float64 specification, slow, any float dtype (also float64), on host
            memory; ``"cpu"``, ``"portable"``, ``"sm90"``: these kernels or none.

    Returns:
        out like q; with ``return_lse``, ``(out, lse)``: lse is the natural logarithm of the sum of the weights that p
        normalises, float32 ``[B, Hq, Sq]`` (float64 on the reference backend where q is), not differentiable. A row that
        sees no key has output 0 and lse -∞. Deterministic: two calls give the same bits.

        Differentiable in q, k, v and scores where attend_backward runs (see :func:`capability`).

    Raises:
        ValueError: a wrong shape, dtype, device or value, or arguments that contradict each other.
        NotImplementedError: no kernel here serves the call, or an input requires grad and there is no backward here.

    Example:
        >>> q, k, v = (torch.randn(1, 8, 4096, 128) for _ in range(3))
        >>> out = attention_forward(q, k, v, torch.randn(1, 8, 4096), num_selected=256, window=128)
    """
    backend = backend or "auto"
    is_direct = need_no_dispatcher(q, k, v, scores, lengths)
    differentiable = not is_direct and wants_gradients(q, k, v, scores)
    if scores is not None and backend == "reference" and q.dtype == torch.float64:
        scores = scores.to(torch.float64)
    if selection is None:
        if gate is None:
            gate = "none" if scores is None else "softmax"
        configuration = (
            DEFAULT_NUM_SELECTED if num_selected is None else num_selected,
            DEFAULT_WINDOW if window is None else window,
            DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size,
            num_candidates,
        )
        if not differentiable:
            call = fused.run_dense if is_direct else _OPS.attention_forward
            out, lse = call(
                q, k, v, scores, lengths, *configuration, gate, sm_scale, return_lse, backend
            )
            return (out, lse) if return_lse else out
        if scores is None:
            scores = _OPS.key_norm_scores(k.detach(), lengths, backend)
        selected = _OPS.select(scores.detach(), lengths, *configuration, backend)
        max_keys_per_tile = None
    else:
        given = (num_selected, window, chunk_size, num_candidates)
        configuration = _configuration_of(selection, given)
        if gate is None:
            gate = "none" if scores is None or selection.is_foreign else "softmax"
        _check_gate_of(selection, gate, scores)
        selected = (selection.expiry, selection.threshold, selection.last_candidate)
        max_keys_per_tile = selection.max_keys_per_tile

    if differentiable and not torch.compiler.is_compiling() and q.dim() == k.dim() == 4:
        # The operator checks it too, but only after it ran.
        is_foreign = selected[1] is None
        require_backward(q, k, configuration, is_foreign, max_keys_per_tile, gate, backend)
    out, lse = _OPS.attend(
        q,
        k,
        v,
        scores,
        *selected,
        lengths,
        *configuration,
        max_keys_per_tile,
        gate,
        sm_scale,
        return_lse or differentiable,
        backend,
    )
    return (out, lse) if return_lse else out


_OPTION_NAMES = ("num_selected", "window", "chunk_size", "num_candidates")


def _configuration_of(selection: Selection, given: tuple) -> tuple:
    """The selection's configuration; ValueError where the options given to the call disagree with it."""
    if selection.is_foreign:
        for name, value in zip(_OPTION_NAMES, given, strict=True):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None with a foreign selection, which has no configuration, "
                    f"got {value}"
                )
        return DEFAULT_NUM_SELECTED, DEFAULT_WINDOW, DEFAULT_CHUNK_SIZE, None
    configuration = selection.configuration
    own = (
        configuration.num_selected,
        configuration.window,
        configuration.chunk_size,
        configuration.num_candidates,
    )
    for name, value, expected in zip(_OPTION_NAMES, given, own, strict=True):
        if value is not None and value != expected:
            raise ValueError(f"{name}: expected {expected}, the selection's, or None, got {value}")
    return own


def _check_gate_of(selection: Selection, gate: str, scores: Tensor | None) -> None:
    if gate == "none":
        return
    if selection.is_foreign:
        raise ValueError(
            f"gate: expected 'none' with a foreign selection, which has no thresholds, got {gate!r}"
        )
    if scores is None:
        raise ValueError(
            f"scores: expected the scores that the selection was made from with gate={gate!r}, got None"
        )


def attention_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    num_selected: int = DEFAULT_NUM_SELECTED,
    window: int = DEFAULT_WINDOW,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    num_candidates: int | None = None,
    gate: str | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention_forward` for packed sequences of different lengths (FlashAttention's varlen convention).

    Sequence b has the queries ``cu_seqlens_q[b] … cu_seqlens_q[b + 1] - 1``, which are the last of its keys
    ``cu_seqlens_k[b] … cu_seqlens_k[b + 1] - 1``. Positions and chunks count from its own first key. Equals one
    :func:`attention_forward` per sequence.

    Args:
        q: ``[total_q, Hq, D]``, any strides with a contiguous last dimension.
        k, v: ``[total_k, Hkv, D]``.
        scores: float32 ``[total_k, Hkv]``, any strides, or None: key norms.
        cu_seqlens_q, cu_seqlens_k: int32 ``[N + 1]`` on q's device: first 0, never falling, last total_q or total_k; no
            sequence has more queries than keys. Empty sequences are allowed.
        num_selected, window, chunk_size, num_candidates, gate, sm_scale, backend: as :func:`attention_forward` takes them.
        return_lse: also return lse, float32 ``[total_q, Hq]``.

    Returns:
        out like q, or ``(out, lse)``. Differentiable as :func:`attention_forward` is.

    Raises:
        ValueError, NotImplementedError: as :func:`attention_forward`.

    Example:
        >>> cu_seqlens = torch.tensor([0, 100, 1124], dtype=torch.int32)
        >>> q, k, v = (torch.randn(1124, 8, 64) for _ in range(3))
        >>> out = attention_varlen_forward(q, k, v, torch.randn(1124, 8), cu_seqlens, cu_seqlens)
    """
    backend = backend or "auto"
    if gate is None:
        gate = "none" if scores is None else "softmax"
    if scores is not None and backend == "reference" and q.dtype == torch.float64:
        scores = scores.to(torch.float64)
    configuration = (num_selected, window, chunk_size, num_candidates)
    is_direct = need_no_dispatcher(q, k, v, scores, cu_seqlens_q, cu_seqlens_k)
    differentiable = not is_direct and wants_gradients(q, k, v, scores)
    if differentiable:
        if not torch.compiler.is_compiling() and q.dim() == k.dim() == 3:
            # The operator checks it too, but only after it ran.
            require_backward(q, k, configuration, False, None, gate, backend)
        ranked = scores
        if ranked is None:
            ranked = _OPS.key_norm_scores(k.detach().transpose(0, 1)[None], None, backend)[0].T
        selected = _OPS.select_varlen(ranked.detach(), cu_seqlens_k, *configuration, backend)
        starts = (cu_seqlens_q, cu_seqlens_k)
        out, lse = _OPS.attend_varlen(
            q, k, v, scores, *selected, *starts, *configuration, gate, sm_scale, backend
        )
    else:
        call = fused.run_packed if is_direct else _OPS.attention_varlen_forward
        out, lse = call(
            q,
            k,
            v,
            scores,
            cu_seqlens_q,
            cu_seqlens_k,
            *configuration,
            gate,
            sm_scale,
            return_lse,
            backend,
        )
    return (out, lse) if return_lse else out


def sparsek(z: Tensor, k: int, dim: int = -1) -> Tensor:
    """The SPARSEK operator: the Euclidean projection of scores onto ``{p : 0 <= p <= 1, Σ p = k}``.

    ``p_j = clip(z_j - τ, 0, 1)`` with τ such that ``Σ_j p_j = k`` (arXiv 2406.16747, section 3.2): a relaxation of the top-k
    indicator. Its derivative: with ``I = {j : 0 < p_j < 1}``, ``dz_j = dp_j - mean_{l ∈ I} dp_l`` for j in I, else 0.

    Args:
        z: float32 or float64, any shape with at least one dimension; finite.
        k: at least 0.
        dim: the dimension that is projected.

    Returns:
        p like z: all zeros for ``k = 0``, all ones where k is at least the size of ``dim``. Differentiable once.

    Raises:
        ValueError: a wrong dtype or value.

    Example:
        >>> sparsek(torch.tensor([2.0, 0.4, 0.2, -1.0]), k=2)
        tensor([1.0000, 0.6000, 0.4000, 0.0000])
    """
    if z.dim() == 0:
        raise ValueError("z: expected at least one dimension, got a scalar")
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z: expected float32 or float64, got {name_of(z.dtype)}")
    if not -z.dim() <= dim < z.dim():
        raise ValueError(f"dim: expected between {-z.dim()} and {z.dim() - 1}, got {dim}")
    wants_gradients(z)
    moved = z.movedim(dim, -1)
    p = _OPS.sparsek(moved.reshape(-1, moved.shape[-1]), k)
    return p.reshape(moved.shape).movedim(-1, dim)
