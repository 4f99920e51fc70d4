"""The Python examples run as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import blackwell_sparsek as bs

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str, *arguments: str) -> str:
    package = str(Path(bs.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package}
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_forward(device):
    output = run_example("01_forward.py", "--seq-len", "700", "--device", device)
    assert "out [1, 8, 700, 64]" in output
    assert "SDPA" in output
