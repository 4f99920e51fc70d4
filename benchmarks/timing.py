"""How long things take: interleaved repetitions on the CPU, the first and sustained protocols on a GPU.

On a GPU both protocols are always reported, because a dense kernel runs into the card's power limit:
first      median of the first FIRST_LAUNCHES launches after a pause of PAUSE_S;
sustained  median of the second half of at least MIN_SUSTAINED_LAUNCHES launches without a pause.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

PAUSE_S = 0.3
FIRST_LAUNCHES = 10
MIN_SUSTAINED_LAUNCHES = 80


@dataclass(frozen=True)
class Timing:
    """Times of one row, in microseconds per iteration."""

    us_per_iter: float  # the figure: CPU median, GPU sustained
    us_low: float  # quartiles of the samples behind it
    us_high: float
    samples: int
    total_time_s: float  # wall time spent on measuring this row
    us_first: float | None = None  # GPU: the first protocol

    def to_dict(self) -> dict:
        return asdict(self)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of a single sample that sample three times."""
    if not samples:
        raise ValueError("no samples")
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def summarise(
    samples: Sequence[float], *, total_time_s: float, first: Sequence[float] = ()
) -> Timing:
    """The Timing of `samples` (microseconds); `first` are the samples of the first protocol."""
    low, middle, high = quartiles(samples)
    return Timing(
        us_per_iter=middle,
        us_low=low,
        us_high=high,
        samples=len(samples),
        total_time_s=total_time_s,
        us_first=statistics.median(first) if first else None,
    )


def time_cpu(
    rows: dict[str, Callable[[], object]], *, iters: int, on_step: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Times every row `iters` times, taking turns, so that a slow spell of the machine hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in rows}
    for call in rows.values():
        call()  # warm-up
    for _ in range(iters):
        for name, call in rows.items():
            start = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - start) * 1e6)
            on_step()
    return {name: summarise(s, total_time_s=sum(s) / 1e6) for name, s in samples.items()}


def _launch_times_us(call: Callable[[], object], launches: int) -> list[float]:
    """Microseconds of each of `launches` launches in a row, from CUDA events between them."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(launches + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]


def time_cuda(
    rows: dict[str, Callable[[], object]],
    *,
    iters: int,
    repetitions: int = 3,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Both protocols for every row, `repetitions` times, the rows taking turns."""
    launches = max(iters, MIN_SUSTAINED_LAUNCHES)
    first: dict[str, list[float]] = {name: [] for name in rows}
    sustained: dict[str, list[float]] = {name: [] for name in rows}
    spent = dict.fromkeys(rows, 0.0)
    for call in rows.values():
        for _ in range(3):  # warm-up: module load, autotuning, the allocator's pool
            call()
    torch.cuda.synchronize()
    for _ in range(repetitions):
        for name, call in rows.items():
            start = time.perf_counter()
            time.sleep(PAUSE_S)
            first[name] += _launch_times_us(call, FIRST_LAUNCHES)
            sustained[name] += _launch_times_us(call, launches)[launches // 2 :]
            spent[name] += time.perf_counter() - start
            on_step()
    return {
        name: summarise(sustained[name], total_time_s=spent[name], first=first[name])
        for name in rows
    }


def host_us(call: Callable[[], object], *, launches: int = 50) -> float:
    """Microseconds that one call keeps the host, with the GPU's queue empty before each."""
    samples = []
    for _ in range(launches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)
