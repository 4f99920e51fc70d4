"""Peak memory that a call takes beyond its inputs (its output counts)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def status_kib(text: str, field: str) -> int:
    """A field of /proc/<pid>/status in KiB, e.g. VmHWM."""
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def _trim_heap() -> None:
    """Gives freed heap back to the system, so that memory reused from an earlier call counts too."""
    gc.collect()
    # Without glibc the figure may miss what was freed but kept.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_extra_bytes(call: Callable[[], object], device: str) -> int | None:
    """Bytes at the peak of one call beyond what was held before it; None where the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _trim_heap()
        _CLEAR_REFS.write_text("5")  # 5: reset the peak resident set size
        before = status_kib(_STATUS.read_text(), "VmRSS")
        call()
        peak = status_kib(_STATUS.read_text(), "VmHWM")
    except (OSError, KeyError):
        return None
    return max(0, peak - before) * 1024
