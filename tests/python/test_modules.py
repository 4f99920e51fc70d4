"""SparseKScorer and SparseKAttention."""

from __future__ import annotations

import blackwell_sparsek as bs
import pytest
import torch
from blackwell_sparsek.modules import apply_rotary, rotary_table, rotate
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

SMALL = {"num_selected": 4, "window": 2, "chunk_size": 8}


def make_attention(seed: int = 0, **options) -> bs.SparseKAttention:
    """32 hidden units, 4 heads of 8 that share 2 KV heads."""
    torch.manual_seed(seed)
    options = {"rope_theta": 100.0, "backend": "reference", **SMALL, **options}
    return bs.SparseKAttention(32, 4, 2, **options)


def make_hidden(batch: int = 2, seq_len: int = 37, hidden_size: int = 32, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq_len, hidden_size, generator=generator)


class PlainAttention(nn.Module):
    """Dense causal attention with the same parameters, written out."""

    def __init__(self, rope_theta: float | None, bias: bool = False) -> None:
        super().__init__()
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(32, 32, bias=bias)
        self.k_proj = nn.Linear(32, 16, bias=bias)
        self.v_proj = nn.Linear(32, 16, bias=bias)
        self.o_proj = nn.Linear(32, 32, bias=bias)

    def forward(self, x):
        batch, seq_len, _ = x.shape

        def split(y):
            return y.reshape(batch, seq_len, -1, 8).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if self.rope_theta is not None:
            q, k = rotate_as_complex(q, self.rope_theta), rotate_as_complex(k, self.rope_theta)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq_len, -1))


def rotate_as_complex(x, theta: float, offset: int = 0):
    """RoPE as a product of complex numbers x_d + i x_{d + D/2} with exp(i · position · frequency)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    position = torch.arange(offset, offset + x.shape[-2], dtype=torch.float64)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), position[:, None] * frequency)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


# ---- scorer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp_hidden_size", [None, 64])
def test_scores(mlp_hidden_size):
    scorer = bs.SparseKScorer(32, 3, mlp_hidden_size=mlp_hidden_size, position_slope=0.5)
    hidden = make_hidden()
    scores = scorer(hidden)
    assert scores.shape == (2, 3, 37)
    assert scores.dtype == torch.float32
    features = hidden
    if mlp_hidden_size is not None:
        features = nn.functional.gelu(hidden @ scorer.mlp_weight.T)
    expected = torch.einsum("bsc,hc->bhs", features, scorer.weight) + 0.5 * torch.arange(37.0)
    torch.testing.assert_close(scores, expected)


def test_offset_of_scores():
    """Scores of a sequence's second part, told where it starts, are those of the whole."""
    scorer = bs.SparseKScorer(32, 2, position_slope=0.01)
    hidden = make_hidden()
    whole = scorer(hidden)
    torch.testing.assert_close(scorer(hidden[:, 20:], offset=20), whole[:, :, 20:])
    offsets = torch.tensor([3, 1_000_000])
    ragged = scorer(hidden, offset=offsets)
    torch.testing.assert_close(ragged[0], whole[0] + 0.03)
    torch.testing.assert_close(ragged[1], whole[1] + 10_000.0)


@pytest.mark.parametrize("mlp_hidden_size", [None, 256])
def test_scale_of_scores_at_initialisation(mlp_hidden_size):
    """The spread is what was asked for, and the gate's support is of the order of k."""
    torch.manual_seed(0)
    hidden = nn.functional.rms_norm(torch.randn(1, 4096, 512), (512,))
    scorer = bs.SparseKScorer(512, 8, mlp_hidden_size=mlp_hidden_size, position_slope=0.0)
    scores = scorer(hidden).detach()
    assert scores.std(dim=-1).mean() == pytest.approx(scorer.score_scale, rel=0.1)
    assert 1.2 < support_over_k(scores, 256) < 1.8
    # The usual initialisation of a linear layer in a language model: the support is 2.5 times as large.
    assert support_over_k(0.02 * 512**0.5 * scores / scorer.score_scale, 256) > 3.5


def support_over_k(scores, k: int) -> float:
    """Keys of the last pool with a positive gate, as a multiple of k."""
    selection = bs.select(scores, num_selected=k, window=0, chunk_size=128)
    pool = scores[:, :, : scores.shape[2] - 128]
    return float((pool > selection.threshold[:, :, -1:]).sum(dim=-1).float().mean() / k)


def test_scores_are_float32_under_autocast_and_in_a_bfloat16_module():
    hidden = make_hidden()
    scorer = bs.SparseKScorer(32, 2, mlp_hidden_size=16)
    expected = scorer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(hidden), expected)
        assert scorer(hidden.bfloat16()).dtype == torch.float32
    half = scorer.bfloat16()(hidden.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05)


def test_initialisers_of_linear_layers_leave_the_scorer_alone():
    attention = make_attention()
    before = attention.scorer.weight.clone()
    for module in attention.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
    assert torch.equal(attention.scorer.weight, before)


# ---- rotary position embedding -------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 11])
def test_rotary(offset):
    x = torch.randn(2, 3, 19, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        apply_rotary(x, 100.0, offset), rotate_as_complex(x, 100.0, offset), rtol=1e-5, atol=1e-5
    )
    assert apply_rotary(x.bfloat16(), 100.0).dtype == torch.bfloat16
    assert apply_rotary(x.double(), 100.0).dtype == torch.float64


def test_rotary_depends_on_distances_alone():
    q, k = torch.randn(2, 1, 1, 6, 8, generator=torch.Generator().manual_seed(0)).double()
    near = apply_rotary(q, 100.0) @ apply_rotary(k, 100.0).mT
    far = apply_rotary(q, 100.0, 40) @ apply_rotary(k, 100.0, 40).mT
    torch.testing.assert_close(near, far)


def test_one_table_of_angles_serves_all_layers():
    x = make_hidden()
    attention = make_attention()
    table = rotary_table(37, 8, 100.0)
    assert torch.equal(attention(x, rotary=table), attention(x))
    other = rotary_table(37, 8, 100.0, offset=5)
    q = torch.randn(1, 2, 37, 8)
    assert torch.equal(rotate(q, *other), apply_rotary(q, 100.0, 5))


# ---- attention layer -----------------------------------------------------------------------------


def test_parameter_names_and_shapes():
    attention = make_attention(bias=True, output_bias=False)
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "q_proj.weight": (32, 32),
        "q_proj.bias": (32,),
        "k_proj.weight": (16, 32),
        "k_proj.bias": (16,),
        "v_proj.weight": (16, 32),
        "v_proj.bias": (16,),
        "o_proj.weight": (32, 32),
        "scorer.weight": (2, 32),
    }
    assert not list(attention.buffers())
    wide = bs.SparseKAttention(32, 4, head_dim=16, scorer_hidden_size=5, **SMALL)
    assert wide.q_proj.weight.shape == wide.k_proj.weight.shape == (64, 32)
    assert wide.scorer.mlp_weight.shape == (5, 32)
    with torch.no_grad():
        assert wide(make_hidden()).shape == (2, 37, 32)


@pytest.mark.parametrize("rope_theta", [None, 100.0])
@pytest.mark.parametrize("gate", ["softmax", "value", "none"])
def test_equals_dense_attention_where_everything_is_selected(rope_theta, gate):
    """A dense layer's weights load, and with k >= S the scorer has no say."""
    torch.manual_seed(3)
    plain = PlainAttention(rope_theta, bias=True)
    options = {"rope_theta": rope_theta, "gate": gate, "bias": True}
    attention = make_attention(num_selected=37, **options)
    missing, unexpected = attention.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["scorer.weight"]
    assert not unexpected
    x = make_hidden()
    torch.testing.assert_close(attention(x), plain(x), rtol=1e-4, atol=1e-5)


def test_equals_the_composition_of_its_parts():
    attention = make_attention(num_candidates=9, gate="value", sm_scale=0.2)
    x = make_hidden()
    q, k, v = (
        projection(x).reshape(2, 37, -1, 8).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary(q, 100.0), apply_rotary(k, 100.0)
    options = {**SMALL, "num_candidates": 9, "gate": "value", "sm_scale": 0.2}
    out = bs.attention_forward(q, k, v, attention.scorer(x), **options, backend="reference")
    expected = attention.o_proj(out.transpose(1, 2).reshape(2, 37, 32))
    assert torch.equal(attention(x), expected)


def test_causal():
    attention = make_attention()
    x = make_hidden()
    changed = x.clone()
    changed[:, 25:] += 1
    before, after = attention(x), attention(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


def test_lengths():
    """Padding is read by no one."""
    attention = make_attention()
    x = make_hidden()
    lengths = torch.tensor([37, 20], dtype=torch.int32)
    padded = x.clone()
    padded[1, 20:] = 7.0
    out = attention(padded, lengths=lengths)
    torch.testing.assert_close(out[0], attention(x)[0])
    torch.testing.assert_close(out[1, :20], attention(x[1:, :20])[0])
    assert torch.equal(out[1, 20:], torch.zeros(17, 32))


@pytest.mark.parametrize("mlp_hidden_size", [None, 6])
@pytest.mark.parametrize("gate", ["softmax", "value"])
def test_gradients_reach_every_parameter(gate, mlp_hidden_size):
    attention = make_attention(gate=gate, scorer_hidden_size=mlp_hidden_size)
    x = make_hidden().requires_grad_()
    attention(x).square().sum().backward()
    for name, parameter in [*attention.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_against_finite_differences():
    attention = make_attention(scorer_hidden_size=4).double()
    x = make_hidden(batch=1, seq_len=20).double()
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(attention, dict(zip(names, values, strict=True)), (x,))

    leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    # Fast mode: one random direction per tensor.
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_shift_of_all_scores_changes_nothing():
    """Why the scorer has no bias: a shift moves the threshold along."""
    attention = make_attention()
    x = make_hidden()
    shift = torch.zeros(1, requires_grad=True)
    scorer = attention.scorer.forward
    attention.scorer.forward = lambda hidden: scorer(hidden) + shift
    out = attention(x)
    out.square().sum().backward()
    assert shift.grad.abs() < 1e-4
    with torch.no_grad():
        shift += 3
    torch.testing.assert_close(attention(x), out, rtol=1e-4, atol=1e-5)


def test_annealing_by_assignment():
    attention = make_attention(num_selected=37)
    x = make_hidden()
    dense = attention(x)
    attention.num_selected = 4
    assert not torch.allclose(attention(x), dense)
    expected = make_attention()
    expected.load_state_dict(attention.state_dict())
    assert torch.equal(attention(x), expected(x))


def test_autocast():
    attention = make_attention()
    x = make_hidden()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(x), rtol=0.1, atol=0.05)
    out.float().square().sum().backward()
    assert attention.scorer.weight.grad.dtype == torch.float32
    assert attention.scorer.weight.grad.abs().max() > 0


def test_bfloat16_module():
    attention = make_attention().bfloat16()
    x = make_hidden().bfloat16()
    out = attention(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert attention.scorer.weight.grad.dtype == torch.bfloat16


def gradients_of(function, attention, x) -> list:
    attention.zero_grad()
    function(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in attention.parameters()]


def test_compiled():
    attention = make_attention()
    x = make_hidden()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))
    for mine, theirs in zip(
        gradients_of(compiled, attention, x), gradients_of(attention, attention, x), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    attention = make_attention()
    x = make_hidden().requires_grad_()

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(attention, x, use_reentrant=use_reentrant)

    for mine, theirs in zip(
        gradients_of(checkpointed, attention, x),
        gradients_of(attention, attention, x),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_the_fastest_kernel_agrees_with_the_reference():
    attention = make_attention()
    x = make_hidden()
    expected = attention(x)
    attention.backend = None
    with torch.no_grad():
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_state_dict_and_copies(tmp_path):
    attention = make_attention()
    torch.save(attention.state_dict(), tmp_path / "attention.pt")
    other = make_attention(seed=9)
    other.load_state_dict(torch.load(tmp_path / "attention.pt"))
    x = make_hidden()
    assert torch.equal(other(x), attention(x))


# ---- wrong calls ---------------------------------------------------------------------------------

WRONG_ATTENTIONS = {
    "hidden_size: expected a multiple of num_heads = 3": {"num_heads": 3},
    "num_kv_heads: expected a divisor of num_heads = 4": {"num_kv_heads": 3},
    "num_kv_heads: expected at least 1": {"num_kv_heads": 0},
    "num_heads: expected at least 1": {"num_heads": 0},
    "head_dim: expected at least 1": {"head_dim": 0},
    "chunk_size: expected at least 1": {"chunk_size": 0},
    "num_selected: expected at least 0": {"num_selected": -1},
    "window: expected at least 0": {"window": -1},
    "num_candidates: expected at least 4, got 3": {"num_candidates": 3},
    "gate: expected one of none, value, softmax, got 'hard'": {"gate": "hard"},
    "rope_theta: expected more than 0 and an even head_dim": {"rope_theta": 100.0, "head_dim": 5},
    "rope_theta: expected more than 0 and an even head_dim, got 0": {"rope_theta": 0.0},
    "score_scale: expected more than 0": {"score_scale": 0.0},
    "mlp_hidden_size: expected at least 1": {"scorer_hidden_size": 0},
}


@pytest.mark.parametrize("message", WRONG_ATTENTIONS)
def test_wrong_attention(message):
    arguments = {"hidden_size": 32, "num_heads": 4, **SMALL, **WRONG_ATTENTIONS[message]}
    with pytest.raises(ValueError, match=message):
        bs.SparseKAttention(**arguments)


def test_wrong_inputs():
    attention = make_attention()
    with pytest.raises(ValueError, match=r"x: expected shape \[B, S, 32\], got \[2, 37, 31\]"):
        attention(torch.randn(2, 37, 31))
    with pytest.raises(ValueError, match=r"x: expected shape"):
        attention(torch.randn(37, 32))
    with pytest.raises(ValueError, match=r"hidden: expected shape"):
        attention.scorer(torch.randn(37, 32))
    with pytest.raises(ValueError, match=r"offset: expected an integer or shape \[2\]"):
        attention.scorer(make_hidden(), offset=torch.tensor([1, 2, 3]))
    attention.backend = "fastest"
    with pytest.raises(ValueError, match="backend: expected one of"):
        attention(make_hidden())
