"""What the tests of gradients share: gradients of a case by the library, by the reference, by the dense formula."""

from __future__ import annotations

import functools

import blackwell_sparsek as bs
import dense_formula
import torch
from case_table import Case, Inputs
from conftest import dense_selection_of, expected_of
from torch import Tensor

NAMES = ("dq", "dk", "dv", "dscores")


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
def selection_of(case: Case, device: str = "cpu") -> bs.Selection:
    """What the device selects, with float32 thresholds; in host memory."""
    inputs = expected_of(case).inputs
    lengths = None if inputs.lengths is None else inputs.lengths.to(device)
    selection = bs.select(inputs.scores.to(device), **case.configuration, lengths=lengths)
    return bs.Selection(
        selection.expiry.cpu(),
        threshold=selection.threshold.cpu(),
        last_candidate=selection.last_candidate.cpu(),
        configuration=selection.configuration,
    )


@functools.lru_cache(maxsize=4)
def reference_gradients_of(case: Case, device: str = "cpu") -> list[Tensor]:
    """Of the float64 reference with that selection: a threshold's rounding decides who is above it."""
    inputs = expected_of(case).inputs
    exact = Inputs(inputs.q, inputs.k, inputs.v, inputs.scores.double(), inputs.lengths)
    selected = selection_of(case, device)
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


def assert_gradients_close(case: Case, gradients: list[Tensor], dtype, device: str = "cpu") -> None:
    """The error is at most twice that of the dense formula in that dtype, plus a floor.

    The floor is an ulp of the largest gradient, and what a gate, which is accurate to an ulp of the largest
    score, moves.
    """
    scores = expected_of(case).inputs.scores
    everything = (
        NAMES,
        gradients,
        reference_gradients_of(case, device),
        exact_dense_gradients_of(case),
        dense_gradients_of(case, dtype),
    )
    gate_error = 0.0
    if case.gate != "none":
        gate_error = 8 * torch.finfo(torch.float32).eps * float(scores.abs().max())
    for name, mine, theirs, dense, dense_in_dtype in zip(*everything, strict=True):
        assert mine.dtype == (torch.float32 if name == "dscores" else dtype), name
        if mine.numel() == 0:
            continue
        scale = max(1.0, float(theirs.abs().max()))
        plain_error = float((dense_in_dtype.double() - dense).abs().max())
        allowed = 2 * plain_error + scale * (torch.finfo(dtype).eps + gate_error)
        error = float((mine.double().cpu() - theirs).abs().max())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
