"""Correctness of what was timed: sampled (batch, head) pairs against fp64."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from configuration import Configuration, Inputs

# passed = allclose(rtol, atol) against fp64. These are 2 and 4 unit roundoffs of float16, whose tolerance
# float32 shares. bfloat16 keeps three bits fewer, so that rounding the output alone may exceed
# them where |out| > 0.5: it is given the same number of its own roundoffs, 8 times as much.
_TOLERANCE = {"float32": (1e-3, 2e-3), "float16": (1e-3, 2e-3), "bfloat16": (8e-3, 1.6e-2)}

# Gradients pass below this ‖x − reference‖ / ‖reference‖: about four times what rounding q, k, v, p and the result to the
# dtype gives.
_GRADIENT_TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}

# At most this many query rows of a pair are compared where the reference is dense attention.
_MAX_DENSE_ROWS = 2048


@dataclass(frozen=True)
class Accuracy:
    max_diff: float
    mean_diff: float
    passed: bool
    rtol: float
    atol: float
    pairs: int

    def to_dict(self) -> dict:
        return asdict(self)


def compare(outputs: list[torch.Tensor], references: list[torch.Tensor], dtype: str) -> Accuracy:
    """Differences over all sampled pairs; a NaN on either side fails."""
    rtol, atol = _TOLERANCE[dtype]
    out = torch.cat([o.double().cpu().flatten() for o in outputs])
    reference = torch.cat([r.double().cpu().flatten() for r in references])
    difference = (out - reference).abs()
    return Accuracy(
        max_diff=difference.max().item(),
        mean_diff=difference.mean().item(),
        passed=torch.allclose(out, reference, rtol=rtol, atol=atol),
        rtol=rtol,
        atol=atol,
        pairs=len(outputs),
    )


def sample_pairs(configuration: Configuration, count: int, seed: int) -> list[tuple[int, int]]:
    """Up to `count` distinct (batch, query head) pairs."""
    total = configuration.batch * configuration.heads
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(total, generator=generator)[:count].tolist()
    return [divmod(index, configuration.heads) for index in chosen]


def _pair(inputs: Inputs, configuration: Configuration, pair: tuple[int, int]) -> Inputs:
    """The inputs of one (batch, query head), as tensors with one batch entry and one head."""
    b, h = pair
    h_kv = h // (configuration.heads // configuration.kv_heads)
    return Inputs(
        q=inputs.q[b : b + 1, h : h + 1],
        k=inputs.k[b : b + 1, h_kv : h_kv + 1],
        v=inputs.v[b : b + 1, h_kv : h_kv + 1],
        scores=inputs.scores[b : b + 1, h_kv : h_kv + 1],
    )


def sparse_accuracy(
    out: torch.Tensor, inputs: Inputs, configuration: Configuration, pairs: list[tuple[int, int]]
) -> Accuracy:
    """BlackwellSparseK's output against its fp64 reference backend."""
    from blackwell_sparsek import attention_forward

    outputs, references = [], []
    for b, h in pairs:
        pair = _pair(inputs, configuration, (b, h))
        references.append(
            attention_forward(
                pair.q.double().cpu(),
                pair.k.double().cpu(),
                pair.v.double().cpu(),
                pair.scores.cpu(),
                gate=configuration.gate,
                backend="reference",
                **configuration.selection(),
            )
        )
        outputs.append(out[b : b + 1, h : h + 1])
    return compare(outputs, references, configuration.dtype)


@dataclass(frozen=True)
class GradientAccuracy:
    relative_error: dict[str, float]
    passed: bool
    tolerance: float
    pairs: int

    def to_dict(self) -> dict:
        return asdict(self)


def sample_kv_pairs(configuration: Configuration, count: int, seed: int) -> list[tuple[int, int]]:
    """Up to `count` distinct (batch, KV head) pairs."""
    return sample_pairs(replace(configuration, heads=configuration.kv_heads), count, seed)


def gradient_accuracy(
    gradients: tuple[torch.Tensor, ...],
    inputs: Inputs,
    dout: torch.Tensor,
    configuration: Configuration,
    pairs: list[tuple[int, int]],
) -> GradientAccuracy:
    """dq, dk, dv and, where there are four, dscores of (batch, KV head) pairs against the fp64 reference backend."""
    from blackwell_sparsek import attention_forward

    c = configuration
    group = c.heads // c.kv_heads
    names = ("dq", "dk", "dv", "dscores")[: len(gradients)]
    squares = {name: [0.0, 0.0] for name in names}  # of the difference and of the reference
    for b, h in pairs:
        heads = {"q": slice(h * group, (h + 1) * group), "kv": slice(h, h + 1)}

        def pair(tensor: torch.Tensor, kind: str, b=b, heads=heads) -> torch.Tensor:
            return tensor[b : b + 1, heads[kind]].detach().double().cpu()

        leaves = [
            pair(inputs.q, "q"),
            *(pair(t, "kv") for t in (inputs.k, inputs.v, inputs.scores)),
        ]
        wanted = [leaf.requires_grad_() for leaf in leaves[: len(names)]]
        out = attention_forward(*leaves, gate=c.gate, backend="reference", **c.selection())
        references = torch.autograd.grad(out, wanted, pair(dout, "q"))
        for name, gradient, reference in zip(names, gradients, references, strict=True):
            difference = pair(gradient, "q" if name == "dq" else "kv") - reference
            squares[name][0] += difference.square().sum().item()
            squares[name][1] += reference.square().sum().item()
    errors = {name: (d / max(r, 1e-300)) ** 0.5 for name, (d, r) in squares.items()}
    tolerance = _GRADIENT_TOLERANCE[c.dtype]
    return GradientAccuracy(
        relative_error=errors,
        # Written so that a NaN fails.
        passed=all(error <= tolerance for error in errors.values()),
        tolerance=tolerance,
        pairs=len(pairs),
    )


def dense_rows(seq_len_q: int, limit: int = _MAX_DENSE_ROWS) -> torch.Tensor:
    """The query rows that a dense reference is computed for: all, or `limit` spread evenly."""
    if seq_len_q <= limit:
        return torch.arange(seq_len_q)
    return torch.linspace(0, seq_len_q - 1, limit).long()


def dense_reference(pair: Inputs, rows: torch.Tensor) -> torch.Tensor:
    """Causal attention in fp64 for the given query rows of one pair, a block of rows at a time."""
    q, k, v = (t[0, 0].double() for t in (pair.q, pair.k, pair.v))
    rows = rows.to(q.device)
    offset = k.shape[0] - q.shape[0]
    columns = torch.arange(k.shape[0], device=q.device)
    blocks = []
    for block in rows.split(256):
        s = (q[block] @ k.T) * q.shape[1] ** -0.5
        s.masked_fill_(columns > (block + offset)[:, None], -torch.inf)
        blocks.append(s.softmax(dim=-1) @ v)
    return torch.cat(blocks)


def dense_accuracy(
    out: torch.Tensor, inputs: Inputs, configuration: Configuration, pairs: list[tuple[int, int]]
) -> Accuracy:
    """A dense causal peer's output [B, H, Sq, D] against fp64 attention."""
    rows = dense_rows(configuration.seq_len_q)
    references = [dense_reference(_pair(inputs, configuration, pair), rows) for pair in pairs]
    outputs = [out[b, h][rows.to(out.device)] for b, h in pairs]
    return compare(outputs, references, configuration.dtype)
