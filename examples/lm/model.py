"""A decoder language model over bytes (RMSNorm, RoPE, SwiGLU) whose attention is exchangeable.

``dense``   every earlier key, through PyTorch's SDPA
``window``  the last ``num_selected + window`` keys before the query's chunk, and those of the chunk: as many as SparseK sees
``sparsek`` ``num_selected`` keys chosen by a learned scorer, the last ``window`` before the chunk, and those of the chunk

The three have the same parameters with the same names and initial values; SparseK adds the scorer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from blackwell_sparsek import SparseKAttention, attention_forward
from blackwell_sparsek.modules import rotary_table, rotate
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

ATTENTIONS = ("dense", "window", "sparsek")
WINDOW_KERNELS = ("sparsek", "flex")
VOCABULARY_SIZE = 256  # bytes


@dataclass
class ModelConfig:
    attention: str = "sparsek"
    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    num_selected: int = 64
    window: int = 32
    chunk_size: int = 32
    gate: str = "softmax"
    rope_theta: float = 10_000.0
    backend: str | None = None
    window_kernel: str = "sparsek"  # of the window variant; flex: FlexAttention, on a GPU

    @property
    def mlp_size(self) -> int:
        """SwiGLU's three matrices at 8/3 of the hidden size cost as much as two at four times it."""
        return -(-8 * self.hidden_size // 3 // 64) * 64


class DenseAttention(nn.Module):
    """Causal attention to every earlier key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_heads
        kv_size = config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, *, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(rotate(q, *rotary), rotate(k, *rotary), v)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        enable_gqa = self.config.num_heads != self.config.num_kv_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)


class WindowAttention(DenseAttention):
    """Causal attention to as many keys as SparseK sees, all of them recent."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(
            q,
            k,
            v,
            num_selected=0,
            window=self.config.num_selected + self.config.window,
            chunk_size=self.config.chunk_size,
            backend=self.config.backend,
        )


# Compiled on first use; FlexAttention that is not compiled makes the whole matrix of logits.
_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


class FlexWindowAttention(DenseAttention):
    """The keys of WindowAttention through FlexAttention. Its mask has to be set for the sequence length first."""

    mask: BlockMask | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        enable_gqa = self.config.num_heads != self.config.num_kv_heads
        return _compiled_flex_attention(q, k, v, block_mask=self.mask, enable_gqa=enable_gqa)


def window_mask(config: ModelConfig, seq_len: int, device: torch.device | str) -> BlockMask:
    """Which keys a query of the window variant sees."""
    window, chunk_size = config.num_selected + config.window, config.chunk_size

    def sees(_batch, _head, query, key):
        return (key <= query) & (key >= query // chunk_size * chunk_size - window)

    return create_block_mask(sees, B=None, H=None, Q_LEN=seq_len, KV_LEN=seq_len, device=device)


def make_attention(config: ModelConfig) -> nn.Module:
    if config.attention == "dense":
        return DenseAttention(config)
    if config.attention == "window":
        if config.window_kernel not in WINDOW_KERNELS:
            raise ValueError(
                f"window_kernel: expected one of {', '.join(WINDOW_KERNELS)}, got {config.window_kernel!r}"
            )
        return {"sparsek": WindowAttention, "flex": FlexWindowAttention}[config.window_kernel](
            config
        )
    if config.attention == "sparsek":
        return SparseKAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            num_selected=config.num_selected,
            window=config.window,
            chunk_size=config.chunk_size,
            gate=config.gate,
            rope_theta=config.rope_theta,
            backend=config.backend,
        )
    raise ValueError(
        f"attention: expected one of {', '.join(ATTENTIONS)}, got {config.attention!r}"
    )


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Normalisation before attention: the scorer sees hidden states with a root mean square of 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = make_attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary=rotary)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Tokens ``[B, S]`` to the logits of their successors ``[B, S, 256]``."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)  # for the scorers, which initialise themselves
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY_SIZE, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, VOCABULARY_SIZE, bias=False)
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        """Draws from its own generator, so that variants with and without scorers start alike."""
        nn.init.normal_(self.embedding.weight, generator=generator)
        depth = 2 * len(self.blocks)  # how many branches add up in the residual stream
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            std = module.in_features**-0.5
            if name.endswith(("o_proj", "down_proj")):
                std *= depth**-0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
        nn.init.zeros_(self.head.weight)  # the first guess is uniform over bytes

    def forward(self, tokens: Tensor, blocks: Sequence | None = None) -> Tensor:
        """``blocks``: what to call instead of the model's own blocks, for example the same ones compiled."""
        x = self.embedding(tokens)
        head_dim = self.config.hidden_size // self.config.num_heads
        rotary = rotary_table(
            tokens.shape[1], head_dim, self.config.rope_theta, device=tokens.device
        )
        for block in self.blocks if blocks is None else blocks:
            x = block(x, rotary)
        return self.head(self.norm(x))

    def set_seq_len(self, seq_len: int) -> None:
        """Prepares what depends on the length of the sequences: FlexAttention's mask, one for all layers."""
        layers = [b.attention for b in self.blocks if isinstance(b.attention, FlexWindowAttention)]
        if layers:
            mask = window_mask(self.config, seq_len, self.head.weight.device)
            for layer in layers:
                layer.mask = mask

    def sparse_layers(self) -> list[SparseKAttention]:
        return [block.attention for block in self.blocks if self.config.attention == "sparsek"]

    def set_num_selected(self, num_selected: int) -> None:
        for layer in self.sparse_layers():
            layer.num_selected = num_selected

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def load_dense(model: LanguageModel, state: dict[str, Tensor]) -> None:
    """Loads a dense model's weights into one with SparseK attention; the scorers keep their initial values."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if ".scorer." not in name]
    if missing or unexpected:
        raise ValueError(
            f"checkpoint: expected the weights of a dense model of the same size, missing {missing}, "
            f"unexpected {unexpected}"
        )
