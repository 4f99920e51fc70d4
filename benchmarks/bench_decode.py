"""Times a decode step of SparseKCache against PyTorch's SDPA over a dense cache. This is `make bench-decode`.

    python benchmarks/bench_decode.py                              the default configuration of this machine
    python benchmarks/bench_decode.py --batch 1 --heads 32 --kv-heads 8 --dtype bfloat16
    python benchmarks/bench_decode.py --tokens 1024 16384 65536    tokens seen before the first step

A step appends one token to every sequence and attends from it. Its time is the mean over whole chunks, evictions at their
borders included; on a GPU once as replays of a CUDA graph, where the device alone counts, and once as calls from Python. Peers
read a cache that holds the token already: SDPA over all tokens seen, and SDPA over as many rows as SparseK's cache has. Latency
over the number of tokens goes into a table, a JSON file and a plot.

Without a GPU: B=1, 8 heads, float32. With one: B=16, 96 heads, float16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import machine as machine_info
import report
import timing
import torch
import torch.nn.functional as F
from configuration import DTYPES

_RESULTS = Path(__file__).parent / "results"
_PIECE = 1024  # tokens that are appended at once before the first step
_NAMES = {
    "sparsek": "SparseKCache.step",
    "compact": "SDPA, as many rows",
    "dense": "SDPA, all tokens",
}


@dataclass(frozen=True)
class Settings:
    """One run: a cache of these options, and how many tokens its sequences have seen."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    num_selected: int
    window: int
    chunk_size: int
    num_candidates: int | None
    gate: str
    dtype: str
    device: str
    tokens: tuple[int, ...]
    chunks: int  # whole chunks that are timed
    launches: int  # of a peer
    seed: int

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_rows(self) -> int:
        """Rows of the cache of one KV head."""
        return self.num_selected + self.window + self.chunk_size

    def row_bytes(self) -> int:
        """Bytes of k and v of one token, all heads and sequences."""
        return 2 * self.batch * self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    def mean_rows(self, tokens: int) -> float:
        """Rows that a step attends to, on average over the chunks that are timed."""
        total = 0
        for n in range(tokens + 1, tokens + 1 + self.chunk_size):
            pool_end = max(0, (n - 1) // self.chunk_size * self.chunk_size - self.window)
            total += min(self.num_selected, pool_end) + n - pool_end
        return total / self.chunk_size


GPU_DEFAULT = Settings(
    16, 96, 96, 128, 256, 128, 128, None, "softmax", "float16", "cuda",
    (1024, 4096, 16384, 65536), 5, 20, 0,
)  # fmt: skip
CPU_DEFAULT = replace(
    GPU_DEFAULT, batch=1, heads=8, kv_heads=8, dtype="float32", device="cpu",
    tokens=(1024, 4096, 16384), chunks=2, launches=10,
)  # fmt: skip


def parse_arguments(argv: list[str] | None, *, has_gpu: bool) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = GPU_DEFAULT if has_gpu else CPU_DEFAULT
    for name in ("batch", "heads", "kv_heads", "head_dim", "num_selected", "window", "chunk_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--num-candidates", type=int)
    parser.add_argument("--gate", choices=("softmax", "value", "none"))
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--device")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens seen before the first step")
    parser.add_argument("--chunks", type=int, help="whole chunks that are timed")
    parser.add_argument("--launches", type=int, help="calls of a peer that are timed")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, default=_RESULTS / "decode.json", help="JSON file")
    given = vars(parser.parse_args(argv))
    output = given.pop("output")
    given = {name: value for name, value in given.items() if value is not None}
    if "heads" in given:
        given.setdefault("kv_heads", given["heads"])
    if "tokens" in given:
        given["tokens"] = tuple(given["tokens"])
    settings = replace(default, **given)
    for tokens in settings.tokens:
        if tokens % settings.chunk_size:
            parser.error(
                f"--tokens: multiples of the chunk size {settings.chunk_size}, not {tokens}"
            )
    return settings, output


@dataclass(frozen=True)
class Latency:
    """Microseconds per step: median over repetitions, and the quartiles."""

    us: float
    us_low: float
    us_high: float
    samples: int
    us_calls: float | None = None  # GPU: calls from Python instead of a graph's replays


def _latency(samples: list[float], calls: list[float] | None = None) -> Latency:
    low, middle, high = timing.quartiles(samples)
    return Latency(middle, low, high, len(samples), statistics.median(calls) if calls else None)


def _repeat_us(call: Callable[[], object], count: int, settings: Settings) -> float:
    """Microseconds per call of `count` calls in a row."""
    if not settings.is_cuda:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count * 1e3


def _graph_of(call: Callable[[], object]) -> Callable[[], None]:
    """Replays of the call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _measure(
    call: Callable[[], object], count: int, repetitions: int, settings: Settings
) -> Latency:
    """`count` calls in a row, `repetitions` times."""
    if not settings.is_cuda:
        call()
        return _latency([_repeat_us(call, count, settings) for _ in range(repetitions)])
    replay = _graph_of(call)
    return _latency(
        [_repeat_us(replay, count, settings) for _ in range(repetitions)],
        [_repeat_us(call, count, settings) for _ in range(repetitions)],
    )


def _normal(settings: Settings, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype = dtype or settings.torch_dtype
    return torch.randn(shape, device=settings.device, dtype=dtype)


def measure_sparsek(settings: Settings, tokens: int) -> tuple[Latency, int]:
    """The step after `tokens` tokens, and the bytes of the cache."""
    from blackwell_sparsek import SparseKCache

    s = settings
    cache = SparseKCache(
        s.batch, s.kv_heads, s.head_dim, num_selected=s.num_selected, window=s.window,
        chunk_size=s.chunk_size, num_candidates=s.num_candidates, gate=s.gate, dtype=s.torch_dtype,
        device=s.device,
    )  # fmt: skip
    for begin in range(0, tokens, _PIECE):
        count = min(_PIECE, tokens - begin)
        shape = (s.batch, s.kv_heads, count)
        k, v = (_normal(s, *shape, s.head_dim) for _ in range(2))
        cache.prefill(k, v, _normal(s, *shape, dtype=torch.float32))
    q = _normal(s, s.batch, s.heads, 1, s.head_dim)
    k, v = (_normal(s, s.batch, s.kv_heads, 1, s.head_dim) for _ in range(2))
    scores = _normal(s, s.batch, s.kv_heads, 1, dtype=torch.float32)
    saved = cache.state_dict()
    with torch.inference_mode():
        if not s.is_cuda:
            samples = []
            for _ in range(s.chunks):
                cache.load_state_dict(saved)
                cache.step(q, k, v, scores)  # warm-up
                cache.load_state_dict(saved)
                samples.append(_repeat_us(lambda: cache.step(q, k, v, scores), s.chunk_size, s))
            return _latency(samples), cache.num_bytes
        replay = _graph_of(lambda: cache.step(q, k, v, scores))
        samples, calls = [], []
        for _ in range(s.chunks):
            cache.load_state_dict(saved)
            samples.append(_repeat_us(replay, s.chunk_size, s))
            cache.load_state_dict(saved)
            calls.append(_repeat_us(lambda: cache.step(q, k, v, scores), s.chunk_size, s))
    return _latency(samples, calls), cache.num_bytes


def measure_sdpa(settings: Settings, rows: int) -> Latency:
    """SDPA of one query over `rows` rows of k and v."""
    s = settings
    q = _normal(s, s.batch, s.heads, 1, s.head_dim)
    k, v = (_normal(s, s.batch, s.kv_heads, rows, s.head_dim) for _ in range(2))
    gqa = s.heads != s.kv_heads
    with torch.inference_mode():
        return _measure(
            lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa), s.launches, 5, s
        )


def measure(settings: Settings) -> list[dict]:
    """One dictionary per number of tokens."""
    s = settings
    torch.manual_seed(s.seed)
    compact: Latency | str
    try:
        compact = measure_sdpa(s, s.num_rows)
    except torch.OutOfMemoryError:
        compact = "out of device memory"
    points = []
    for tokens in s.tokens:
        sparsek, cache_bytes = measure_sparsek(s, tokens)
        point = {"tokens": tokens, "cache_bytes": cache_bytes, "rows": {}}
        point["rows"]["sparsek"] = _row(sparsek, s.mean_rows(tokens) * s.row_bytes())
        point["rows"]["compact"] = _row(compact, s.num_rows * s.row_bytes())
        dense: Latency | str
        try:
            dense = measure_sdpa(s, tokens)
        except torch.OutOfMemoryError:
            dense = "out of device memory"
        if s.is_cuda:
            torch.cuda.empty_cache()
        point["dense_bytes"] = tokens * s.row_bytes()
        point["rows"]["dense"] = _row(dense, tokens * s.row_bytes())
        points.append(point)
    return points


def _row(latency: Latency | str, num_bytes: float) -> dict:
    if isinstance(latency, str):
        return {"unavailable": latency}
    return {
        "unavailable": None,
        **asdict(latency),
        "bytes": num_bytes,
        "gb_per_s": num_bytes / latency.us / 1e3,
    }


def table_of(points: list[dict]) -> list[str]:
    lines = [
        f"  {'tokens':>8}  {'row':<20}  {'µs/step':>10}  {'from Python':>11}  {'GB/s':>8}  {'of dense':>9}"
    ]
    for point in points:
        dense = point["rows"]["dense"].get("us")
        for key, row in point["rows"].items():
            head = f"  {point['tokens']:>8,}  {_NAMES[key]:<20}"
            if row["unavailable"]:
                lines.append(f"{head}  not run: {row['unavailable']}")
                continue
            calls = row["us_calls"]
            speedup = f"{dense / row['us']:>8.1f}x" if dense else f"{'-':>9}"
            lines.append(
                f"{head}  {report.format_us(row['us']):>10}  "
                f"{report.format_us(calls) if calls else '-':>11}  {row['gb_per_s']:>8,.1f}  {speedup}"
            )
    return lines


def describe(settings: Settings) -> str:
    s = settings
    heads = f"H={s.heads}" if s.heads == s.kv_heads else f"Hq={s.heads} Hkv={s.kv_heads}"
    candidates = "4k" if s.num_candidates is None else s.num_candidates
    return (
        f"B={s.batch} {heads} D={s.head_dim} {s.dtype} k={s.num_selected} w={s.window} "
        f"C={s.chunk_size} M={candidates} gate={s.gate}"
    )


def plot(path: Path, points: list[dict], title: str) -> None:
    """A PNG of µs per step over tokens seen, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, style in (("dense", "o--"), ("compact", "^:"), ("sparsek", "s-")):
        line = [
            (point["tokens"], point["rows"][key]["us"])
            for point in points
            if "us" in point["rows"][key]
        ]
        if line:
            axes.plot(*zip(*line, strict=True), style, label=_NAMES[key])
    tokens = [point["tokens"] for point in points]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("µs per step, lower is better")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    settings, output = parse_arguments(argv, has_gpu=torch.cuda.is_available())
    machine = machine_info.describe(settings.device)
    print(f"Decode: {describe(settings)}")
    print(f"  {machine_info.headline(machine)}, torch {machine['torch']}")
    points = measure(settings)
    print(*table_of(points), sep="\n")
    first = points[0]
    print(
        f"  cache: {report.format_bytes(first['cache_bytes'])} at every length; dense: "
        f"{report.format_bytes(points[-1]['dense_bytes'])} at {points[-1]['tokens']:,} tokens"
    )
    document = {"machine": machine, "settings": asdict(settings), "points": points}
    report.write_json(output, document)
    picture = output.with_suffix(".png")
    plot(picture, points, f"Decode step, {describe(settings)}")
    print(f"  wrote {output} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
