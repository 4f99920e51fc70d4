"""The float64 reference against an independent dense formula, gradients against autograd of that formula."""

from __future__ import annotations

import blackwell_sparsek as bs
import dense_formula
import pytest
import torch
from case_table import load_cases, make_inputs
from conftest import dense_attention_of, dense_selection_of, expected_of, find_case

CASES = load_cases()
# The dense formula holds [Sq, Sk] matrices and their gradients; the longest cases add nothing here.
GRADIENT_CASES = [case for case in CASES if case.seq_len_k <= 1000]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection(case):
    selection = expected_of(case).selection
    inputs = make_inputs(case)
    dense = dense_selection_of(case)
    # Chunks that start beyond the sequence hold unspecified values.
    exists = torch.arange(case.num_chunks) * case.chunk_size < (
        case.seq_len_k if inputs.lengths is None else inputs.lengths[:, None, None]
    )
    exists = exists.expand(dense.threshold.shape)
    assert torch.equal(selection.expiry, dense_formula.expiry_of(dense, inputs.lengths))
    last_candidate = dense_formula.last_candidate_of(dense)
    assert torch.equal(selection.last_candidate[exists], last_candidate[exists])
    torch.testing.assert_close(
        selection.threshold[exists], dense.threshold[exists], rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case):
    expected = expected_of(case)
    out, lse = dense_attention_of(case, expected.inputs)
    torch.testing.assert_close(expected.out, out, rtol=0, atol=1e-11)
    torch.testing.assert_close(expected.lse, lse, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients(case):
    inputs = make_inputs(case)
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(inputs.q.shape, generator=generator, dtype=torch.float64)

    def leaves():
        tensors = (inputs.q, inputs.k, inputs.v, inputs.scores.double())
        return [tensor.clone().requires_grad_() for tensor in tensors]

    ours = leaves()
    out = bs.attention_forward(*ours, **case.options, lengths=inputs.lengths, backend="reference")
    out.backward(dout)
    dense = leaves()
    out, _ = dense_formula.dense_attention(
        *dense, inputs.lengths, dense_selection_of(case), case.num_selected, case.gate
    )
    out.backward(dout)
    for name, mine, theirs in zip(("dq", "dk", "dv", "dscores"), ours, dense, strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        scale = max(1.0, float(expected.abs().max()))
        error = float((mine.grad - expected).abs().max())
        assert error <= 1e-10 * scale, f"{name}: error {error:.3e} at scale {scale:.3e}"


@pytest.mark.parametrize("gate", ["none", "value", "softmax"])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_gradcheck(gate, chunk_size):
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v, scores = leaf(2, 4, 9, 3), leaf(2, 2, 13, 3), leaf(2, 2, 13, 3), leaf(2, 2, 13)
    lengths = torch.tensor([13, 9], dtype=torch.int32)

    def attention(*tensors):
        return bs.attention_forward(
            *tensors,
            num_selected=3,
            window=1,
            chunk_size=chunk_size,
            gate=gate,
            lengths=lengths,
            backend="reference",
        )

    assert torch.autograd.gradcheck(attention, (q, k, v, scores))


def test_the_threshold_has_a_gradient_of_its_own():
    """A key in the threshold's support but outside the top k moves every gate, and gets a gradient for it."""
    scores = torch.tensor([0.9, 0.7, 0.6, 0.0], dtype=torch.float64).reshape(1, 1, 4)
    scores.requires_grad_()
    q = k = torch.ones(1, 1, 4, 1, dtype=torch.float64)
    v = torch.arange(4, dtype=torch.float64).reshape(1, 1, 4, 1)
    out = bs.attention_forward(
        q,
        k,
        v,
        scores,
        num_selected=2,
        window=0,
        chunk_size=1,
        num_candidates=3,
        backend="reference",
    )
    out[0, 0, 3].sum().backward()
    # Query 3 selects keys 0 and 1; key 2 is a candidate within 1 of the threshold.
    gradient = scores.grad[0, 0]
    assert gradient[2] != 0
    assert gradient[3] == 0
    torch.testing.assert_close(gradient.sum(), torch.zeros((), dtype=torch.float64))


def test_double_backward_is_refused():
    case = find_case("two_tokens")
    inputs = make_inputs(case)
    q = inputs.q.clone().requires_grad_()
    out = bs.attention_forward(q, inputs.k, inputs.v, inputs.scores, backend="reference")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    inputs = make_inputs(find_case("group_3"))
    case = find_case("group_3")
    out, lse = bs.attention_forward(
        inputs.q.to(dtype),
        inputs.k.to(dtype),
        inputs.v.to(dtype),
        inputs.scores,
        **case.options,
        return_lse=True,
        backend="reference",
    )
    expected = expected_of(case)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The stored result is the exact one, rounded once. Thresholds differ by their rounding to float32.
    torch.testing.assert_close(out.double(), expected.out, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_key_norm_scores():
    k = torch.randn(2, 3, 17, 24, dtype=torch.float64)
    scores = bs.key_norm_scores(k, backend="reference")
    torch.testing.assert_close(scores, -k.norm(dim=-1))
