"""The report: rows, tiers, JSON, sweep table and plot. Everything here is a function of its arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from accuracy import Accuracy
from configuration import TIER, Configuration
from timing import Timing


@dataclass(frozen=True)
class Tier:
    """Passed at the tier configuration, sustained, at or below (or strictly below) `limit` µs/head."""

    name: str
    limit: float
    strict: bool

    def passes(self, us_per_head: float) -> bool:
        return us_per_head < self.limit if self.strict else us_per_head <= self.limit

    def __str__(self) -> str:
        return f"{self.name} {'<' if self.strict else '≤'} {self.limit:.3f}"


TIERS = (
    Tier("T1 (dense floor)", 3.82, strict=False),
    Tier("T2 (structured sparse)", 3.0, strict=True),
    Tier("T3", 2.0, strict=True),
)


def highest_tier(us_per_head: float) -> Tier | None:
    """The highest tier that this figure passes, None if it passes none."""
    passed = [tier for tier in TIERS if tier.passes(us_per_head)]
    return passed[-1] if passed else None


@dataclass
class Row:
    """One line of the report: a peer or ours, timed and perhaps checked, or why it was not."""

    key: str  # its name in the JSON
    name: str
    timing: Timing | None = None
    accuracy: Accuracy | None = None
    peak_extra_bytes: int | None = None
    unavailable: str | None = None
    details: dict = field(
        default_factory=dict
    )  # what only this row has, e.g. the selection's share

    def to_dict(self, configuration: Configuration) -> dict:
        result: dict = {"name": self.name, "unavailable": self.unavailable}
        if self.timing is not None:
            result |= self.timing.to_dict()
            result["us_per_head"] = configuration.us_per_head(self.timing.us_per_iter)
            if self.timing.us_first is not None:
                result["us_per_head_first"] = configuration.us_per_head(self.timing.us_first)
            result["peak_extra_bytes"] = self.peak_extra_bytes
            accuracy = self.accuracy.to_dict() if self.accuracy else {}
            result |= {"max_diff": None, "mean_diff": None, "passed": None} | accuracy
        return result | self.details


def format_us(us: float) -> str:
    return f"{us:,.1f}" if us < 1000 else f"{us:,.0f}"


def format_bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 2**20:,.1f} MiB"


def row_lines(number: str, row: Row, configuration: Configuration) -> list[str]:
    """The lines of one row, e.g. "[1/3] PyTorch SDPA (dense floor)" and its figures."""
    lines = [f"{number} {row.name}"]
    if row.timing is None:
        return [*lines, f"      not run: {row.unavailable}"]
    t = row.timing
    spread = f"quartiles {format_us(t.us_low)} – {format_us(t.us_high)}, {t.samples} samples"
    if t.us_first is None:
        lines.append(f"      {format_us(t.us_per_iter)} µs/iter ({spread})")
    else:
        lines.append(
            f"      {format_us(t.us_per_iter)} µs/iter sustained ({spread}); "
            f"{format_us(t.us_first)} first"
        )
    lines.append(
        f"      {configuration.us_per_head(t.us_per_iter):,.3f} µs/head; "
        f"peak extra memory, output included: {format_bytes(row.peak_extra_bytes)}"
    )
    if "kernel" in row.details:
        lines.append(f"      kernel: {row.details['kernel']}")
    if "selection_share" in row.details:
        lines.append(
            f"      of it selection: {format_us(row.details['selection_us'])} µs "
            f"({row.details['selection_share']:.1%})"
        )
    if "rows_entering_per_tile" in row.details:
        rows = row.details["rows_entering_per_tile"]
        lines.append(
            f"      selected rows that change per tile of 128 queries: mean {rows['mean']:.1f}, median "
            f"{rows['median']:.0f}, p90 {rows['p90']:.0f}"
        )
    if "host_us" in row.details:
        lines.append(f"      host time per call: {format_us(row.details['host_us'])} µs")
    return lines


def accuracy_line(row: Row) -> str:
    a = row.accuracy
    return (
        f"  {row.name}: max_diff={a.max_diff:.2e} mean_diff={a.mean_diff:.2e} passed={a.passed} "
        f"({a.pairs} (batch, head) pairs, rtol={a.rtol:g} atol={a.atol:g})"
    )


def tier_lines(sparse: Row, dense: Row, configuration: Configuration) -> list[str]:
    """The tier assessment of ours against SDPA."""
    us = sparse.timing.us_per_iter
    per_head = configuration.us_per_head(us)
    pairs = configuration.batch * configuration.heads
    lines = ["TIER ASSESSMENT", f"  BlackwellSparseK  {format_us(us)} µs/iter"]
    if dense.timing is not None:
        dense_us = dense.timing.us_per_iter
        lines += [
            f"  PyTorch SDPA      {format_us(dense_us)} µs/iter",
            f"  speedup           {dense_us / us:.2f}x",
        ]
    lines.append(
        f"  µs/head           {per_head:,.3f} (µs/iter ÷ (B·H) = ÷ {pairs}; one head of one batch row)"
    )
    if configuration.is_tier_configuration():
        tier = highest_tier(per_head)
        verdict = f"{tier.name} passed" if tier else "none passed"
        limits = ", ".join(map(str, TIERS))
        lines.append(f"  tier              {verdict} (sustained; {limits} µs/head)")
    else:
        lines.append(
            "  tier              not judged here: tiers are defined on a GPU at "
            f"B={TIER.batch} H={TIER.heads} S={TIER.seq_len} D={TIER.head_dim} {TIER.dtype}, "
            f"k={TIER.num_selected} w={TIER.window} C={TIER.chunk_size}; elsewhere the speedup counts"
        )
    return lines


def speedup_lines(rows: list[Row]) -> list[str]:
    """How much faster our first row is than each peer, and how much memory each takes."""
    ours = next(row for row in rows if row.key == "sparsek")
    others = [row for row in rows if row.timing is not None]
    lines = ["SPEEDUP AND PEAK EXTRA MEMORY"]
    for row in others:
        ratio = row.timing.us_per_iter / ours.timing.us_per_iter
        lines.append(f"  {row.name:<38} {ratio:>7.2f}x {format_bytes(row.peak_extra_bytes):>14}")
    return lines


def run_dict(configuration: Configuration, rows: list[Row], iters: int) -> dict:
    """One configuration's part of the JSON."""
    by_key = {row.key: row for row in rows}
    sparse, dense = by_key["sparsek"], by_key["sdpa"]
    speedup = tier = None
    if sparse.timing and dense.timing:
        speedup = dense.timing.us_per_iter / sparse.timing.us_per_iter
    if sparse.timing and configuration.is_tier_configuration():
        passed = highest_tier(configuration.us_per_head(sparse.timing.us_per_iter))
        tier = passed.name if passed else "none"
    return {
        "configuration": configuration.to_dict(),
        "iters": iters,
        "speedup_over_sdpa": speedup,
        "tier": tier,
        "rows": {row.key: row.to_dict(configuration) for row in rows},
    }


def sweep_table(axis: str, runs: list[dict]) -> list[str]:
    """A table of µs/head over one axis of the configuration."""
    lines = [
        f"  {'dtype':<8}  {axis:>12}  {'SparseK µs/head':>16}  {'SDPA µs/head':>14}  {'speedup':>8}  passed"
    ]
    for run in runs:
        rows = run["rows"]
        sdpa = rows["sdpa"].get("us_per_head")
        cells = [
            f"{run['configuration']['dtype']:<8}",
            f"{run['configuration'][axis]:>12}",
            f"{rows['sparsek']['us_per_head']:>16,.3f}",
            f"{sdpa:>14,.3f}" if sdpa is not None else f"{'-':>14}",
            f"{run['speedup_over_sdpa']:>7.2f}x" if sdpa is not None else f"{'-':>8}",
            str(rows["sparsek"]["passed"]),
        ]
        lines.append("  " + "  ".join(cells))
    return lines


def write_json(path: Path, document: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def plot_sweep(path: Path, axis: str, runs: list[dict], title: str) -> None:
    """A PNG of µs/head of SparseK and SDPA over `axis`, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for dtype in dict.fromkeys(run["configuration"]["dtype"] for run in runs):
        chosen = [run for run in runs if run["configuration"]["dtype"] == dtype]
        for key, label, style in (("sdpa", "PyTorch SDPA", "o--"), ("sparsek", "SparseK", "s-")):
            points = [
                (run["configuration"][axis], run["rows"][key]["us_per_head"])
                for run in chosen
                if "us_per_head" in run["rows"][key]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=f"{label}, {dtype}")
    values = sorted({run["configuration"][axis] for run in runs})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.set_xlabel({"num_selected": "selected keys k", "seq_len": "sequence length S"}[axis])
    axes.set_ylabel("µs per (batch, head), lower is better")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
