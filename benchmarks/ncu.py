"""Nsight Compute: which metrics we read, how its CSV is parsed, and what bounds a kernel."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Sequence

METRICS = {
    "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "duration": "gpu__time_duration.sum",
}
# Chips spell the tensor pipe's utilisation differently; the first that ncu knows is read.
_TENSOR_METRICS = (
    METRICS["tensor"],
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
)
# What to reach, in percent; None: shown for information.
TARGETS = {"sm": 85.0, "warps": 90.0, "dram": 75.0, "l2": None, "tensor": None}

# Below this share of a unit's peak no unit bounds the kernel.
_BOUND_PERCENT = 50.0
# Fewer active warps than this is what a warp-specialised kernel with three warpgroups shows.
_FEW_WARPS_PERCENT = 30.0


class NcuError(RuntimeError):
    """ncu is missing, may not read the counters, or profiled nothing."""


def find() -> str:
    """The ncu program."""
    program = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if program is None:
        raise NcuError(
            "ncu (NVIDIA Nsight Compute) is not on PATH; it comes with the CUDA toolkit, "
            "or as the package nsight-compute of NVIDIA's repository"
        )
    return program


def explain(output: str) -> str:
    """One line that says why ncu failed, from what it printed."""
    if "ERR_NVGPUCTRPERM" in output or "LibraryNotLoaded" in output:
        return (
            "ncu may not read the GPU's performance counters here: run as root, or load the NVIDIA "
            "module with NVreg_RestrictProfilingToAdminUsers=0 (virtual machines may forbid it)"
        )
    errors = [
        line.removeprefix("==ERROR== ") for line in output.splitlines() if "==ERROR==" in line
    ]
    return f"ncu failed: {errors[0] if errors else 'it printed no error'}"


def tensor_metric(program: str) -> str:
    """The name under which this chip reports the tensor pipe's utilisation."""
    listing = subprocess.run([program, "--query-metrics"], capture_output=True, text=True).stdout
    known = set(re.findall(r"^(\w+__\w+)", listing, re.MULTILINE))
    for metric in _TENSOR_METRICS:
        if metric.split(".")[0] in known:
            return metric
    raise NcuError(f"ncu knows none of {', '.join(_TENSOR_METRICS)} for this GPU")


def profile(program: str, metrics: Sequence[str], command: Sequence[str]) -> list[dict]:
    """Profiles what `command` launches between cudaProfilerStart and Stop, one record per kernel."""
    ncu_command = [
        program,
        "--csv",
        "--page=raw",
        "--print-units=base",
        "--clock-control=none",  # the clocks that users get, and a machine's settings are not ours
        "--profile-from-start=off",
        f"--metrics={','.join(metrics)}",
        *command,
    ]
    result = subprocess.run(ncu_command, capture_output=True, text=True)
    if result.returncode != 0 or "==ERROR==" in result.stdout:
        raise NcuError(explain(result.stdout + result.stderr))
    return parse(result.stdout)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # "n/a", or a metric without a value


def parse(output: str) -> list[dict]:
    """Kernel, duration_us and metrics of each profiled launch, from ncu's --csv --page=raw output."""
    lines = output.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise NcuError("ncu profiled no kernel")
    header, _units, *rows = csv.reader(lines[start:])
    records = []
    for row in rows:
        cells = dict(zip(header, row, strict=False))
        if not cells.get("Kernel Name"):
            continue
        record: dict = {"kernel": cells["Kernel Name"]}
        record |= {name: _number(cells[name]) for name in header if "__" in name}
        duration = record.pop(METRICS["duration"], None)
        record["duration_us"] = None if duration is None else duration / 1e3  # base unit: ns
        records.append(record)
    if not records:
        raise NcuError("ncu profiled no kernel")
    return records


def bound(record: dict, tensor: str = METRICS["tensor"]) -> str:
    """One line on what bounds this kernel, from its utilisations."""
    names = {"tensor": tensor, "dram": METRICS["dram"], "l2": METRICS["l2"]}
    used = {unit: record.get(metric) for unit, metric in names.items()}
    used = {unit: percent for unit, percent in used.items() if percent is not None}
    if not used:
        return "unknown: no utilisation was read"
    unit, percent = max(used.items(), key=lambda item: item[1])
    if percent < _BOUND_PERCENT:
        return f"latency, barriers or launch size: no unit is half busy (busiest: {unit}, {percent:.0f} %)"
    text = {
        "tensor": "tensor pipe",
        "dram": "DRAM bandwidth",
        "l2": "L2 bandwidth",
    }[unit] + f" ({percent:.0f} %)"
    warps = record.get(METRICS["warps"])
    if unit == "tensor" and warps is not None and warps < _FEW_WARPS_PERCENT:
        text += (
            f"; {warps:.0f} % active warps is the design: a warp-specialised wgmma kernel holds 12 of 64 "
            "warps and needs no more, so the target for warps does not apply"
        )
    return text


def lines(record: dict, tensor: str = METRICS["tensor"]) -> list[str]:
    """The figures of one kernel against their targets."""
    duration = record["duration_us"]
    result = [f"  {record['kernel']}  {duration:,.1f} µs" if duration else f"  {record['kernel']}"]
    for unit, target in TARGETS.items():
        percent = record.get(tensor if unit == "tensor" else METRICS[unit])
        value = "   n/a" if percent is None else f"{percent:5.1f}%"
        verdict = "for information"
        if target is not None:
            met = percent is not None and percent > target
            verdict = f"target > {target:.0f}%: {'met' if met else 'not met'}"
        result.append(f"    {unit:<7} {value}  {verdict}")
    result.append(f"    bound by {bound(record, tensor)}")
    return result
