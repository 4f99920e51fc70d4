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


@dataclass(frozen=True)
class Target:
    """Kernels under test: a device and the backend that is asked for there."""

    device: str
    backend: str | None

    def __str__(self) -> str:
        return self.device if self.backend is None else f"{self.device}-{self.backend}"

    @property
    def dtypes(self) -> list[torch.dtype]:
        half = [torch.float16, torch.bfloat16]
        return half if self.device == "cuda" else [torch.float32, *half]


TARGETS = [
    pytest.param(Target("cpu", None), id="cpu"),
    pytest.param(Target("cuda", None), id="cuda", marks=needs_cuda),
    pytest.param(Target("cuda", "portable"), id="cuda-portable", marks=needs_cuda),
]


@pytest.fixture(params=TARGETS)
def target(request) -> Target:
    return request.param


def skip_unless_supported(case: Case, target: Target, dtype: torch.dtype) -> None:
    """Skips, with the library's own words, what a backend does not serve."""
    capability = bs.capability(
        (case.batch, case.num_q_heads, case.seq_len_q, case.head_dim),
        (case.batch, case.num_kv_heads, case.seq_len_k, case.head_dim),
        dtype=dtype,
        device=target.device,
        backend=target.backend,
        **case.options,
    )
    if not capability.supported:
        assert target.device == "cuda", f"the CPU serves everything: {capability.reason}"
        pytest.skip(capability.reason)


def default_dtype(device: str) -> torch.dtype:
    """The dtype for tests in which it does not matter."""
    return torch.float16 if device == "cuda" else torch.float32


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


@functools.lru_cache(maxsize=1024)
def plain_attention_of(case: Case, dtype: torch.dtype) -> Tensor:
    """The dense formula computed in a dtype: the error that is to be compared with."""
    out, _ = dense_attention_of(case, make_inputs(case).to(dtype, "cpu", "bhsd"))
    return out


def find_case(name: str) -> Case:
    return next(case for case in load_cases() if case.name == name)


def assert_out_close(
    out: Tensor, expected: Tensor, plain: Tensor | None = None, gate_error: float = 0.0
) -> None:
    """The error is at most twice that of the same formula in plain torch at that dtype, plus a floor.

    The floor is an ulp of the largest output, and what a gate, which is accurate to an ulp of the largest
    score, moves.
    """
    out = out.cpu()
    assert out.shape == expected.shape
    if out.numel() == 0:
        return
    allowed = torch.finfo(out.dtype).eps * max(1.0, float(expected.abs().max())) + gate_error
    if plain is not None:
        allowed += 2 * float((plain.double() - expected).abs().max())
    error = float((out.double() - expected.double()).abs().max())
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def gate_error_of(case: Case, inputs: Inputs) -> float:
    """How far an ulp of the largest score, in every gate, moves an output."""
    if case.gate == "none":
        return 0.0
    return 8 * torch.finfo(torch.float32).eps * float(inputs.scores.abs().max())
