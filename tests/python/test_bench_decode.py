"""The decode benchmark: its arguments, its figures on a small case, its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_decode

_SMALL = [
    "--batch", "1", "--heads", "2", "--head-dim", "16", "--num-selected", "8", "--window", "4",
    "--chunk-size", "8", "--dtype", "float32", "--device", "cpu", "--tokens", "16", "64",
    "--chunks", "2", "--launches", "2",
]  # fmt: skip


def test_defaults_and_arguments():
    on_cpu, output = bench_decode.parse_arguments([], has_gpu=False)
    assert on_cpu == bench_decode.CPU_DEFAULT
    assert output.name == "decode.json"
    on_gpu, _ = bench_decode.parse_arguments([], has_gpu=True)
    assert (on_gpu.batch, on_gpu.heads, on_gpu.dtype) == (16, 96, "float16")
    grouped, _ = bench_decode.parse_arguments(["--heads", "32", "--kv-heads", "8"], has_gpu=True)
    assert (grouped.heads, grouped.kv_heads) == (32, 8)
    with pytest.raises(SystemExit):
        bench_decode.parse_arguments(["--tokens", "100"], has_gpu=False)


def test_rows_in_use():
    """Of one chunk: the window grows from w + 1 to w + C, and k rows are selected."""
    settings, _ = bench_decode.parse_arguments(_SMALL, has_gpu=False)
    assert settings.mean_rows(64) == 8 + 4 + (1 + 8) / 2
    assert settings.mean_rows(0) == (1 + 8) / 2
    assert settings.row_bytes() == 2 * 2 * 16 * 4


def test_run(tmp_path, capsys):
    output = tmp_path / "decode.json"
    assert bench_decode.main([*_SMALL, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for name in ("SparseKCache.step", "SDPA, as many rows", "SDPA, all tokens"):
        assert name in printed
    document = json.loads(output.read_text())
    assert [point["tokens"] for point in document["points"]] == [16, 64]
    for point in document["points"]:
        for row in point["rows"].values():
            assert row["unavailable"] is None
            assert row["us"] > 0
            assert row["gb_per_s"] > 0
        assert point["cache_bytes"] == document["points"][0]["cache_bytes"]
    assert output.with_suffix(".png").stat().st_size > 0
