"""Fixtures shared by the tests: the device, and what is expected of each case."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import blackwell_sparsek as bs
import dense_formula
import pytest
import torch
from case_table import Case, Inputs, load_cases, make_inputs
from torch import Tensor

CUDA_MISSING = "" if torch.cuda.is_available() else "no CUDA device here"
if not CUDA_MISSING and not bs.build_info()["built_with_cuda"]:
    CUDA_MISSING = "this build has no CUDA kernels"

needs_cuda = pytest.mark.skipif(bool(CUDA_MISSING), reason=CUDA_MISSING or "-")

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=needs_cuda)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def dtypes_of(device: str) -> list[torch.dtype]:
    """What attention_forward takes there."""
    half = [torch.float16, torch.bfloat16]
    return half if device == "cuda" else [torch.float32, *half]


def default_dtype(device: str) -> torch.dtype:
    """The dtype for tests in which it does not matter."""
    return torch.float16 if device == "cuda" else torch.float32


def tolerance_of(dtype: torch.dtype) -> float:
    """A floor for errors of outputs of order one: a few units in the last place."""
    return {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}[
        dtype
    ]


@dataclass(frozen=True, eq=False)
class Expected:
    """What the float64 reference says about a case."""

    inputs: Inputs
    selection: bs.Selection
    out: Tensor
    lse: Tensor


@functools.cache
def expected_of(case: Case) -> Expected:
    inputs = make_inputs(case)
    scores = inputs.scores.double()
    selection = bs.select(scores, **case.configuration, lengths=inputs.lengths, backend="reference")
    out, lse = bs.attention_forward(
        inputs.q,
        inputs.k,
        inputs.v,
        scores,
        selection=selection,
        gate=case.gate,
        lengths=inputs.lengths,
        return_lse=True,
        backend="reference",
    )
    return Expected(inputs, selection, out, lse)


@functools.cache
def dense_selection_of(case: Case) -> dense_formula.DenseSelection:
    inputs = make_inputs(case)
    return dense_formula.dense_selection(inputs.scores, inputs.lengths, **case.configuration)


def dense_attention_of(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return dense_formula.dense_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.scores,
        inputs.lengths,
        dense_selection_of(case),
        case.num_selected,
        case.gate,
    )


def find_case(name: str) -> Case:
    return next(case for case in load_cases() if case.name == name)
