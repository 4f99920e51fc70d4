"""Generation with the language model: a cache of every key beside SparseK's, whose memory does not grow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from blackwell_sparsek import SparseKCache, attention_forward
from blackwell_sparsek.modules import apply_rotary
from torch import Tensor

from lm.model import LanguageModel, ModelConfig

CACHES = ("dense", "sparsek")


class LayerCache(Protocol):
    """What a layer needs from its past. All rows of the batch have seen equally many tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> Tensor:
        """Appends the next tokens, a prompt first and single tokens then, and attends from them."""

    @property
    def num_bytes(self) -> int:
        """Memory that is held for the tokens so far."""


class DenseLayerCache:
    """Every key and value. Room for all tokens is allocated at once, so that a step copies one row."""

    def __init__(self, config: ModelConfig, batch_size: int, max_tokens: int, like: Tensor) -> None:
        head_dim = config.hidden_size // config.num_heads
        shape = (batch_size, config.num_kv_heads, max_tokens, head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.num_tokens = 0
        self.enable_gqa = config.num_heads != config.num_kv_heads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> Tensor:
        begin, end = self.num_tokens, self.num_tokens + k.shape[2]
        if begin > 0 and k.shape[2] != 1:
            raise ValueError(f"k: expected one token after the prompt, got {k.shape[2]}")
        self.k[:, :, begin:end], self.v[:, :, begin:end] = k, v
        self.num_tokens = end
        return F.scaled_dot_product_attention(
            q,
            self.k[:, :, :end],
            self.v[:, :, :end],
            is_causal=begin == 0,
            enable_gqa=self.enable_gqa,
        )

    @property
    def num_bytes(self) -> int:
        return 2 * self.k[:, :, : self.num_tokens].numel() * self.k.element_size()


class SparseLayerCache:
    """A SparseKCache. The prompt's own rows are those of the one-shot forward."""

    def __init__(
        self, config: ModelConfig, batch_size: int, like: Tensor, *, has_scorer: bool
    ) -> None:
        self.options = {
            "num_selected": config.num_selected,
            "window": config.window,
            "chunk_size": config.chunk_size,
            # Key norms select keys; as gates they mean nothing.
            "gate": config.gate if has_scorer else "none",
        }
        self.cache = SparseKCache(
            batch_size,
            config.num_kv_heads,
            config.hidden_size // config.num_heads,
            **self.options,
            dtype=like.dtype,
            device=like.device,
        )
        self.is_empty = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> Tensor:
        if not self.is_empty:
            return self.cache.step(q, k, v, scores)
        self.is_empty = False
        self.cache.prefill(k, v, scores)
        return attention_forward(q, k, v, scores, **self.options)

    @property
    def num_bytes(self) -> int:
        return self.cache.num_bytes


class Generator:
    """A model with one cache per layer.

    The dense cache lets every query see its whole past; the SparseK cache does what the model was trained with. A model with
    dense attention has no scorers: there SparseK selects by key norms.

    Args:
        model: with dense or SparseK attention, on its device and in its dtype.
        cache: ``"dense"`` or ``"sparsek"``.
        batch_size: number of sequences.
        max_tokens: of prompt and continuation, which the dense cache allocates.
    """

    def __init__(self, model: LanguageModel, cache: str, batch_size: int, max_tokens: int) -> None:
        config = model.config
        if config.attention not in ("dense", "sparsek"):
            raise ValueError(
                f"model: expected dense or sparsek attention, got {config.attention!r}"
            )
        if cache not in CACHES:
            raise ValueError(f"cache: expected one of {', '.join(CACHES)}, got {cache!r}")
        self.model = model
        self.num_tokens = 0
        like = model.head.weight
        self.layers: list[LayerCache] = [
            DenseLayerCache(config, batch_size, max_tokens, like)
            if cache == "dense"
            else SparseLayerCache(
                config, batch_size, like, has_scorer=hasattr(block.attention, "scorer")
            )
            for block in model.blocks
        ]

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Appends tokens ``[B, n]`` (a prompt first, then one at a time); logits of their successors ``[B, n, 256]``."""
        model = self.model
        x = model.embedding(tokens)
        for block, layer in zip(model.blocks, self.layers, strict=True):
            x = x + self._attention(block.attention, layer, block.attention_norm(x))
            x = x + block.mlp(block.mlp_norm(x))
        self.num_tokens += tokens.shape[1]
        return model.head(model.norm(x))

    def _attention(self, attention, layer: LayerCache, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        theta, offset = self.model.config.rope_theta, self.num_tokens
        scorer = getattr(attention, "scorer", None)
        scores = None if scorer is None else scorer(x, offset)
        out = layer.attend(
            apply_rotary(q, theta, offset), apply_rotary(k, theta, offset), v, scores
        )
        return attention.o_proj(out.transpose(1, 2).flatten(-2))


@dataclass
class Continuation:
    tokens: Tensor  # [B, new tokens]
    num_bytes: int  # that the cache holds at the end
    prompt_seconds: float
    step_seconds: float  # of all steps

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together; the first new token, which the prompt gives, is not counted."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1) / self.step_seconds


def generate(
    generator: Generator,
    prompt: Tensor,
    num_new_tokens: int,
    *,
    temperature: float,
    seed: int,
    report: Callable[[int], None] = lambda num_tokens: None,
) -> Continuation:
    """Continues ``prompt`` [B, n]; temperature 0 takes the most likely token.

    Nothing but the clock waits for the device between steps.
    """
    device = prompt.device
    random = torch.Generator(device=device).manual_seed(seed)

    def next_token(logits: Tensor) -> Tensor:
        if temperature == 0.0:
            return logits[:, -1].argmax(dim=-1, keepdim=True)
        probabilities = (logits[:, -1].float() / temperature).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=random)

    begin = _now(device)
    new = [next_token(generator.logits(prompt))]
    after_prompt = _now(device)
    for _ in range(num_new_tokens - 1):
        new.append(next_token(generator.logits(new[-1])))
        report(len(new))
    end = _now(device)
    tokens = torch.cat(new, dim=1)
    return Continuation(tokens, generator.num_bytes, after_prompt - begin, end - after_prompt)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
