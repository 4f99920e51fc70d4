"""What ran the benchmark: machine, versions, revision."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def cpu_model(cpuinfo: str) -> str:
    """The processor's name from /proc/cpuinfo's text, or the architecture where it has none (Arm)."""
    for line in cpuinfo.splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _run(*command: str) -> str | None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def git_revision() -> str | None:
    """What SPARSEK_REVISION says: the revision of the libraries that scripts/gpu_python.sh links. Else
    the commit that is checked out, with "-dirty" where tracked files differ, or None outside git.
    """
    revision = os.environ.get("SPARSEK_REVISION")
    return revision or _run("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def describe(device: str) -> dict:
    """Machine and versions, as they go into the JSON."""
    import blackwell_sparsek

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    result = {
        "cpu": cpu_model(_read("/proc/cpuinfo")),
        "cpu_count": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blackwell_sparsek": blackwell_sparsek.__version__,
        "cpu_isa": blackwell_sparsek.build_info()["cpu_isa"],
        "git_revision": git_revision(),
        "gpu": None,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        result |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return result


def headline(machine: dict) -> str:
    """One line for the report's header."""
    if machine["gpu"]:
        return (
            f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB, sm_{machine['compute_capability'].replace('.', '')}), "
            f"driver {machine['driver']}, CUDA {machine['cuda']}"
        )
    isa = f", {machine['cpu_isa']}"
    return f"{machine['cpu']}, {machine['cpu_count']} cores{isa}, {machine['torch_threads']} torch threads"
