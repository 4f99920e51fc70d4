"""The operator library ``blackwell_sparsek`` and what its definitions share.

Operators are defined with ``torch.library.Library``: a call costs about 3 us, through
``torch.library.custom_op`` 37 us.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blackwell_sparsek import _core

LIBRARY = torch.library.Library("blackwell_sparsek", "DEF")

# Pieces of the schemas.
CONFIGURATION = "int num_selected, int window, int chunk_size, int? num_candidates"
SELECTION = "Tensor expiry, Tensor? threshold, Tensor? last_candidate"
ATTENTION = "str gate, float? sm_scale"


def define(schema: str) -> None:
    # Outputs have the strides that the fake kernel derived from the inputs' strides, so compiled code must pass inputs with
    # exactly those.
    LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))


def implement(name: str, function, device_keys=("CPU", "CUDA")) -> None:
    for key in device_keys:
        LIBRARY.impl(name, function, key)


def fake(name: str):
    """Decorates the fake kernel of an operator: shapes, strides and dtypes of its outputs."""
    return torch.library.register_fake(f"blackwell_sparsek::{name}", lib=LIBRARY)


def on_host(implementation, device: torch.device, *args):
    """``implementation`` on copies in host memory, its results copied back: for the reference."""
    results = implementation(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))
    if isinstance(results, Tensor):
        return results.to(device)
    return tuple(None if result is None else result.to(device) for result in results)


def need_no_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors may go past torch's dispatcher to the implementation of an operator.

    So it may where the dispatcher would do nothing else: with plain CUDA tensors of which none wants a gradient,
    when nothing compiles, traces, transforms (torch.func), profiles or watches calls. The way through the
    dispatcher takes a Python implementation longer than a launch; on the CPU that does not matter.
    """
    return not torch.compiler.is_compiling() and _core.need_no_dispatcher(*tensors)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of lse, and of the scores made from keys: float32, unless the tensors are float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
