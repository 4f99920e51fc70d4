"""Gradients of attention_forward on every backend that has a backward, and what training needs of them."""

from __future__ import annotations

import functools

import blackwell_sparsek as bs
import dense_formula
import pytest
import torch
from case_table import Case, Inputs, load_cases, poison
from conftest import dense_selection_of, expected_of, find_case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The dense formula in float16 and bfloat16 is slow; the C++ tests cover the whole table.
MAX_PAIRS = 300_000
CASES = [
    case
    for case in load_cases()
    if case.batch * case.num_q_heads * case.seq_len_q * case.seq_len_k <= MAX_PAIRS
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("dq", "dk", "dv", "dscores")
OPTIONS = {"num_selected": 32, "window": 16, "chunk_size": 16}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def upstream_of(inputs: Inputs) -> Tensor:
    """Exact in every dtype; a NaN where no query exists, which nobody may read."""
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(inputs.q.shape, generator=generator).bfloat16().half().double()
    if inputs.lengths is not None:
        seq_len_q, seq_len = inputs.q.shape[2], inputs.k.shape[2]
        position = torch.arange(seq_len - seq_len_q, seq_len)
        exists = position < inputs.lengths[:, None, None]
        dout = torch.where(exists[..., None], dout, float("nan"))
    return dout


def gradients_of(function, inputs: Inputs, dout: Tensor) -> list[Tensor]:
    """dq, dk, dv and dscores of ``function(q, k, v, scores)``."""
    tensors = (inputs.q, inputs.k, inputs.v, inputs.scores)
    leaves = [t.detach().requires_grad_() for t in tensors]
    function(*leaves).backward(dout)
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def attend(case: Case, inputs: Inputs, **options):
    return lambda q, k, v, scores: bs.attention_forward(
        q, k, v, scores, lengths=inputs.lengths, **options
    )


@functools.cache
def selection_of(case: Case) -> bs.Selection:
    """What the CPU selects, with float32 thresholds."""
    inputs = expected_of(case).inputs
    return bs.select(inputs.scores, **case.configuration, lengths=inputs.lengths)


@functools.lru_cache(maxsize=4)
def reference_gradients_of(case: Case) -> list[Tensor]:
    """Of the float64 reference with that selection: a threshold's rounding decides who is above it."""
    inputs = expected_of(case).inputs
    exact = Inputs(inputs.q, inputs.k, inputs.v, inputs.scores.double(), inputs.lengths)
    selected = selection_of(case)
    selection = bs.Selection(
        selected.expiry,
        threshold=selected.threshold.double(),
        last_candidate=selected.last_candidate,
        configuration=selected.configuration,
    )
    function = attend(case, exact, selection=selection, gate=case.gate, backend="reference")
    return gradients_of(function, exact, upstream_of(inputs))


def dense_gradients_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    inputs = expected_of(case).inputs.to(dtype, "cpu", "bhsd")
    selection = dense_selection_of(case)

    def dense(q, k, v, scores):
        out, _ = dense_formula.dense_attention(
            q, k, v, scores, inputs.lengths, selection, case.num_selected, case.gate
        )
        return out

    return gradients_of(dense, inputs, upstream_of(inputs).nan_to_num(nan=0.0).to(dtype))


@functools.lru_cache(maxsize=4)
def exact_dense_gradients_of(case: Case) -> list[Tensor]:
    return dense_gradients_of(case, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case, dtype):
    """The error is at most twice that of the dense formula in that dtype, plus a floor.

    The floor is an ulp of the largest gradient, and what a gate, which is accurate to an ulp of the largest
    score, moves.
    """
    clean = expected_of(case).inputs
    inputs = poison(clean).to(dtype, "cpu", case.layout)
    dout = upstream_of(clean).to(dtype)
    function = attend(case, inputs, **case.options)
    gradients = gradients_of(function, inputs, dout)
    for first, second in zip(gradients, gradients_of(function, inputs, dout), strict=True):
        assert torch.equal(first, second)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.scores)
    everything = (reference_gradients_of, exact_dense_gradients_of)
    expected, exact = (gradients(case) for gradients in everything)
    plain = dense_gradients_of(case, dtype)
    gate_error = 0.0
    if case.gate != "none":
        gate_error = 8 * torch.finfo(torch.float32).eps * float(clean.scores.abs().max())
    for name, tensor, *values in zip(
        NAMES, tensors, gradients, expected, exact, plain, strict=True
    ):
        mine, theirs, dense, dense_in_dtype = values
        assert mine.dtype == tensor.dtype, name
        if mine.numel() == 0:
            continue
        scale = max(1.0, float(theirs.abs().max()))
        plain_error = float((dense_in_dtype.double() - dense).abs().max())
        allowed = 2 * plain_error + scale * (torch.finfo(dtype).eps + gate_error)
        error = float((mine.double() - theirs).abs().max())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


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
