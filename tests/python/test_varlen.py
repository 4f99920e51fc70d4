"""Packed sequences: attention_varlen_forward equals one attention_forward per sequence."""

from __future__ import annotations

import itertools

import blackwell_sparsek as bs
import pytest
import torch
from conftest import default_dtype

# (queries, keys) of each sequence.
BATCHES = {
    "even": [(64, 64)] * 4,
    "ragged": [(1, 1), (127, 127), (128, 128), (129, 129), (513, 513)],
    "few_queries": [(1, 300), (5, 5), (100, 700), (1, 1)],
    "with_empty": [(0, 0), (50, 50), (0, 70), (0, 0), (33, 40)],
    "one": [(200, 200)],
}


def pack(sizes, device, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype=None):
    generator = torch.Generator().manual_seed(21)
    dtype = dtype or default_dtype(device)
    cu_seqlens_q = [0, *itertools.accumulate(q for q, _ in sizes)]
    cu_seqlens_k = [0, *itertools.accumulate(k for _, k in sizes)]

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q = normal(cu_seqlens_q[-1], num_q_heads, head_dim)
    k = normal(cu_seqlens_k[-1], num_kv_heads, head_dim)
    v = normal(cu_seqlens_k[-1], num_kv_heads, head_dim)
    scores = torch.randn(cu_seqlens_k[-1], num_kv_heads, generator=generator).to(device)
    starts = (
        torch.tensor(s, dtype=torch.int32, device=device) for s in (cu_seqlens_q, cu_seqlens_k)
    )
    return q, k, v, scores, *starts


def one_by_one(q, k, v, scores, cu_seqlens_q, cu_seqlens_k, **options):
    outs, lses = [], []
    for (begin_q, end_q), (begin_k, end_k) in zip(
        itertools.pairwise(cu_seqlens_q.tolist()),
        itertools.pairwise(cu_seqlens_k.tolist()),
        strict=True,
    ):
        out, lse = bs.attention_forward(
            q[begin_q:end_q].transpose(0, 1)[None],
            k[begin_k:end_k].transpose(0, 1)[None],
            v[begin_k:end_k].transpose(0, 1)[None],
            None if scores is None else scores[begin_k:end_k].T[None],
            **options,
            return_lse=True,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].T)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("gate", ["none", "value", "softmax"])
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_one_call_per_sequence(batch, chunk_size, gate, target):
    packed = pack(BATCHES[batch], target.device)
    options = {
        "num_selected": 32,
        "window": 20,
        "chunk_size": chunk_size,
        "gate": gate,
        "backend": target.backend,
    }
    out, lse = bs.attention_varlen_forward(*packed, **options, return_lse=True)
    expected, expected_lse = one_by_one(*packed, **options)
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_against_reference(target):
    dtype = target.dtypes[-1]
    packed = pack(BATCHES["few_queries"], target.device, dtype=dtype)
    options = {"num_selected": 32, "window": 20, "chunk_size": 16}
    out = bs.attention_varlen_forward(*packed, **options, backend=target.backend)
    expected = bs.attention_varlen_forward(*packed, **options, backend="reference")
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_key_norm_scores_are_the_default(device):
    q, k, v, _, *starts = pack(BATCHES["ragged"], device)
    out = bs.attention_varlen_forward(q, k, v, None, *starts, num_selected=32)
    expected, _ = one_by_one(q, k, v, None, *starts, num_selected=32)
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_strided_inputs(device):
    """q, k and v as slices of one fused projection; scores of any strides."""
    q, k, v, scores, *starts = pack(BATCHES["ragged"], device)
    fused = torch.cat([q, k, v], dim=1)
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    out = bs.attention_varlen_forward(*views, scores.T.contiguous().T, *starts, num_selected=32)
    expected = bs.attention_varlen_forward(q, k, v, scores, *starts, num_selected=32)
    tolerance = 2 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_nan_stays_in_its_sequence(device):
    q, k, v, scores, *starts = pack(BATCHES["ragged"], device)
    clean = bs.attention_varlen_forward(q, k, v, scores, *starts, num_selected=32)
    begin, end = starts[1][2].item(), starts[1][3].item()
    k[begin:end] = float("nan")
    v[begin:end] = float("nan")
    out = bs.attention_varlen_forward(q, k, v, scores, *starts, num_selected=32)
    others = torch.ones(len(q), dtype=torch.bool, device=device)
    others[begin:end] = False
    assert torch.equal(out[others], clean[others])


def test_empty(device):
    q, k, v, scores, *starts = pack([], device)
    out, lse = bs.attention_varlen_forward(q, k, v, scores, *starts, return_lse=True)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_reference_gradients():
    q, k, v, scores, *starts = pack(
        [(3, 5), (0, 2), (4, 4)], "cpu", head_dim=3, dtype=torch.float64
    )
    tensors = [t.double().requires_grad_() for t in (q, k, v, scores)]
    options = {"num_selected": 2, "window": 1, "chunk_size": 2, "backend": "reference"}
    assert torch.autograd.gradcheck(
        lambda *t: bs.attention_varlen_forward(*t, *starts, **options), tensors
    )


def gradients_of(packed, dout, **options):
    *tensors, cu_seqlens_q, cu_seqlens_k = packed
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    bs.attention_varlen_forward(*leaves, cu_seqlens_q, cu_seqlens_k, **options).backward(dout)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("gate", ["none", "value", "softmax"])
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
@pytest.mark.parametrize("batch", ["ragged", "few_queries", "with_empty"])
def test_gradients_equal_one_call_per_sequence(batch, chunk_size, gate):
    packed = pack(BATCHES[batch], "cpu", head_dim=16)
    options = {"num_selected": 32, "window": 20, "chunk_size": chunk_size, "gate": gate}
    dout = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(1))
    gradients = gradients_of(packed, dout, **options)
    *tensors, cu_seqlens_q, cu_seqlens_k = packed
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    one_by_one(*leaves, cu_seqlens_q, cu_seqlens_k, **options)[0].backward(dout)
    for mine, leaf in zip(gradients, leaves, strict=True):
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    for first, second in zip(gradients, gradients_of(packed, dout, **options), strict=True):
        assert torch.equal(first, second)


def test_gradients_against_reference():
    packed = pack(BATCHES["few_queries"], "cpu")
    options = {"num_selected": 32, "window": 20, "chunk_size": 16}
    dout = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(1))
    gradients = gradients_of(packed, dout, **options)
    expected = gradients_of(packed, dout, **options, backend="reference")
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_with_key_norm_scores():
    """Scores made from keys are detached."""
    q, k, v, _, *starts = pack(BATCHES["ragged"], "cpu")
    k.requires_grad_()
    bs.attention_varlen_forward(q, k, v, None, *starts, num_selected=32).sum().backward()
    gradient = k.grad.clone()
    k.grad = None
    one_by_one(q, k, v, None, *starts, num_selected=32)[0].sum().backward()
    torch.testing.assert_close(gradient, k.grad, rtol=1e-4, atol=1e-5)


def test_gradients_of_nothing():
    q, k, v, scores, *starts = pack([(0, 0), (0, 3)], "cpu")
    leaves = [t.requires_grad_() for t in (q, k, v, scores)]
    bs.attention_varlen_forward(*leaves, *starts).sum().backward()
    for leaf in leaves:
        assert leaf.grad is None or (leaf.grad == 0).all()


def test_missing_backward_is_said(device):
    q, k, v, scores, *starts = pack(BATCHES["one"], device)
    if bs.capability(
        (1, 4, 1, 64), (1, 2, 1, 64), dtype=q.dtype, device=device, stage="attend_backward"
    ).supported:
        pytest.skip("attend_backward is there")
    with pytest.raises(NotImplementedError, match="attend_backward is missing here"):
        bs.attention_varlen_forward(q.requires_grad_(), k, v, scores, *starts)
