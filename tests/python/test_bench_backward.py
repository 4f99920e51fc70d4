"""The backward benchmark: its parts that are functions of their arguments, and a small run."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT / "benchmarks"))

import accuracy  # noqa: E402
import bench_backward  # noqa: E402
import bench_forward  # noqa: E402
import peers  # noqa: E402
import scores  # noqa: E402
from blackwell_sparsek import select  # noqa: E402
from configuration import CPU_DEFAULT, make_inputs  # noqa: E402

_SMALL = replace(
    CPU_DEFAULT,
    batch=2,
    heads=4,
    kv_heads=2,
    seq_len=160,
    seq_len_q=160,
    head_dim=16,
    num_selected=8,
    window=8,
    chunk_size=16,
)


def test_default_configurations_of_cpu_and_gpu():
    arguments = bench_backward.parse_arguments([])
    (on_cpu,) = bench_backward.configurations(arguments, has_gpu=False)
    assert on_cpu == CPU_DEFAULT
    (on_gpu,) = bench_backward.configurations(arguments, has_gpu=True)
    assert (on_gpu.batch, on_gpu.heads, on_gpu.seq_len, on_gpu.dtype) == (4, 96, 4096, "float16")
    long = bench_backward.long_configurations(on_gpu)
    assert [(c.batch, c.heads, c.kv_heads, c.seq_len) for c in long] == [
        (1, 8, 8, 4096),
        (1, 8, 8, 16384),
        (1, 8, 8, 65536),
    ]
    assert all(c.seq_len_q == c.seq_len for c in long)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_checked(dtype):
    c = replace(_SMALL, dtype=dtype)
    inputs = make_inputs(c, 0)
    dout = bench_backward.make_dout(inputs, 0)
    step = bench_backward.sparsek_step(c, inputs, dout)
    gradients = step()
    pairs = accuracy.sample_kv_pairs(c, 10, 0)
    assert sorted(pairs) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    result = accuracy.gradient_accuracy(gradients, inputs, dout, c, pairs)
    assert result.passed
    assert list(result.relative_error) == ["dq", "dk", "dv", "dscores"]
    for index in range(4):
        wrong = [g.clone() for g in gradients]
        wrong[index] *= 1.05
        assert not accuracy.gradient_accuracy(wrong, inputs, dout, c, pairs).passed
    wrong = [g.clone() for g in gradients]
    wrong[0][0, 0, 0, 0] = torch.nan
    assert not accuracy.gradient_accuracy(wrong, inputs, dout, c, pairs).passed


def test_without_gates_there_is_no_gradient_of_scores():
    c = replace(_SMALL, gate="none")
    inputs = make_inputs(c, 0)
    step = bench_backward.sparsek_step(c, inputs, bench_backward.make_dout(inputs, 0))
    assert len(step()) == 3


def test_a_peer_works_on_leaves_in_its_own_layout():
    """Its gradients are those of dense attention, whatever the layout, step after step."""
    c = replace(_SMALL, kv_heads=4)
    inputs = make_inputs(c, 0)
    dout = bench_backward.make_dout(inputs, 0)
    expected = bench_backward.peer_step(peers.SDPA, c, inputs, dout)()

    def prepare(configuration, peer_inputs):
        q, k, v = peers._bshd(peer_inputs, configuration)
        assert q.data_ptr() == peer_inputs.q.data_ptr()  # no copy that would be timed
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(
            1, 2
        )

    peer = peers.Peer("strided", prepare, dense=True, to_bhsd=peers.transposed)
    step = bench_backward.peer_step(peer, c, inputs, dout)
    for _ in range(2):
        for gradient, other in zip(step(), expected, strict=True):
            torch.testing.assert_close(gradient.transpose(1, 2), other)


def _rows_entering_by_hand(expiry, c) -> list[int]:
    """Walks over the tiles of one head with sets."""

    def selected(query):
        border = max(0, query // c.chunk_size * c.chunk_size - c.window)
        return {j for j in range(border) if int(expiry[j]) > query}

    entering = []
    for tile in range(0, c.seq_len, 128):
        before = selected(tile - 1) if tile else set()
        seen = set()
        for query in range(tile, min(tile + 128, c.seq_len)):
            seen |= selected(query)
        entering.append(len(seen - before))
    return entering


@pytest.mark.parametrize(("chunk_size", "window"), [(1, 20), (16, 8), (128, 128), (96, 50)])
def test_rows_that_change_per_tile(chunk_size, window):
    c = replace(_SMALL, batch=1, kv_heads=1, seq_len=1300, chunk_size=chunk_size, window=window)
    u = torch.randn(1, 1, c.seq_len, generator=torch.Generator().manual_seed(0))
    expiry = select(u, **c.selection()).expiry
    expected = _rows_entering_by_hand(expiry[0, 0], c)
    first_full = -(-(c.num_selected + window + chunk_size) // 128)
    steady = expected[first_full:]
    actual = scores.rows_entering(expiry, c)
    assert actual["mean"] == pytest.approx(sum(steady) / len(steady))
    assert actual["mean_share"] == pytest.approx(actual["mean"] / 8)
    assert actual["median"] in steady
    assert math.isnan(scores.rows_entering(expiry, replace(c, num_selected=0))["mean"])


@pytest.fixture
def scores_file(tmp_path) -> Path:
    path = tmp_path / "scores.pt"
    torch.save({"scores": torch.randn(3, 2, 2, 200), "step": 1}, path)
    return path


def test_learned_scores_are_repeated_over_heads_and_batch(scores_file):
    c = replace(_SMALL, batch=3, heads=8, kv_heads=8)
    saved = torch.load(scores_file, weights_only=True)["scores"]
    learned = scores.load_learned(scores_file, c)
    assert learned.shape == (3, 8, 160)
    assert torch.equal(learned[0, 0], saved[0, 0, 0, :160])
    assert torch.equal(learned[1, 3], saved[1, 1, 1, :160])  # layer 1, batch row 1, KV head 1
    assert torch.equal(learned[0, 6], learned[0, 0])
    assert torch.equal(learned[2], learned[0])
    with pytest.raises(ValueError, match="at least 300 positions, got 200"):
        scores.load_learned(scores_file, replace(c, seq_len=300, seq_len_q=300))


_FLAGS = (
    "--batch 1 --heads 2 --seq-len 160 --head-dim 16 --num-selected 8 --window 8 --chunk-size 16 "
    "--device cpu --dtype float32 --iters 1"
).split()


def test_a_small_run(scores_file, tmp_path, capsys):
    output = tmp_path / "backward.json"
    arguments = [*_FLAGS, "--peers", "all", "--scores", str(scores_file), "--output", str(output)]
    assert bench_backward.main(arguments) == 0
    (run,) = json.loads(output.read_text())["runs"]
    rows = run["rows"]
    assert run["speedup_over_sdpa"] > 0
    assert rows["sdpa"]["us_per_iter"] > 0
    assert "GPU" in rows["xformers_local"]["unavailable"]
    for key in ("sparsek", "sparsek_learned"):
        assert rows[key]["gradients"]["passed"]
        assert rows[key]["forward_us"] < 100 * rows[key]["us_per_iter"]
        assert rows[key]["rows_entering_per_tile"]["mean"] >= 0
    printed = capsys.readouterr().out
    assert "SPEEDUP AND PEAK EXTRA MEMORY" in printed
    assert "selected rows that change per tile" in printed


def test_the_forward_benchmark_takes_learned_scores_too(scores_file, tmp_path, monkeypatch):
    output = tmp_path / "forward.json"
    arguments = ["bench_forward.py", *_FLAGS, "--pairs", "1", "--scores", str(scores_file)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(output)])
    assert bench_forward.main() == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert run["rows"]["sparsek_learned"]["passed"]
    assert run["rows"]["sparsek_learned"]["selection_us"] > 0


def test_cost_per_token_is_shown(capsys):
    def run(seq_len, us_per_head, host_us):
        row = {"us_per_head": us_per_head, "us_per_iter": 8 * us_per_head, "host_us": host_us}
        return {
            "configuration": {"batch": 1, "heads": 8, "seq_len": seq_len},
            "rows": {"sparsek": row},
        }

    bench_backward.show_long([run(1000, 10.0, 20.0), run(4000, 48.0, 20.0), run(1, 1.0, 7.0)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("10.000 ns per head and token, 1.00x the first line")
    assert lines[2].endswith("12.000 ns per head and token, 1.20x the first line")
    assert lines[3].endswith("(bound by the host)")
