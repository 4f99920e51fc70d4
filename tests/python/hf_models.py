"""Small random Transformers models, padded batches, and the models' formula written out."""

from __future__ import annotations

from dataclasses import dataclass

import blackwell_sparsek as bs
import torch
import torch.nn.functional as F
import transformers
from blackwell_sparsek.integrations import hf
from blackwell_sparsek.modules import apply_rotary
from torch import Tensor

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
SMALL = {"num_selected": 6, "window": 5, "chunk_size": 8}
VOCABULARY = 1024
PAD = 0

_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def make_model(family: str = "llama", *, seed: int = 0, **options):
    """Two layers, 4 heads of 8 that share 2 KV heads; weights large enough that attention matters."""
    torch.manual_seed(seed)
    if family == "mistral":
        options = {"sliding_window": None, **options}
    config = _CONFIGS[family](
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "initializer_range": 0.3,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": None,
            **options,
        }
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # No model starts with special norms and biases; trained ones have them.
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def make_switched(family: str = "llama", scorer: str = "learned", *, seed: int = 0, **options):
    """A model with SparseK; positions count enough in the learned scores for a wrong one to show."""
    model = make_model(family, seed=seed)
    if scorer == "learned":
        options = {"position_slope": 0.05, **options}
    hf.enable_sparsek(model, scorer=scorer, **{**SMALL, **options})
    return model


def make_tokens(batch: int, seq_len: int, seed: int = 1) -> Tensor:
    """Without repetition in a row: in the first layer equal tokens have equal key norms, a tie that rounding decides."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCABULARY - 3, generator=generator)[:seq_len] for _ in range(batch)]
    return torch.stack(rows) + 3


@dataclass
class Padded:
    """Rows of different lengths with padding."""

    rows: list[Tensor]  # [length] each
    tokens: Tensor  # [B, S]
    mask: Tensor  # int64 [B, S]


def make_padded(lengths: list[int], seq_len: int, side: str) -> Padded:
    rows = [make_tokens(1, length, seed=10 + length)[0] for length in lengths]
    tokens = torch.full((len(rows), seq_len), PAD)
    mask = torch.zeros_like(tokens)
    generator = torch.Generator().manual_seed(0)
    for b, row in enumerate(rows):
        places = torch.arange(len(row))
        if side == "left":
            places = places + seq_len - len(row)
        elif side == "holes":
            places = torch.randperm(seq_len, generator=generator)[: len(row)].sort().values
        tokens[b, places] = row
        mask[b, places] = 1
    return Padded(rows, tokens, mask)


# ---- a plain decoder -----------------------------------------------------------------------------


def plain_logits(model, tokens: Tensor, **options) -> Tensor:
    """The model's formula written out in float64 for one sequence: [S] -> [S, vocabulary]."""
    weights = {name: w.detach().double() for name, w in model.state_dict().items()}
    config = model.config
    theta = config.rope_parameters["rope_theta"]

    def norm(x, name):
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps)
        return x * scale * weights[f"{name}.weight"]

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    x = F.embedding(tokens, weights["model.embed_tokens.weight"])
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            linear(h, f"{attention}.{name}_proj").unflatten(-1, (-1, config.head_dim))
            for name in "qkv"
        )
        if config.model_type == "qwen3":
            q, k = norm(q, f"{attention}.q_norm"), norm(k, f"{attention}.k_norm")
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        q, k = apply_rotary(q, theta), apply_rotary(k, theta)
        out = plain_attention(model.model.layers[index].self_attn, h, q, k, v, options)
        x = x + linear(out[0].transpose(0, 1).flatten(-2), f"{attention}.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        h = F.silu(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(h, f"{layer}.mlp.down_proj")
    return F.linear(norm(x, "model.norm"), model.lm_head.weight.detach().double())


def plain_attention(module, h: Tensor, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    scorer = getattr(module, "sparsek_scorer", None)
    if scorer is None:
        scores = -k.norm(dim=-1)
        options = {"gate": "none", **options}
    else:
        position = torch.arange(h.shape[0])
        scores = (h @ scorer.weight.detach().double().T).T[None]
        scores = scores + scorer.position_slope * position
    return bs.attention_forward(q, k, v, scores, backend="reference", **{**SMALL, **options})


def assert_logits_close(logits: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Float32 against float64, relative to the largest logit."""
    assert logits.shape == expected.shape
    error = float((logits.double() - expected).abs().max())
    allowed = tolerance * float(expected.abs().max())
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
