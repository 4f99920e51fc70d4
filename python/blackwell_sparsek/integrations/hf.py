"""SparseK attention in Hugging Face Transformers models (Transformers >= 5.24).

>>> from blackwell_sparsek.integrations.hf import enable_sparsek
>>> enable_sparsek(model, num_selected=256, window=128)
>>> model.generate(**inputs, max_new_tokens=100)  # with a cache that does not grow

How it hangs together, in the order of a forward:

1. Transformers builds the mask through :func:`sparsek_mask`, which is registered under the name of our attention. A padding
   mask becomes a :class:`Padding`, everything but causal attention with padding is refused.
2. A pre-hook on each attention module, :class:`_AttentionHook`, scores the hidden states, puts a :class:`SparseKCacheLayer`
   into the cache that Transformers made (or the caller) and hands both on as the keyword argument ``sparsek``.
3. The module projects and rotates; ``cache.update`` returns the new keys and values as they are, and
   :func:`sparsek_attention`, registered too, appends them and attends.

Nothing is remembered on the modules between these steps, so activation checkpointing and threads are safe.

Padding tokens do not exist: before attention the tokens of each row are moved to its front, and positions and chunks count
them alone, whichever side the padding is on. A padded row computes what it would compute alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blackwell_sparsek._arguments import GATE_CODES
from blackwell_sparsek.cache import SparseKCache
from blackwell_sparsek.functional import attention_forward, key_norm_scores, select
from blackwell_sparsek.modules import (
    DEFAULT_POSITION_SLOPE,
    DEFAULT_SCORE_SCALE,
    SparseKScorer,
)
from blackwell_sparsek.selection import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_NUM_SELECTED,
    DEFAULT_WINDOW,
)

MINIMUM_VERSION = (5, 24)

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "blackwell_sparsek.integrations.hf needs Transformers: pip install 'transformers>=5.24,<6'"
    ) from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_VERSION:
    raise ImportError(
        f"blackwell_sparsek.integrations.hf needs Transformers >= {MINIMUM_VERSION[0]}."
        f"{MINIMUM_VERSION[1]}, got {transformers.__version__}"
    )

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # noqa: E402
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer  # noqa: E402
from transformers.masking_utils import causal_mask_function  # noqa: E402

# What a model's config calls our attention.
IMPLEMENTATION = "sparsek"

# Families whose attention is plain causal attention between projections; each is tested.
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

SCORERS = ("key_norm", "learned")

# The scorer's name in each attention module, and so in the model's state_dict.
SCORER_NAME = "sparsek_scorer"

_STATE_NAME = "_sparsek"


@dataclass
class SparseKOptions:
    """What :func:`enable_sparsek` was told. One object for all layers: assigning ``num_selected`` between training steps
    anneals it. A cache keeps the options of the moment when it was filled first.
    """

    num_selected: int
    window: int
    chunk_size: int
    num_candidates: int | None
    gate: str

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of :func:`attention_forward` and :class:`SparseKCache`."""
        return dict(vars(self))


# ---- padding -------------------------------------------------------------------------------------


class Padding(NamedTuple):
    """Which tokens of a call exist. A named tuple, so that device maps move its tensors.

    lengths: int32 ``[B]``, how many tokens of each row exist.
    to_front: int64 ``[B, S]``: token ``to_front[b, r]`` moves to place r, existing ones first in their order. None: they
        are there already (padding on the right).
    to_place: its inverse.
    """

    lengths: Tensor
    to_front: Tensor | None
    to_place: Tensor | None


def sparsek_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Padding | None:
    """The mask function of Transformers' AttentionMaskInterface: padding of the call's tokens, None without any.

    Args:
        batch_size, q_length: of the call.
        kv_length: of what came before and the call together.
        q_offset: how many columns came before.
        kv_offset: 0.
        mask_function: must be the causal one.
        attention_mask: bool ``[batch_size, kv_length]``, False for padding, or None.

    Raises:
        NotImplementedError: a mask that is not causal attention with padding, or a static cache.
        ValueError: a mask of the wrong shape.
    """
    if mask_function is not causal_mask_function:
        raise NotImplementedError(
            "attention_mask: SparseK serves causal attention with padding; sliding windows, bidirectional blocks and "
            "packed sequences (position_ids that start again within a row) are not supported. Under torch.compile pass an "
            "attention_mask, if only of ones: Transformers cannot see there whether sequences are packed"
        )
    seq_len = q_offset + q_length
    if attention_mask is not None and attention_mask.shape != (batch_size, seq_len):
        raise ValueError(
            f"attention_mask: expected shape [{batch_size}, {seq_len}], a column for each of the {q_offset} tokens that "
            f"the cache has seen and the {q_length} of this call, got {list(attention_mask.shape)}"
        )
    if kv_length != seq_len:
        raise NotImplementedError(
            f"cache: expected one that grows with its tokens, as a DynamicCache, got one of {kv_length} columns for "
            f"{seq_len} tokens; static caches are not supported"
        )
    if attention_mask is None:
        return None
    exists = attention_mask[:, q_offset:].to(torch.bool)
    if q_length == 1:
        # A step of generation: one token needs no order, and asking whether it exists would wait for the device.
        return Padding(exists[:, 0].to(torch.int32), None, None)
    # What a compiled or captured graph cannot ask: whether there is any padding, and whether it is where it is to go.
    is_capturing = exists.is_cuda and torch.cuda.is_current_stream_capturing()
    can_look = not (torch.compiler.is_compiling() or is_capturing)
    if can_look and exists.all():
        return None
    to_front = torch.argsort(~exists, dim=-1, stable=True)
    lengths = exists.sum(dim=-1, dtype=torch.int32)
    in_place = torch.arange(q_length, device=exists.device).expand_as(to_front)
    if can_look and torch.equal(to_front, in_place):
        return Padding(lengths, None, None)
    return Padding(lengths, to_front, torch.argsort(to_front, dim=-1))


def _move(tensor: Tensor, order: Tensor | None, dim: int) -> Tensor:
    """Tokens of ``[B, …]`` along dim in another order."""
    if order is None:
        return tensor
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = order.shape
    return tensor.gather(dim, order.view(shape).expand_as(tensor))


def _padding_of(attention_mask) -> Padding | None:
    if attention_mask is None or isinstance(attention_mask, Padding):
        return attention_mask
    shape = list(getattr(attention_mask, "shape", []))
    raise NotImplementedError(
        "attention_mask: expected None or a padding mask [batch, tokens], got "
        f"{type(attention_mask).__name__} {shape}; SparseK has no arbitrary masks"
    )


# ---- cache ---------------------------------------------------------------------------------------


class SparseKCacheLayer(CacheLayerMixin):
    """A layer of a Transformers cache that holds a :class:`SparseKCache`: constant memory, whatever the length.

    :func:`enable_sparsek` makes the model put these into an empty ``DynamicCache`` when it is used first. The keys and
    values are appended by the attention, not by ``update``, since they come with scores and queries.

    A key that was evicted cannot come back, so the cache cannot be cropped: assisted decoding is refused.

    Args:
        options: as :func:`enable_sparsek` returns them.
        sm_scale: of the model's attention; None: ``head_dim ** -0.5``.

    Attributes:
        cache: the SparseKCache; None as long as nothing was appended.
        num_columns: how many tokens every row has seen, padding included.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    # Transformers would allocate keys and values itself.
    supports_early_init = False

    def __init__(self, options: SparseKOptions, sm_scale: float | None = None) -> None:
        super().__init__()
        self.arguments = options.arguments()
        self.sm_scale = sm_scale
        self.cache: SparseKCache | None = None
        self.num_columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch_size, num_kv_heads, _, head_dim = key_states.shape
        self.cache = SparseKCache(
            batch_size,
            num_kv_heads,
            head_dim,
            **self.arguments,
            sm_scale=self.sm_scale,
            dtype=key_states.dtype,
            device=key_states.device,
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, kwargs: dict | None = None, **_
    ) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values as they are: :meth:`attend`, which has the scores too, appends them."""
        call = (kwargs or {}).get("sparsek")
        if call is None or call.layer is not self:
            raise ValueError(
                "cache: expected a cache without SparseK layers in a model that enable_sparsek has not switched, got "
                "a SparseKCacheLayer"
            )
        return key_states, value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, lengths: Tensor | None
    ) -> Tensor:
        """Appends a call's tokens and attends from them; of row b only the first ``lengths[b]`` exist."""
        if self.cache is None:
            # A prompt: nothing came before, so its rows are those of the one-shot forward.
            self.lazy_initialization(k, v)
            out = attention_forward(
                q, k, v, scores, **self.arguments, sm_scale=self.sm_scale, lengths=lengths
            )
            self.cache.prefill(k, v, scores, lengths)
        else:
            out = self.cache.step(q, k, v, scores, lengths=lengths)
        self.num_columns += q.shape[2]
        return out

    @property
    def num_tokens(self) -> Tensor | int:
        """int32 ``[B]``: how many tokens each row has seen, without padding; 0 before the first."""
        return 0 if self.cache is None else self.cache.num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of the layer; it does not depend on the number of tokens."""
        return 0 if self.cache is None else self.cache.num_bytes

    def get_seq_length(self) -> int:
        return self.num_columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_columns + query_length, 0

    def reset(self) -> None:
        self.cache = None
        self.is_initialized = False
        self.num_columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise NotImplementedError(
                "crop: a SparseKCacheLayer cannot forget its last tokens, since what they evicted is gone"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse("batch_select_indices")

    def offload(self) -> None:
        self._refuse("offload")

    def prefetch(self) -> None:
        self._refuse("prefetch")

    def _refuse(self, name: str) -> None:
        raise NotImplementedError(
            f"{name}: not supported by SparseKCacheLayer, whose batch and device are fixed"
        )


def _sparsek_layer_of(
    cache: Cache, module: nn.Module, options: SparseKOptions, *, is_recording: bool
) -> SparseKCacheLayer | None:
    """The cache's layer of an attention module; an empty layer of a dynamic cache is replaced by one of ours.

    None where gradients are recorded and the caller did not bring a cache of ours: Transformers' models make a cache in
    every forward unless told otherwise, also in training.
    """
    if not isinstance(cache, Cache) or cache.offloading:
        name = type(cache).__name__ + (" with offloading" if isinstance(cache, Cache) else "")
        raise ValueError(f"cache: expected a DynamicCache, as generate makes it, got {name}")
    while len(cache) <= module.layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[module.layer_idx]
    if isinstance(layer, SparseKCacheLayer):
        if layer.arguments != options.arguments():
            raise ValueError(
                f"cache: expected one made with {options.arguments()}, as the model has it, got {layer.arguments}"
            )
        return layer
    if type(layer) is not DynamicLayer:
        raise ValueError(
            f"cache: expected a DynamicCache, as generate makes it, got a layer of {type(layer).__name__}"
        )
    if layer.is_initialized:
        raise ValueError(
            "cache: expected an empty one or one that was filled by this model under torch.no_grad(), got one that "
            "dense attention filled or that was filled while gradients were recorded"
        )
    if is_recording:
        return None
    cache.layers[module.layer_idx] = SparseKCacheLayer(options, module.scaling)
    return cache.layers[module.layer_idx]


# ---- attention -----------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What the hook hands to the attention function through the module's keyword arguments."""

    options: SparseKOptions
    layer: SparseKCacheLayer | None
    # Padding moved to the back; None: key norms.
    scores: Tensor | None


class _AttentionHook:
    """Forward pre-hook of an attention module: scores its hidden states and finds its cache layer."""

    def __init__(self, options: SparseKOptions) -> None:
        self.options = options

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        implementation = module.config._attn_implementation
        if implementation != IMPLEMENTATION:
            raise ValueError(
                f"attn_implementation: expected {IMPLEMENTATION!r}, as enable_sparsek has set it, got "
                f"{implementation!r}; call disable_sparsek before you choose another"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        padding = _padding_of(kwargs.get("attention_mask"))
        layer = None
        if (cache := kwargs.get("cache")) is not None:
            is_recording = torch.is_grad_enabled() and (
                hidden.requires_grad or any(p.requires_grad for p in module.parameters())
            )
            layer = _sparsek_layer_of(cache, module, self.options, is_recording=is_recording)
        scores = None
        if hasattr(module, SCORER_NAME):
            if padding is not None:
                hidden = _move(hidden, padding.to_front, dim=1)
            num_seen = 0 if layer is None else layer.num_tokens
            scores = getattr(module, SCORER_NAME)(hidden, offset=num_seen)
        return args, {**kwargs, "sparsek": _Call(self.options, layer, scores)}


def sparsek_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Padding | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sparsek: _Call | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function of Transformers' AttentionInterface.

    Args:
        module: the attention module, switched by :func:`enable_sparsek`.
        query: ``[B, Hq, S, D]``.
        key, value: ``[B, Hkv, S, D]``, of the call's tokens.
        attention_mask: from :func:`sparsek_mask`.
        scaling: of the logits.
        dropout: must be 0.
        sparsek: from the hook that enable_sparsek has put on the module.

    Returns:
        ``[B, S, Hq, D]``, 0 for padding; and None instead of weights.
    """
    if sparsek is None:
        raise ValueError(
            f"attn_implementation: {IMPLEMENTATION!r} is set by enable_sparsek(model), which this model has not seen "
            "(does it share its config with one that has?)"
        )
    _refuse_unsupported(dropout, kwargs)
    padding = _padding_of(attention_mask)
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave float32 queries and keys beside values in autocast's dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    lengths = None
    if padding is not None:
        lengths = padding.lengths
        query, key, value = (_move(t, padding.to_front, dim=2) for t in (query, key, value))
    scores = sparsek.scores
    if scores is None:
        scores = key_norm_scores(key.detach(), lengths=lengths)
    if sparsek.layer is None:
        options = sparsek.options.arguments()
        out = attention_forward(
            query, key, value, scores, **options, sm_scale=scaling, lengths=lengths
        )
    else:
        out = sparsek.layer.attend(query, key, value, scores, lengths)
    if padding is not None:
        out = _move(out, padding.to_place, dim=2)
    return out.transpose(1, 2), None


def _refuse_unsupported(dropout: float, kwargs: dict) -> None:
    if dropout > 0.0:
        raise NotImplementedError(
            f"attention_dropout: SparseK has no dropout of attention weights, got {dropout}; set "
            "config.attention_dropout = 0"
        )
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: not supported by SparseK attention")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("output_attentions: SparseK attention has no weights to return")


AttentionInterface.register(IMPLEMENTATION, sparsek_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sparsek_mask)


# ---- switching a model ---------------------------------------------------------------------------


@dataclass
class _Enabled:
    """What disable_sparsek needs."""

    options: SparseKOptions
    previous_implementation: str
    handles: list


def enable_sparsek(
    model: PreTrainedModel,
    *,
    num_selected: int = DEFAULT_NUM_SELECTED,
    window: int = DEFAULT_WINDOW,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    num_candidates: int | None = None,
    gate: str | None = None,
    scorer: str = "key_norm",
    position_slope: float = DEFAULT_POSITION_SLOPE,
    score_scale: float = DEFAULT_SCORE_SCALE,
    scorer_hidden_size: int | None = None,
) -> SparseKOptions:
    """Switches every attention layer of a decoder model to SparseK attention, in place.

    Forward, training and ``generate`` work as before: greedy, sampling, beams, padded batches on either side. Under
    ``torch.no_grad()`` the cache that Transformers makes (a ``DynamicCache``) is filled with :class:`SparseKCacheLayer`
    and so keeps ``num_selected + window + chunk_size`` rows per sequence and KV head, whatever the length.

    With ``scorer="learned"`` each attention module gets a :class:`SparseKScorer` on its hidden states, the submodule
    ``sparsek_scorer``: part of the model's parameters and ``state_dict``. It is drawn at random and *has to be trained*.
    With ``scorer="key_norm"`` nothing is added or trained: tokens with small keys are kept. That is a poor guide in models that
    normalise their keys (Qwen3).

    Args:
        model: of type llama, mistral, qwen2 or qwen3, without sliding windows; a causal model, or the decoder alone.
        num_selected, window, chunk_size, num_candidates: as :func:`attention_forward` takes them.
        gate: ``"softmax"``, ``"value"`` or ``"none"``; None: ``"softmax"`` with learned scores, ``"none"`` with key norms.
        scorer: ``"key_norm"`` or ``"learned"``.
        position_slope, score_scale: of the learned scorers.
        scorer_hidden_size: ``mlp_hidden_size`` of the learned scorers.

    Returns:
        The options, shared by all layers; ``num_selected`` may be assigned during training.

    Raises:
        ValueError: a wrong option, or a model that is switched already.
        NotImplementedError: another model type, or sliding windows. The model is unchanged then.

    Example:
        >>> enable_sparsek(model, num_selected=256, window=128, scorer="learned")
        >>> model.load_state_dict(torch.load("scorers.pt"), strict=False)  # what scorer_state_dict(model) gave
        >>> model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=100)
    """
    attentions = _attention_modules(model)
    if model.config._attn_implementation == IMPLEMENTATION:
        raise ValueError(
            f"model: its config says attn_implementation = {IMPLEMENTATION!r} already: enabled on it, on its decoder or on "
            "a model that shares the config (disable_sparsek undoes it), or loaded with it"
        )
    if scorer not in SCORERS:
        raise ValueError(f"scorer: expected one of {', '.join(SCORERS)}, got {scorer!r}")
    if gate is None:
        gate = "softmax" if scorer == "learned" else "none"
    if gate not in GATE_CODES:
        raise ValueError(f"gate: expected one of {', '.join(GATE_CODES)}, got {gate!r}")
    options = SparseKOptions(num_selected, window, chunk_size, num_candidates, gate)
    # The checker of the options, on a single token.
    select(
        torch.zeros(1, 1, 1),
        num_selected=num_selected,
        window=window,
        chunk_size=chunk_size,
        num_candidates=num_candidates,
    )
    scorers = []
    if scorer == "learned":
        for attention in attentions:
            weight = attention.q_proj.weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            scorers.append(
                SparseKScorer(
                    model.config.hidden_size,
                    model.config.num_key_value_heads,
                    position_slope=position_slope,
                    score_scale=score_scale,
                    mlp_hidden_size=scorer_hidden_size,
                    device=weight.device,
                    dtype=dtype,
                )
            )
    previous = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    hook = _AttentionHook(options)
    handles = [
        attention.register_forward_pre_hook(hook, with_kwargs=True) for attention in attentions
    ]
    for attention, its_scorer in zip(attentions, scorers, strict=False):
        attention.add_module(SCORER_NAME, its_scorer)
    setattr(model, _STATE_NAME, _Enabled(options, previous, handles))
    return options


def disable_sparsek(model: PreTrainedModel) -> None:
    """Undoes :func:`enable_sparsek`: the attention that the model had before, without scorers.

    Keep learned scorers with :func:`scorer_state_dict` first.
    """
    enabled = getattr(model, _STATE_NAME, None)
    if enabled is None:
        raise ValueError("model: SparseK is not enabled")
    for handle in enabled.handles:
        handle.remove()
    for attention in _attention_modules(model):
        if hasattr(attention, SCORER_NAME):
            delattr(attention, SCORER_NAME)
    model.set_attn_implementation(enabled.previous_implementation)
    delattr(model, _STATE_NAME)


def scorer_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The learned scorers' part of ``model.state_dict()``; ``model.load_state_dict(…, strict=False)`` takes it back."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if SCORER_NAME in name.split(".")
    }


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules in the order of their layers; NotImplementedError where SparseK cannot take their place."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model: expected a Transformers PreTrainedModel, got {type(model).__name__}"
        )
    config = model.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise NotImplementedError(
            f"model: expected one of the types {', '.join(SUPPORTED_MODEL_TYPES)}, got {config.model_type!r}"
        )
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        is_sliding = getattr(config, "sliding_window", None) is not None
    else:
        is_sliding = any(layer_type != "full_attention" for layer_type in layer_types)
    if is_sliding:
        raise NotImplementedError(
            "model: SparseK takes the place of full attention, got a model with sliding windows "
            f"(sliding_window = {config.sliding_window}, layer_types = {layer_types}); load it with "
            "sliding_window=None or use_sliding_window=False to replace them"
        )
    if not getattr(config, "is_causal", True):
        raise NotImplementedError("model: SparseK is causal, got a config with is_causal = False")
    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]
    if len(attentions) != config.num_hidden_layers:
        raise NotImplementedError(
            f"model: expected {config.num_hidden_layers} attention modules with a q_proj, one a layer, got "
            f"{len(attentions)}"
        )
    return sorted(attentions, key=lambda attention: attention.layer_idx)


def num_cache_bytes(cache: Cache) -> int:
    """Memory of all SparseK layers of a cache, for example of ``generate(…, return_dict_in_generate=True).cache``."""
    layers = [layer for layer in cache.layers if isinstance(layer, SparseKCacheLayer)]
    if len(layers) != len(cache.layers):
        others = {type(layer).__name__ for layer in cache.layers} - {SparseKCacheLayer.__name__}
        raise ValueError(f"cache: expected SparseK layers only, got {', '.join(sorted(others))}")
    return sum(layer.num_bytes for layer in layers)
