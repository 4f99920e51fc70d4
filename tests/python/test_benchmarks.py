"""The parts of the benchmarks that are functions of their arguments."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "benchmarks"), str(_ROOT / "scripts")]

import accuracy  # noqa: E402
import bench_forward  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import missing_packages  # noqa: E402
import ncu  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
from configuration import CPU_DEFAULT, TIER, Inputs, make_inputs  # noqa: E402


def test_default_configurations_of_cpu_and_gpu():
    arguments = bench_forward.parse_arguments([])
    on_cpu = bench_forward.configurations(arguments, has_gpu=False)
    assert [c.dtype for c in on_cpu] == ["float32", "bfloat16"]
    assert all((c.batch, c.heads, c.seq_len, c.head_dim) == (1, 8, 4096, 128) for c in on_cpu)
    assert bench_forward.configurations(arguments, has_gpu=True) == [TIER]


def test_flags_change_the_configuration():
    arguments = bench_forward.parse_arguments(
        "--batch 2 --heads 6 --kv-heads 2 --seq-len 300 --seq-len-q 7 --head-dim 64 --num-selected 0 "
        "--window 5 --chunk-size 16 --num-candidates 9 --gate value --dtype float16 --device cpu".split()
    )
    (c,) = bench_forward.configurations(arguments, has_gpu=True)
    assert (c.batch, c.heads, c.kv_heads, c.seq_len, c.seq_len_q) == (2, 6, 2, 300, 7)
    assert (c.head_dim, c.gate, c.dtype, c.device) == (64, "value", "float16", "cpu")
    assert c.selection() == {
        "num_selected": 0,
        "window": 5,
        "chunk_size": 16,
        "num_candidates": 9,
    }


def test_fewer_flags_follow_one_another():
    arguments = bench_forward.parse_arguments(
        ["--heads", "4", "--seq-len", "64", "--dtype", "float32"]
    )
    (c,) = bench_forward.configurations(arguments, has_gpu=False)
    assert (c.kv_heads, c.seq_len_q) == (4, 64)


@pytest.mark.parametrize("changes", [{"kv_heads": 5}, {"seq_len_q": 0}, {"seq_len_q": 4097}])
def test_inconsistent_configuration_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(CPU_DEFAULT, **changes)


def test_sweep_over_seq_len_keeps_the_number_of_tokens():
    swept = bench_forward.sweep(TIER, "seq_len")
    assert [c.seq_len for c in swept][-1] == 65536
    assert all(c.batch * c.seq_len == TIER.batch * TIER.seq_len for c in swept)
    assert all(c.seq_len_q == c.seq_len for c in swept)
    assert max(c.seq_len for c in bench_forward.sweep(CPU_DEFAULT, "seq_len")) == 16384


def test_sweep_over_num_selected():
    swept = bench_forward.sweep(CPU_DEFAULT, "num_selected")
    assert [c.num_selected for c in swept] == [32, 64, 128, 256, 512, 1024]
    assert all(c.seq_len == CPU_DEFAULT.seq_len for c in swept)


def test_description_leaves_out_what_varies():
    assert TIER.describe(without=("dtype", "num_selected")) == (
        "B=16 H=96 S=4096 D=128 w=128 C=128 M=4k gate=softmax"
    )
    c = replace(CPU_DEFAULT, heads=8, kv_heads=2, seq_len_q=1)
    assert "Hq=8 Hkv=2 S=4096 Sq=1" in c.describe()


def test_inputs_depend_on_the_seed_alone():
    c = replace(CPU_DEFAULT, seq_len=16, seq_len_q=16, heads=2, kv_heads=1)
    a, b, other = make_inputs(c, 1), make_inputs(c, 1), make_inputs(c, 2)
    assert torch.equal(a.q, b.q)
    assert torch.equal(a.scores, b.scores)
    assert not torch.equal(a.q, other.q)
    assert a.scores.shape == (1, 1, 16)
    assert a.scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("us_per_head", "tier"),
    [
        (3.821, None),
        (3.820, "T1 (dense floor)"),
        (3.0, "T1 (dense floor)"),
        (2.999, "T2 (structured sparse)"),
        (2.0, "T2 (structured sparse)"),
        (1.999, "T3"),
    ],
)
def test_highest_tier(us_per_head, tier):
    passed = report.highest_tier(us_per_head)
    assert (passed.name if passed else None) == tier


def _rows(us_sparse: float, us_dense: float | None) -> list[report.Row]:
    def timed(us):
        return timing.Timing(us, us * 0.9, us * 1.1, samples=5, total_time_s=1.0, us_first=us * 0.8)

    good = accuracy.Accuracy(1e-4, 1e-5, True, 1e-3, 2e-3, pairs=4)
    dense = report.Row("sdpa", "PyTorch SDPA (dense floor)", accuracy=good)
    if us_dense is None:
        dense.unavailable = "out of device memory"
    else:
        dense.timing = timed(us_dense)
    ours = report.Row("sparsek", "BlackwellSparseK", timed(us_sparse), good, 2**20)
    ours.details = {"selection_us": us_sparse / 50, "selection_share": 0.02}
    return [dense, ours]


def test_tiers_are_judged_at_the_tier_configuration_only():
    pairs = TIER.batch * TIER.heads
    dense, ours = _rows(1.9 * pairs, 8.1 * pairs)
    at_tier = "\n".join(report.tier_lines(ours, dense, TIER))
    assert "T3 passed" in at_tier
    assert "4.26x" in at_tier
    assert "1.900" in at_tier
    for other in (
        replace(TIER, device="cpu"),
        replace(TIER, dtype="bfloat16"),
        replace(TIER, num_selected=128),
        replace(TIER, batch=1),
    ):
        assert "not judged" in "\n".join(report.tier_lines(ours, dense, other))
    assert report.run_dict(TIER, [dense, ours], 80)["tier"] == "T3"
    assert report.run_dict(replace(TIER, batch=1), [dense, ours], 80)["tier"] is None
    assert TIER.is_tier_configuration()
    assert replace(TIER, device="cuda:1").is_tier_configuration()


def test_report_survives_a_peer_that_could_not_run():
    dense, ours = _rows(1000.0, None)
    assert "speedup  " not in "\n".join(report.tier_lines(ours, dense, TIER))
    assert report.row_lines("[1/3]", dense, TIER)[1].endswith("not run: out of device memory")
    run = report.run_dict(TIER, [dense, ours], 80)
    assert run["speedup_over_sdpa"] is None
    assert "us_per_iter" not in run["rows"]["sdpa"]
    assert len(report.sweep_table("seq_len", [run])) == 2


def test_json_has_every_figure_of_a_row(tmp_path):
    dense, ours = _rows(1536.0, 3072.0)
    path = tmp_path / "folder" / "latest.json"
    report.write_json(path, {"runs": [report.run_dict(TIER, [dense, ours], 80)]})
    (run,) = json.loads(path.read_text())["runs"]
    row = run["rows"]["sparsek"]
    assert row["us_per_iter"] == 1536.0
    assert row["us_per_head"] == 1.0
    assert row["us_per_head_first"] == pytest.approx(0.8)
    assert row["total_time_s"] == 1.0
    assert (row["max_diff"], row["mean_diff"], row["passed"]) == (1e-4, 1e-5, True)
    assert row["selection_share"] == 0.02
    assert row["peak_extra_bytes"] == 2**20
    assert run["speedup_over_sdpa"] == 2.0
    assert run["configuration"]["num_selected"] == 256


def test_sweep_plot_is_a_png(tmp_path):
    runs = []
    for configuration in bench_forward.sweep(CPU_DEFAULT, "num_selected"):
        runs.append(report.run_dict(configuration, _rows(configuration.num_selected, 512.0), 3))
    path = tmp_path / "plot.png"
    report.plot_sweep(path, "num_selected", runs, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(report.sweep_table("num_selected", runs)) == 1 + len(runs)


def test_quartiles():
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no samples"):
        timing.quartiles([])


def test_summary_takes_medians():
    t = timing.summarise([4.0, 2.0, 3.0], total_time_s=1.0, first=[9.0, 1.0, 5.0])
    assert (t.us_per_iter, t.us_first, t.samples) == (3.0, 5.0, 3)
    assert timing.summarise([1.0], total_time_s=0.0).us_first is None


def test_cpu_rows_take_turns():
    order = []
    rows = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = timing.time_cpu(rows, iters=3)
    assert order == ["a", "b"] * 4  # a warm-up and three rounds
    assert timings["a"].samples == 3


def test_peak_memory_of_a_call():
    text = "VmPeak:\t  10 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n"
    assert memory.status_kib(text, "VmHWM") == 2048
    with pytest.raises(KeyError):
        memory.status_kib(text, "VmSwap")
    size = 64 * 2**20
    peak = memory.peak_extra_bytes(lambda: torch.ones(size // 4), "cpu")
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.9 * size < peak < 1.5 * size


def test_cpu_model():
    assert machine.cpu_model("processor : 0\nmodel name\t: A CPU @ 2 GHz\n") == "A CPU @ 2 GHz"
    assert machine.cpu_model("") != ""


def test_sample_pairs_are_distinct_and_in_range():
    c = replace(CPU_DEFAULT, batch=3)
    pairs = accuracy.sample_pairs(c, 100, seed=0)
    assert len(set(pairs)) == c.batch * c.heads
    assert all(0 <= b < c.batch and 0 <= h < c.heads for b, h in pairs)


def test_comparison_judges_by_dtype_and_refuses_nan():
    reference = torch.ones(8, dtype=torch.float64)
    off = (reference + 0.004).float()
    assert not accuracy.compare([off], [reference], "float32").passed
    assert not accuracy.compare([off], [reference], "float16").passed
    assert accuracy.compare([off], [reference], "bfloat16").passed
    assert accuracy.compare([off], [reference], "float32").max_diff == pytest.approx(
        0.004, rel=1e-3
    )
    off[3] = math.nan
    assert not accuracy.compare([off], [reference], "bfloat16").passed


@pytest.mark.parametrize("seq_len_q", [33, 20])
def test_dense_reference_is_causal_attention(seq_len_q):
    q, k, v = (torch.randn(1, 1, s, 16, dtype=torch.float64) for s in (seq_len_q, 33, 33))
    rows = torch.tensor([0, 5, seq_len_q - 1])
    mask = torch.ones(seq_len_q, 33, dtype=torch.bool).tril(33 - seq_len_q)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0, rows]
    actual = accuracy.dense_reference(Inputs(q, k, v, scores=None), rows)
    torch.testing.assert_close(actual, expected)


def test_dense_rows_cover_both_ends():
    assert accuracy.dense_rows(5).tolist() == [0, 1, 2, 3, 4]
    rows = accuracy.dense_rows(100_000)
    assert (rows[0], rows[-1], len(rows)) == (0, 99_999, 2048)


def test_block_table_has_the_budget():
    assert peers.blocks_of_budget(256, 128) == 3
    assert peers.blocks_of_budget(1, 0) == 1
    table = peers.block_table(10, 3, torch.Generator().manual_seed(0))
    assert table.diagonal().all()
    assert not table.triu(1).any()
    assert table.sum(dim=1).tolist() == [min(row, 3) + 1 for row in range(10)]


def test_peers_say_why_they_cannot_run():
    c = replace(CPU_DEFAULT, seq_len=32, seq_len_q=32, heads=2, kv_heads=1)
    inputs = make_inputs(c, 0)
    with pytest.raises(peers.UnavailableError, match="GPU"):
        peers.XFORMERS.prepare(c, inputs)
    for peer in peers.FURTHER:
        if not peer.name.startswith("SDPA"):
            with pytest.raises(peers.UnavailableError):
                peer.prepare(c, inputs)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("seq_len_q", [32, 8])
def test_sdpa_is_causal_from_the_last_query(seq_len_q, kv_heads):
    c = replace(
        CPU_DEFAULT, seq_len=32, seq_len_q=seq_len_q, heads=2, kv_heads=kv_heads, head_dim=16
    )
    inputs = make_inputs(c, 0)
    out = peers.SDPA.prepare(c, inputs)()
    assert accuracy.dense_accuracy(out, inputs, c, [(0, 0), (0, 1)]).passed


_NCU_COLUMNS = (
    "ID",
    "Process Name",
    "Kernel Name",
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
_NCU = "\n".join(
    [
        "==PROF== Connected to process 12",
        '==PROF== Profiling "attend_kernel": 0%....50%....100% - 9 passes',
        ",".join(f'"{name}"' for name in _NCU_COLUMNS),
        '"","","","ns","%","%","%"',
        '"0","python","void attend_kernel<(int)128>(Params)","2,500,000","53.1","64.0","18.7"',
        '"1","python","fill","1000","1.0","n/a","50"',
    ]
)


def test_ncu_output_is_read():
    first, second = ncu.parse(_NCU)
    assert first["kernel"] == "void attend_kernel<(int)128>(Params)"
    assert first["duration_us"] == 2500.0
    assert first["sm__throughput.avg.pct_of_peak_sustained_elapsed"] == 64.0
    assert second["sm__throughput.avg.pct_of_peak_sustained_elapsed"] is None
    assert "lts__throughput.avg.pct_of_peak_sustained_elapsed" not in first
    with pytest.raises(ncu.NcuError, match="no kernel"):
        ncu.parse("==PROF== Disconnected\n")


def test_ncu_errors_are_explained():
    refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    assert "counters" in ncu.explain(refused)
    assert ncu.explain("==ERROR== The application returned an error code (1).").startswith("ncu")


@pytest.mark.parametrize(
    ("metrics", "bound"),
    [
        ({"tensor": 65.0, "dram": 53.0, "l2": 60.0, "warps": 18.7}, "tensor"),
        ({"tensor": 5.0, "dram": 80.0, "l2": 60.0, "warps": 60.0}, "DRAM"),
        ({"tensor": 20.0, "dram": 20.0, "l2": 77.0, "warps": 60.0}, "L2"),
        ({"tensor": 1.0, "dram": 12.0, "l2": 10.0, "warps": 30.0}, "latency"),
        ({}, "unknown"),
    ],
)
def test_bound_of_a_kernel(metrics, bound):
    record = {ncu.METRICS[name]: value for name, value in metrics.items()}
    assert bound in ncu.bound(record)


def test_missing_packages():
    have = {"torch": "2.13.0+cpu", "numpy": "2.0.0"}

    def installed(name):
        if name not in have:
            raise missing_packages.importlib.metadata.PackageNotFoundError(name)
        return have[name]

    lines = ["# comment", "", "torch==2.13.0", "numpy==2.4.6", "ninja==1.13.2", "rich==15.0.0"]

    def find(any_version):
        return missing_packages.missing(
            lines,
            any_version=any_version,
            installed=installed,
            which=lambda name: "/usr/bin/ninja" if name == "ninja" else None,
        )

    assert find(False) == ["numpy==2.4.6", "ninja==1.13.2", "rich==15.0.0"]
    assert find(True) == ["rich==15.0.0"]
    with pytest.raises(ValueError, match="line 1"):
        missing_packages.missing(["torch>=2"], any_version=False)


def test_requirement_markers():
    assert missing_packages.applies(None)
    assert missing_packages.applies('python_version >= "3.11"', (3, 12))
    assert not missing_packages.applies('python_version < "3.11"', (3, 12))
    with pytest.raises(ValueError, match="unsupported marker"):
        missing_packages.applies('sys_platform == "linux"')
