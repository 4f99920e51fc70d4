"""How tensors, devices and options become the integers that the C++ core takes.

The core checks shapes, strides, dtypes and values. What it cannot see is checked here: numbers of
dimensions, torch's dtypes, devices. These helpers run on every call, so they are lean.
"""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor

# sparsek::DataType
DTYPE_CODES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float64: 3,
    torch.int32: 4,
}
# sparsek::DeviceType
CPU, CUDA = 0, 1


class _Codes(dict):
    """An option's codes by name; other names are a ValueError."""

    def __init__(self, option: str, codes: dict[str, int]):
        super().__init__(codes)
        self._option = option

    def __missing__(self, name: str) -> int:
        raise ValueError(f"{self._option}: expected one of {', '.join(self)}, got {name!r}")


# sparsek::Backend
BACKEND_CODES = _Codes("backend", {"auto": 0, "reference": 1, "cpu": 2, "portable": 3, "sm90": 4})
# sparsek::Gate
GATE_CODES = _Codes("gate", {"none": 0, "value": 1, "softmax": 2})
# The code of a name, without a Python frame.
backend_code = BACKEND_CODES.__getitem__
gate_code = GATE_CODES.__getitem__

# Whether values are checked on CUDA too, where that waits for the device. On the CPU they always are.
CHECK_VALUES_ON_CUDA = os.environ.get("BLACKWELL_SPARSEK_CHECK", "0") == "1"

DIMENSIONS = {
    "q": ("B", "Hq", "Sq", "D"),
    "k": ("B", "Hkv", "Sk", "D"),
    "v": ("B", "Hkv", "Sk", "D"),
    "scores": ("B", "Hkv", "Sk"),
    "lengths": ("B",),
    "expiry": ("B", "Hkv", "Sk"),
    "threshold": ("B", "Hkv", "ceil(Sk / chunk_size)"),
    "last_candidate": ("B", "Hkv", "ceil(Sk / chunk_size)"),
    "z": ("rows", "n"),
}
PACKED_DIMENSIONS = {
    "q": ("total_q", "Hq", "D"),
    "k": ("total_k", "Hkv", "D"),
    "v": ("total_k", "Hkv", "D"),
    "scores": ("total_k", "Hkv"),
    "expiry": ("Hkv", "total_k"),
    "threshold": ("Hkv", "total_k / chunk_size + N"),
    "last_candidate": ("Hkv", "total_k / chunk_size + N"),
    "cu_seqlens_q": ("N + 1",),
    "cu_seqlens_k": ("N + 1",),
}


def _raise_unless_valid(tensor: Tensor, name: str, device: torch.device, dimensions: dict) -> None:
    expected = dimensions[name]
    if tensor.dim() != len(expected):
        raise ValueError(
            f"{name}: expected {len(expected)} dimensions [{', '.join(expected)}], "
            f"got shape {list(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device} like the others, got one on {tensor.device}"
        )
    if tensor.dtype not in DTYPE_CODES:
        raise ValueError(
            f"{name}: expected a floating-point tensor (int32 for lengths and cu_seqlens), "
            f"got {name_of(tensor.dtype)}"
        )


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def view_of(tensor: Tensor) -> tuple:
    """The tensor as the core reads it: address, dtype, shape and strides."""
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


def checked_view(tensor: Tensor, name: str, device: torch.device, dimensions=DIMENSIONS) -> tuple:
    """``view_of`` an input; ValueError unless it is on ``device`` and has ``name``'s dimensions."""
    code = DTYPE_CODES.get(tensor.dtype)
    shape = tensor.shape
    if code is None or len(shape) != len(dimensions[name]) or tensor.device != device:
        _raise_unless_valid(tensor, name, device, dimensions)
    return tensor.data_ptr(), code, shape, tensor.stride()


def optional_view(tensor: Tensor | None, name: str, device: torch.device) -> tuple | None:
    return None if tensor is None else checked_view(tensor, name, device)


def check_chunk_size(chunk_size: int) -> None:
    """The core checks it too, but the shapes of the outputs need it before."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")


def call_on(device: torch.device, backend: str, workspace: int = 0, num_bytes: int = 0) -> tuple:
    """Where a call runs: device, backend, current stream, threads and workspace."""
    if device.type == "cuda":
        index = device.index
        stream = torch._C._cuda_getCurrentRawStream(index)
        return CUDA, index, backend_code(backend), stream, 0, workspace, num_bytes
    if device.type == "cpu":
        return CPU, 0, backend_code(backend), 0, torch.get_num_threads(), 0, 0
    raise NotImplementedError(f"device {device.type}: supported are cpu and cuda")


def query_on(device_type: int, device_index: int, backend: str) -> tuple:
    """A context for questions (workspace sizes, capabilities), which touch no stream."""
    return device_type, device_index, backend_code(backend), 0, 0, 0, 0


def check_values(scores: Tensor | None, lengths: Tensor | None, seq_len: int) -> None:
    """What the core checks on the CPU alone; for CUDA with BLACKWELL_SPARSEK_CHECK=1."""
    if lengths is not None and bool(((lengths < 0) | (lengths > seq_len)).any()):
        raise ValueError(
            f"lengths: expected values between 0 and {seq_len}, got {lengths.tolist()}"
        )
    if scores is None:
        return
    finite = torch.isfinite(scores)
    if lengths is not None:
        finite |= torch.arange(seq_len, device=scores.device) >= lengths[:, None, None]
    if not bool(finite.all()):
        raise ValueError("scores: expected finite values, got NaN or infinity")


def check_cu_seqlens(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int
) -> None:
    """What the core checks on the CPU alone; for CUDA with BLACKWELL_SPARSEK_CHECK=1."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, starts, total in (("q", starts_q, total_q), ("k", starts_k, total_k)):
        falls = any(b < a for a, b in itertools.pairwise(starts))
        if falls or starts[0] != 0 or starts[-1] != total:
            raise ValueError(
                f"cu_seqlens_{name}: expected values that start at 0, never fall and end at "
                f"{total}, got {starts}"
            )
    lengths_q = [b - a for a, b in itertools.pairwise(starts_q)]
    lengths_k = [b - a for a, b in itertools.pairwise(starts_k)]
    for b, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        if length_q > length_k:
            raise ValueError(
                f"cu_seqlens_q: expected at most as many queries as keys, got {length_q} queries "
                f"and {length_k} keys in sequence {b}"
            )
