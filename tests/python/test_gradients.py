"""Gradients of attention_forward on every backend that has a backward, and what training needs of them."""

from __future__ import annotations

import blackwell_sparsek as bs
import pytest
import torch
from case_table import Inputs, load_cases, poison
from conftest import expected_of, find_case
from gradients import assert_gradients_close, attend, gradients_of, name_of, upstream_of
from torch.utils.checkpoint import checkpoint

# The dense formula in float16 and bfloat16 is slow; the C++ tests cover the whole table.
MAX_PAIRS = 300_000
CASES = [
    case
    for case in load_cases()
    if case.batch * case.num_q_heads * case.seq_len_q * case.seq_len_k <= MAX_PAIRS
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = {"num_selected": 32, "window": 16, "chunk_size": 16}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case, dtype):
    clean = expected_of(case).inputs
    inputs = poison(clean).to(dtype, "cpu", case.layout)
    dout = upstream_of(clean).to(dtype)
    function = attend(case, inputs, **case.options)
    gradients = gradients_of(function, inputs, dout)
    for first, second in zip(gradients, gradients_of(function, inputs, dout), strict=True):
        assert torch.equal(first, second)
    assert_gradients_close(case, gradients, dtype)


SMALL = find_case("layout_sliced_c1")


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiled(backend):
    inputs = expected_of(SMALL).inputs.to(torch.float32, "cpu", "bhsd")
    dout = upstream_of(inputs).float()
    function = attend(SMALL, inputs, **SMALL.options, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        gradients_of(compiled, inputs, dout), gradients_of(function, inputs, dout), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    inputs = expected_of(SMALL).inputs.to(torch.float32, "cpu", "bhsd")
    dout = upstream_of(inputs).float()
    function = attend(SMALL, inputs, **SMALL.options)

    def recomputed(*tensors):
        return checkpoint(function, *tensors, use_reentrant=use_reentrant)

    for mine, theirs in zip(
        gradients_of(recomputed, inputs, dout), gradients_of(function, inputs, dout), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(dtype):
    """Projections in a half dtype, scores in float32, parameters and their gradients in float32."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 100, 32, generator=generator)
    weight = (torch.randn(96, 32, generator=generator) * 32**-0.5).requires_grad_()
    scorer = (torch.randn(2, 32, generator=generator) * 32**-0.5).requires_grad_()
    with torch.autocast("cpu", dtype):
        fused = torch.nn.functional.linear(x, weight)
        q, k, v = fused.reshape(1, 100, 3, 2, 16).permute(2, 0, 3, 1, 4)
        assert q.dtype == dtype
        with torch.autocast("cpu", enabled=False):
            scores = (x @ scorer.T).transpose(1, 2)
        out = bs.attention_forward(q, k, v, scores, **OPTIONS)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for parameter in (weight, scorer):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0


def test_double_backward_is_refused():
    inputs = expected_of(SMALL).inputs.to(torch.float32, "cpu", "bhsd")
    q = inputs.q.clone().requires_grad_()
    out = attend(SMALL, inputs, **SMALL.options)(q, inputs.k, inputs.v, inputs.scores)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


def test_number_of_threads_does_not_matter():
    """Of a sequence that is cut into runs."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 1, 2500, 16, generator=generator) for _ in range(3))
    inputs = Inputs(q, k, v, torch.randn(1, 1, 2500, generator=generator), None)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(gradients_of(lambda *t: bs.attention_forward(*t, **OPTIONS), inputs, q))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_opcheck():
    inputs = expected_of(SMALL).inputs.to(torch.float32, "cpu", "bhsd")
    ops = torch.ops.blackwell_sparsek
    configuration = tuple(SMALL.configuration.values())
    selection = ops.select(inputs.scores, None, *configuration, "auto")
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.scores.clone())]
    rest = (*configuration, None, "softmax", None)
    torch.library.opcheck(ops.attend.default, (*leaves, *selection, None, *rest, True, "auto"))
    tensors = [t.detach() for t in leaves]
    out, lse = ops.attend(*tensors, *selection, None, *rest, True, "auto")
    torch.library.opcheck(
        ops.attend_backward.default,
        (*tensors, *selection, None, *rest, out, lse, torch.randn_like(out), True, "auto"),
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck_packed(backend):
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(60, heads, 16, generator=generator) for heads in (4, 2, 2))
    scores = torch.randn(60, 2, generator=generator)
    starts = torch.tensor([0, 20, 60], dtype=torch.int32)
    configuration = (8, 4, 16, None)
    ops = torch.ops.blackwell_sparsek
    torch.library.opcheck(ops.select_varlen.default, (scores, starts, *configuration, backend))
    selection = ops.select_varlen(scores, starts, *configuration, backend)
    rest = (*selection, starts, starts, *configuration, "softmax", None)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, scores)]
    torch.library.opcheck(ops.attend_varlen.default, (*leaves, *rest, backend))
    out, lse = ops.attend_varlen(q, k, v, scores, *rest, backend)
    dout = torch.randn(out.shape, generator=generator)
    torch.library.opcheck(
        ops.attend_backward_varlen.default,
        (q, k, v, scores, *rest, out, lse, dout, True, backend),
    )
