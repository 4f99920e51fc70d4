"""Modules for training: the scorer and a whole attention layer.

Parameter names are those of common attention modules (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``), so a dense
layer's weights load with ``strict=False``; what is then missing is the scorer alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blackwell_sparsek._arguments import GATE_CODES
from blackwell_sparsek.functional import attention_forward
from blackwell_sparsek.selection import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_NUM_SELECTED,
    DEFAULT_WINDOW,
)

# Spread of the scores at initialisation. See SparseKScorer.
DEFAULT_SCORE_SCALE = 2.0
DEFAULT_POSITION_SLOPE = 1e-4

# Standard deviation of GELU(z) for z ~ N(0, 1).
_GELU_STD = 0.588


def _require_at_least(minimum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def _check_hidden(tensor: Tensor, name: str, hidden_size: int) -> None:
    if tensor.dim() != 3 or tensor.shape[-1] != hidden_size:
        raise ValueError(f"{name}: expected shape [B, S, {hidden_size}], got {list(tensor.shape)}")


def apply_rotary(x: Tensor, theta: float, offset: int = 0) -> Tensor:
    """Rotary position embedding in the Llama convention (dimension d is rotated with dimension d + D/2).

    ``y_d = x_d cos(a) - x_{d + D/2} sin(a)``, ``y_{d + D/2} = x_{d + D/2} cos(a) + x_d sin(a)`` with
    ``a = position · theta^(-2d / D)`` (RoFormer, arXiv 2104.09864). Computed in float32, or in float64 where x is.

    Args:
        x: ``[B, H, S, D]``, D even, any strides.
        theta: the base of the frequencies, 10 000 in Llama 2, 500 000 in Llama 3.
        offset: position of the first row.

    Returns:
        Like x.

    Example:
        >>> q, k = apply_rotary(q, 10_000.0), apply_rotary(k, 10_000.0)
    """
    seq_len, head_dim = x.shape[-2:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    table = rotary_table(seq_len, head_dim, theta, offset, dtype=dtype, device=x.device)
    return rotate(x, *table)


def rotary_table(
    seq_len: int,
    head_dim: int,
    theta: float,
    offset: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of :func:`apply_rotary`'s angles, ``[S, D/2]`` each: made once, they serve all layers of a model.

    They are a function's result rather than a buffer, which ``module.bfloat16()`` would round.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    position = torch.arange(offset, offset + seq_len, dtype=dtype, device=device)
    angle = torch.outer(position, theta**-exponent)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`apply_rotary` with a table of :func:`rotary_table`, in the table's precision."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SparseKScorer(nn.Module):
    """One learned importance per token and KV head: ``u = W h + position_slope · position``.

    With ``mlp_hidden_size`` it is ``u = W GELU(W_mlp h) + position_slope · position``.

    *Scale.* A gate is ``clip(u - τ, 0, 1)``: its ruler has length 1. If all scores lie within a small fraction of 1, the
    threshold lies below thousands of them, the selected keys get gates near k / M, and positive gates outside the top k are
    dropped. So ``W`` is drawn such that, for hidden states whose components have a root mean square of 1 (what an RMSNorm or
    LayerNorm gives), a score has standard deviation ``score_scale``. For normally distributed scores, k = 256 and 4 096 keys,
    1.5 k of them have a positive gate with scale 2; with scale 1, 2.2 k; with 0.45 (what the usual initialisation with
    standard deviation 0.02 gives for 512 hidden units), 3.8 k; with 0.1, 13 k.

    *No bias.* A shift of all scores shifts the threshold with them: it changes nothing and its gradient is 0.

    *Position slope.* A token that was good a while ago should yield to one as good that is nearer. The fixed slope does this
    without making the scorer predict ever larger values; with the default, 10 000 tokens are worth 1.

    *Precision.* Computed in float32 whatever the dtype of the input and under autocast: in bfloat16 scores around 2 would be
    1/64 apart, with many ties.

    The weights are plain parameters rather than ``nn.Linear``: initialisers that walk over a model's linear layers leave their
    scale alone.

    Args:
        hidden_size: of the hidden states.
        num_kv_heads: Hkv.
        position_slope: added per position; not learned.
        score_scale: standard deviation of the scores at initialisation.
        mlp_hidden_size: width of a hidden layer; None: none.
        device, dtype: of the parameters.

    Raises:
        ValueError: a wrong size, or hidden states of the wrong shape.

    Example:
        >>> scorer = SparseKScorer(hidden_size=512, num_kv_heads=2)
        >>> scorer(torch.randn(1, 1024, 512)).shape
        torch.Size([1, 2, 1024])
    """

    def __init__(
        self,
        hidden_size: int,
        num_kv_heads: int,
        *,
        position_slope: float = DEFAULT_POSITION_SLOPE,
        score_scale: float = DEFAULT_SCORE_SCALE,
        mlp_hidden_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _require_at_least(
            1, hidden_size=hidden_size, num_kv_heads=num_kv_heads, mlp_hidden_size=mlp_hidden_size
        )
        if not score_scale > 0:
            raise ValueError(f"score_scale: expected more than 0, got {score_scale}")
        self.hidden_size = hidden_size
        self.num_kv_heads = num_kv_heads
        self.position_slope = position_slope
        self.score_scale = score_scale
        self.mlp_hidden_size = mlp_hidden_size
        options = {"device": device, "dtype": dtype}
        num_features = hidden_size if mlp_hidden_size is None else mlp_hidden_size
        self.weight = nn.Parameter(torch.empty(num_kv_heads, num_features, **options))
        if mlp_hidden_size is None:
            self.register_parameter("mlp_weight", None)
        else:
            self.mlp_weight = nn.Parameter(torch.empty(mlp_hidden_size, hidden_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, for scores with standard deviation ``score_scale``."""
        if self.mlp_weight is None:
            nn.init.normal_(self.weight, std=self.score_scale * self.hidden_size**-0.5)
            return
        nn.init.normal_(self.mlp_weight, std=self.hidden_size**-0.5)
        # The mean of GELU only shifts the scores of a head; its deviation makes their spread.
        std = self.score_scale * self.mlp_hidden_size**-0.5 / _GELU_STD
        nn.init.normal_(self.weight, std=std)

    def forward(self, hidden: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Scores of hidden states.

        Args:
            hidden: ``[B, S, hidden_size]``, any floating-point dtype, normalised.
            offset: position of the first token; an integer, or an integer tensor ``[B]`` with one per sequence.

        Returns:
            float32 ``[B, Hkv, S]`` (float64 where hidden is), differentiable.
        """
        _check_hidden(hidden, "hidden", self.hidden_size)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            features = hidden.to(dtype)
            if self.mlp_weight is not None:
                features = F.gelu(F.linear(features, self.mlp_weight.to(dtype)))
            scores = F.linear(features, self.weight.to(dtype)).transpose(1, 2)
        # Positions are integers until here: float32 holds only those below 2^24.
        position = torch.arange(hidden.shape[1], device=hidden.device)
        if isinstance(offset, Tensor):
            if offset.shape != hidden.shape[:1]:
                raise ValueError(
                    f"offset: expected an integer or shape [{hidden.shape[0]}], one per sequence, "
                    f"got shape {list(offset.shape)}"
                )
            position = (position + offset[:, None])[:, None, :]
        else:
            position = position + offset
        return scores + self.position_slope * position.to(dtype)

    def extra_repr(self) -> str:
        mlp = "" if self.mlp_hidden_size is None else f", mlp_hidden_size={self.mlp_hidden_size}"
        return f"{self.hidden_size}, {self.num_kv_heads}, position_slope={self.position_slope}{mlp}"


class SparseKAttention(nn.Module):
    """A causal attention layer with learned selection: projections, optional RoPE, scorer, attention, output projection.

    ``scores = scorer(x)``, ``o = attention_forward(q_proj(x), k_proj(x), v_proj(x), scores)``, ``y = o_proj(o)``; see
    :func:`blackwell_sparsek.attention_forward` for the formula. With ``num_selected >= S`` every query sees its whole past and
    the layer equals dense attention with the same projections, whatever the scores.

    The scorer reads x itself, which should be normalised as in a pre-norm block. It learns through the gates, so with
    ``gate="none"`` it receives no gradient.

    ``num_selected``, ``window``, ``chunk_size``, ``num_candidates``, ``gate`` and ``backend`` are plain attributes: assigning
    ``num_selected`` between steps anneals the number of selected keys.

    Args:
        hidden_size: of x.
        num_heads: Hq.
        num_kv_heads: Hkv, which divides Hq; None: Hq.
        head_dim: D; None: ``hidden_size / num_heads``.
        num_selected, window, chunk_size, num_candidates, sm_scale: as :func:`blackwell_sparsek.attention_forward` takes them.
        gate: ``"softmax"``, ``"value"`` or ``"none"``.
        rope_theta: base of the rotary position embedding of q and k; None: none.
        bias: of the four projections.
        output_bias: of o_proj; None: as ``bias`` (Qwen2 has a bias in all but o_proj).
        position_slope, score_scale: of the scorer.
        scorer_hidden_size: ``mlp_hidden_size`` of the scorer.
        backend: as :func:`blackwell_sparsek.attention_forward` takes it.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes that contradict each other, a wrong option, or x of the wrong shape.
        NotImplementedError: from ``forward``, where no kernel serves the call or its gradients.

    Example:
        >>> attention = SparseKAttention(512, 8, 2, num_selected=64, window=32, chunk_size=32, rope_theta=10_000.0)
        >>> attention(torch.randn(1, 1024, 512)).shape
        torch.Size([1, 1024, 512])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        num_selected: int = DEFAULT_NUM_SELECTED,
        window: int = DEFAULT_WINDOW,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        num_candidates: int | None = None,
        gate: str = "softmax",
        sm_scale: float | None = None,
        rope_theta: float | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        position_slope: float = DEFAULT_POSITION_SLOPE,
        score_scale: float = DEFAULT_SCORE_SCALE,
        scorer_hidden_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _require_at_least(
            1,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            chunk_size=chunk_size,
        )
        _require_at_least(0, num_selected=num_selected, window=window)
        _require_at_least(num_selected, num_candidates=num_candidates)
        if num_heads % num_kv_heads != 0:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads != 0:
                raise ValueError(
                    f"hidden_size: expected a multiple of num_heads = {num_heads} where head_dim is "
                    f"not given, got {hidden_size}"
                )
            head_dim = hidden_size // num_heads
        if gate not in GATE_CODES:
            raise ValueError(f"gate: expected one of {', '.join(GATE_CODES)}, got {gate!r}")
        if rope_theta is not None and (head_dim % 2 != 0 or not rope_theta > 0):
            raise ValueError(
                f"rope_theta: expected more than 0 and an even head_dim, got {rope_theta} and head_dim {head_dim}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_selected = num_selected
        self.window = window
        self.chunk_size = chunk_size
        self.num_candidates = num_candidates
        self.gate = gate
        self.sm_scale = sm_scale
        self.rope_theta = rope_theta
        self.backend = backend

        def linear(num_inputs: int, num_outputs: int, with_bias: bool) -> nn.Linear:
            return nn.Linear(num_inputs, num_outputs, bias=with_bias, device=device, dtype=dtype)

        self.q_proj = linear(hidden_size, num_heads * head_dim, bias)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim, bias)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim, bias)
        with_output_bias = bias if output_bias is None else output_bias
        self.o_proj = linear(num_heads * head_dim, hidden_size, with_output_bias)
        self.scorer = SparseKScorer(
            hidden_size,
            num_kv_heads,
            position_slope=position_slope,
            score_scale=score_scale,
            mlp_hidden_size=scorer_hidden_size,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention over a whole sequence, starting at position 0.

        Args:
            x: ``[B, S, hidden_size]``.
            lengths: int32 ``[B]``; tokens at positions ``>= lengths[b]`` are padding: no token reads them, and their own
                output is the bias of o_proj, 0 without one.
            rotary: the angles of :func:`rotary_table` for S positions, where a model makes them once for all layers; None: made
                here from rope_theta.

        Returns:
            ``[B, S, hidden_size]``, in x's dtype or autocast's.
        """
        _check_hidden(x, "x", self.hidden_size)

        def heads_of(projection: nn.Linear) -> Tensor:
            # [B, S, H · D] -> [B, H, S, D], without a copy
            return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = heads_of(self.q_proj), heads_of(self.k_proj), heads_of(self.v_proj)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        elif self.rope_theta is not None:
            q, k = apply_rotary(q, self.rope_theta), apply_rotary(k, self.rope_theta)
        out = attention_forward(
            q,
            k,
            v,
            self.scorer(x),
            num_selected=self.num_selected,
            window=self.window,
            chunk_size=self.chunk_size,
            num_candidates=self.num_candidates,
            gate=self.gate,
            sm_scale=self.sm_scale,
            lengths=lengths,
            backend=self.backend,
        )
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, {self.num_heads}, {self.num_kv_heads}, {self.head_dim}, "
            f"num_selected={self.num_selected}, window={self.window}, chunk_size={self.chunk_size}, "
            f"gate={self.gate!r}, rope_theta={self.rope_theta}"
        )
