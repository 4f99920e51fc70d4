"""What runs where, and what this build is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from blackwell_sparsek import _core
from blackwell_sparsek._arguments import CPU, CUDA, DTYPE_CODES, gate_code, name_of, query_on
from blackwell_sparsek.selection import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_NUM_SELECTED,
    DEFAULT_WINDOW,
)


class Capability(NamedTuple):
    """The answer of :func:`capability`."""

    supported: bool
    kernel: str  # e.g. "cpu/avx512_bf16", "sm90/resident", "portable/mma"; empty if unsupported
    reason: str  # what is missing, or why nothing faster runs; empty otherwise


_QUERIES = {
    "attend": _core.attend_capability,
    "attend_backward": _core.attend_backward_capability,
    "decode": _core.decode_capability,
}


@functools.lru_cache(maxsize=1024)
def query(
    stage: str,
    device: tuple[int, int],  # type, index
    backend: str,
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    configuration: tuple,
    is_foreign: bool,
    max_keys_per_tile: int | None,
    gate: str,
) -> Capability:
    """:func:`capability` with every argument spelled out; answers are remembered."""
    call = query_on(*device, backend)
    selection = (*configuration, is_foreign, max_keys_per_tile)
    return Capability(
        *_QUERIES[stage](call, DTYPE_CODES[dtype], q_shape, k_shape, *selection, gate_code(gate))
    )


def capability(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    num_selected: int = DEFAULT_NUM_SELECTED,
    window: int = DEFAULT_WINDOW,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    num_candidates: int | None = None,
    gate: str = "softmax",
    backend: str | None = None,
    stage: str = "attend",
) -> Capability:
    """Which kernel would run a call, or why none does.

    Args:
        q_shape: ``[B, Hq, Sq, D]``.
        k_shape: ``[B, Hkv, Sk, D]``.
        dtype, device: of q, k and v.
        num_selected, window, chunk_size, num_candidates, gate, backend: as :func:`attention_forward` takes them.
        stage: ``"attend"``, ``"attend_backward"`` or ``"decode"`` (then Sq = Sk: the new tokens).

    Returns:
        ``(supported, kernel, reason)``.

    Example:
        >>> capability((1, 8, 4096, 128), (1, 8, 4096, 128), dtype=torch.bfloat16)
        Capability(supported=True, kernel='cpu/avx512_bf16', reason='')
    """
    if stage not in _QUERIES:
        raise ValueError(f"stage: expected one of {', '.join(_QUERIES)}, got {stage!r}")
    if dtype not in DTYPE_CODES:
        raise ValueError(f"dtype: expected a floating-point dtype, got {name_of(dtype)}")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return Capability(False, "", f"device {device.type}: supported are cpu and cuda")
    index = device.index or 0
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return query(
        stage,
        (CUDA if device.type == "cuda" else CPU, index),
        backend or "auto",
        dtype,
        tuple(q_shape),
        tuple(k_shape),
        (num_selected, window, chunk_size, num_candidates),
        False,
        None,
        gate,
    )


def build_info() -> dict[str, str | bool]:
    """What this build is: ``version``, ``cpu_isa``, ``built_with_cuda``, ``cuda_architectures``.

    ``cpu_isa`` is the instruction set that the CPU kernels use here, ``cuda_architectures`` what the CUDA kernels were
    compiled for, e.g. ``"80;90a"``.
    """
    return {
        "version": _core.version(),
        "cpu_isa": _core.cpu_isa(),
        "built_with_cuda": _core.built_with_cuda(),
        "cuda_architectures": _core.cuda_architectures(),
    }


def show_config() -> None:
    """Prints the build, torch and the devices: what a bug report should contain."""
    info = build_info()
    cuda = f"kernels for {info['cuda_architectures']}" if info["built_with_cuda"] else "not built"
    print(f"blackwell_sparsek {info['version']}")
    print(f"  CPU   {info['cpu_isa']}, {torch.get_num_threads()} threads")
    print(f"  CUDA  {cuda}")
    print(f"  torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"  cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
