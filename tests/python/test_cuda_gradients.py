"""Gradients on CUDA: every backend against the reference, and what training needs of the operators."""

from __future__ import annotations

import blackwell_sparsek as bs
import pytest
import torch
from case_table import Inputs, load_cases, poison
from conftest import expected_of, find_case, needs_cuda, skip_unless_supported
from gradients import (
    assert_gradients_close,
    attend,
    gradients_of,
    name_of,
    selection_of,
    upstream_of,
)
from torch.utils.checkpoint import checkpoint

pytestmark = needs_cuda

DTYPES = [torch.float16, torch.bfloat16]
BACKENDS = [None, "portable"]
OPTIONS = {"num_selected": 32, "window": 16, "chunk_size": 16}
# The dense formula in a half dtype is slow; the C++ check covers the whole table.
MAX_PAIRS = 140_000
CASES = [
    case
    for case in load_cases()
    if case.batch * case.num_q_heads * case.seq_len_q * case.seq_len_k <= MAX_PAIRS
    and case.head_dim >= 64
]


class _Target:
    """What skip_unless_supported wants to know."""

    device = "cuda"

    def __init__(self, backend: str | None) -> None:
        self.backend = backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case, dtype, backend):
    skip_unless_supported(case, _Target(backend), dtype)
    clean = expected_of(case).inputs
    inputs = poison(clean).to(dtype, "cuda", case.layout)
    dout = upstream_of(clean).to("cuda", dtype)
    function = attend(case, inputs, **case.options, backend=backend)
    gradients = gradients_of(function, inputs, dout)
    for first, second in zip(gradients, gradients_of(function, inputs, dout), strict=True):
        assert torch.equal(first, second)
    assert selection_of(case, "cuda").expiry.equal(selection_of(case).expiry)
    assert_gradients_close(case, gradients, dtype, "cuda")


def make_leaves(seed: int = 0, seq_len: int = 500, head_dim: int = 64, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    tensors = (
        normal(2, 4, seq_len, head_dim),
        normal(2, 2, seq_len, head_dim),
        normal(2, 2, seq_len, head_dim),
        torch.randn(2, 2, seq_len, generator=generator).cuda(),
    )
    return [t.requires_grad_() for t in tensors]


def forward(q, k, v, scores):
    return bs.attention_forward(q, k, v, scores, **OPTIONS)


def backward(function, leaves, dout):
    return torch.autograd.grad(function(*leaves), leaves, dout)


def test_graph_capture():
    """Forward and backward in one graph, replayed on new values in the same memory."""
    leaves = make_leaves()
    dout = torch.randn_like(leaves[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backward(forward, leaves, dout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(forward, leaves, dout)
    others = make_leaves(1)
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)
    graph.replay()
    for mine, theirs in zip(captured, backward(forward, others, dout), strict=True):
        assert torch.equal(mine, theirs)


def test_does_not_wait_for_the_device():
    leaves = make_leaves()
    dout = torch.randn_like(leaves[0])
    backward(forward, leaves, dout)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(forward, leaves, dout)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_side_stream():
    leaves = make_leaves()
    dout = torch.randn_like(leaves[0])
    expected = backward(forward, leaves, dout)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients = backward(forward, leaves, dout)
    stream.synchronize()
    assert all(map(torch.equal, gradients, expected))


def test_compiled():
    leaves = make_leaves()
    dout = torch.randn_like(leaves[0])
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        backward(compiled, leaves, dout), backward(forward, leaves, dout), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    leaves = make_leaves()
    dout = torch.randn_like(leaves[0])

    def recomputed(*tensors):
        return checkpoint(forward, *tensors, use_reentrant=use_reentrant)

    inputs = Inputs(*(t.detach() for t in leaves), None)
    for mine, theirs in zip(
        gradients_of(recomputed, inputs, dout), gradients_of(forward, inputs, dout), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_autocast(dtype):
    """Projections in a half dtype, scores in float32, parameters and their gradients in float32."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 300, 64, generator=generator).cuda()
    weight = (torch.randn(384, 64, generator=generator) * 64**-0.5).cuda().requires_grad_()
    scorer = (torch.randn(2, 64, generator=generator) * 64**-0.5).cuda().requires_grad_()
    with torch.autocast("cuda", dtype):
        q, k, v = (
            torch.nn.functional.linear(x, weight).reshape(1, 300, 3, 2, 64).permute(2, 0, 3, 1, 4)
        )
        with torch.autocast("cuda", enabled=False):
            scores = (x @ scorer.T).transpose(1, 2)
        out = bs.attention_forward(q, k, v, scores, **OPTIONS)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for parameter in (weight, scorer):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def test_packed_equals_separate_calls():
    starts = [0, 100, 100, 401, 500]
    leaves = [t.detach() for t in make_leaves()]
    packed = [t[0].transpose(0, 1).contiguous().requires_grad_() for t in leaves]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="cuda")
    dout = torch.randn_like(packed[0])
    out = bs.attention_varlen_forward(*packed, cu_seqlens, cu_seqlens, **OPTIONS)
    together = torch.autograd.grad(out, packed, dout)
    for first, last in zip(starts[:-1], starts[1:], strict=True):
        if first == last:
            continue
        own = [t[:1, :, first:last].clone().requires_grad_() for t in leaves]
        own_dout = dout[first:last].transpose(0, 1)[None]
        for mine, theirs in zip(together, backward(forward, own, own_dout), strict=True):
            # Another kernel may serve dense batches: 10 unit roundoffs of float16.
            mine = mine[first:last].transpose(0, 1).float()
            torch.testing.assert_close(mine, theirs[0].float(), rtol=1e-2, atol=1e-2)


def test_expanded_upstream_gradient():
    """sum().backward() sends a gradient without memory of its own."""
    leaves = make_leaves()
    expected = backward(forward, leaves, torch.ones_like(leaves[0]))
    gradients = torch.autograd.grad(forward(*leaves).sum(), leaves)
    assert all(map(torch.equal, gradients, expected))


def test_without_gradient_of_scores():
    q, k, v, scores = make_leaves()
    dout = torch.randn_like(q)
    expected = backward(forward, [q, k, v, scores], dout)
    out = bs.attention_forward(q, k, v, scores.detach(), **OPTIONS)
    assert all(map(torch.equal, torch.autograd.grad(out, [q, k, v], dout), expected[:3]))


def test_foreign_selection():
    q, k, v, _ = make_leaves()
    expiry = (torch.arange(500, dtype=torch.int32) + 70).clamp(max=500).expand(2, 2, 500)
    selection = bs.Selection(expiry.contiguous().cuda())
    out = bs.attention_forward(q, k, v, selection=selection)
    gradients = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    position = torch.arange(500, device="cuda")
    visible = (position <= position[:, None]) & (position[:, None] < position + 70)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q.float(),
        k.float().repeat_interleave(2, 1),
        v.float().repeat_interleave(2, 1),
        attn_mask=visible,
    )
    expected = torch.autograd.grad(plain, [q, k, v], torch.ones_like(plain))
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=4e-3, atol=4e-3)


def test_capability():
    case = find_case("default_small")
    shape = (case.batch, case.num_q_heads, case.seq_len_q, case.head_dim)
    for backend in BACKENDS:
        answer = bs.capability(
            shape, shape, device="cuda", backend=backend, stage="attend_backward"
        )
        assert answer.supported, answer.reason
    answer = bs.capability(
        shape, shape, dtype=torch.float32, device="cuda", stage="attend_backward"
    )
    assert not answer.supported
    assert "float32 is not served" in answer.reason
    assert "float16, bfloat16" in answer.reason


def test_opcheck():
    leaves = make_leaves(seq_len=150)
    ops = torch.ops.blackwell_sparsek
    configuration = (32, 16, 16, None)
    selection = ops.select(leaves[3].detach(), None, *configuration, "auto")
    rest = (*configuration, None, "softmax", None)
    torch.library.opcheck(ops.attend.default, (*leaves, *selection, None, *rest, True, "auto"))
    tensors = [t.detach() for t in leaves]
    out, lse = ops.attend(*tensors, *selection, None, *rest, True, "auto")
    torch.library.opcheck(
        ops.attend_backward.default,
        (*tensors, *selection, None, *rest, out, lse, torch.randn_like(out), True, "auto"),
    )
