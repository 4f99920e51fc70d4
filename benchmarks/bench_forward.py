"""Times BlackwellSparseK's forward against PyTorch's SDPA and xFormers, and checks it. This is `make bench`.

    python benchmarks/bench_forward.py                          the default configuration of this machine
    python benchmarks/bench_forward.py --seq-len 16384 --dtype bfloat16
    python benchmarks/bench_forward.py --sweep seq_len          a table and a plot
    python benchmarks/bench_forward.py --peers all              on a GPU: FlexAttention, FlashAttention-3, ...
    python benchmarks/bench_forward.py --scores scores.pt       also with a trained model's scores (02_train_lm.py --save-scores)

Without a GPU: B=1 H=8 S=4096 D=128 in float32 and bfloat16. With one: the tier configuration.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import accuracy
import machine as machine_info
import memory
import peers
import report
import scores as score_files
import timing
import torch
from configuration import (
    CPU_DEFAULT,
    CPU_DTYPES,
    TIER,
    Configuration,
    Inputs,
    add_arguments,
    from_arguments,
    make_inputs,
)
from progress import progress
from rich.console import Console

_RESULTS = Path(__file__).parent / "results"
_SWEEPS = {
    "num_selected": (32, 64, 128, 256, 512, 1024),
    "seq_len": (1024, 2048, 4096, 8192, 16384, 32768, 65536),
}
_CPU_MAX_SWEEP_SEQ_LEN = 16384
# Time that the CPU's interleaved repetitions may take for one configuration when --iters is not given.
_CPU_BUDGET_S = 20.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--iters",
        type=int,
        help="CPU: repetitions of each row (default: what fits in 20 s, 3 to 20); GPU: launches "
        f"of the sustained protocol (default and least: {timing.MIN_SUSTAINED_LAUNCHES})",
    )
    parser.add_argument("--sweep", choices=tuple(_SWEEPS), help="vary one number; table and PNG")
    parser.add_argument(
        "--peers",
        choices=("none", "default", "all"),
        default="default",
        help="none: SparseK alone, for lengths where dense attention takes minutes",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        help="(batch, head) pairs to check against fp64 (default: 4, in a sweep 1 each; 0: none)",
    )
    parser.add_argument("--scores", type=Path, help="scores of a trained model, a row of their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=_RESULTS / "latest.json", help="JSON file")
    return parser.parse_args(argv)


def configurations(arguments: argparse.Namespace, *, has_gpu: bool) -> list[Configuration]:
    """The configurations of a run without a sweep: one per dtype."""
    return from_arguments(
        arguments,
        has_gpu=has_gpu,
        gpu_default=TIER,
        cpu_default=CPU_DEFAULT,
        cpu_dtypes=CPU_DTYPES,
    )


def sweep(configuration: Configuration, axis: str) -> list[Configuration]:
    """The configuration with `axis` varied; over seq_len the number of tokens stays where it can."""
    result = []
    for value in _SWEEPS[axis]:
        changes = {axis: value}
        if axis == "seq_len":
            if not configuration.is_cuda and value > _CPU_MAX_SWEEP_SEQ_LEN:
                continue
            tokens = configuration.batch * configuration.seq_len
            changes |= {"seq_len_q": value, "batch": max(1, tokens // value)}
            if not configuration.is_cuda:
                changes["batch"] = configuration.batch
        result.append(replace(configuration, **changes))
    return result


class Bench:
    """Measures configurations one after another, with a progress bar in a terminal."""

    def __init__(self, arguments: argparse.Namespace, console: Console):
        self._arguments = arguments
        self._console = console

    def _prepare(
        self, configuration: Configuration, inputs: Inputs
    ) -> tuple[list[report.Row], dict[str, Callable[[], torch.Tensor]]]:
        """The rows and, for those that run here, their calls. Each is called once and checked."""
        c = configuration
        count = self._arguments.pairs
        if count is None:
            count = 1 if self._arguments.sweep else 4
        pairs = accuracy.sample_pairs(c, count, self._arguments.seed)
        chosen = [("sdpa", peers.SDPA), ("xformers", peers.XFORMERS)]
        if self._arguments.peers == "all":
            chosen += [(peer.name, peer) for peer in peers.FURTHER]
        rows: list[report.Row] = []
        calls: dict[str, Callable[[], torch.Tensor]] = {}
        for key, peer in chosen:
            row = report.Row(key, peer.name)
            rows.append(row)
            if self._arguments.peers == "none":
                row.unavailable = "left out by --peers none"
                continue
            with peers.refusal_in(row):
                call = peer.prepare(c, inputs)
                row.peak_extra_bytes, out = _first_call(call, c.device)
                if peer.dense and pairs:
                    row.accuracy = accuracy.dense_accuracy(peer.to_bhsd(out), inputs, c, pairs)
                calls[key] = call

        # The third row, after the two that are always there.
        row = report.Row("sparsek", "BlackwellSparseK (learnable sparse)")
        rows.insert(2, row)
        calls |= self._prepare_ours(row, c, inputs, pairs)
        if self._arguments.scores is not None:
            row = report.Row("sparsek_learned", "BlackwellSparseK, learned scores")
            rows.insert(3, row)
            learned = score_files.with_learned(inputs, self._arguments.scores, c)
            calls |= self._prepare_ours(row, c, learned, pairs)
        return rows, calls

    def _prepare_ours(
        self, row: report.Row, c: Configuration, inputs: Inputs, pairs: list[tuple[int, int]]
    ) -> dict[str, Callable]:
        """The calls behind a row of ours: the whole forward, and its selection alone."""
        from blackwell_sparsek import attention_forward, capability, select

        def ours() -> torch.Tensor:
            return attention_forward(
                inputs.q, inputs.k, inputs.v, inputs.scores, gate=c.gate, **c.selection()
            )

        row.details["kernel"] = capability(
            inputs.q.shape,
            inputs.k.shape,
            dtype=c.torch_dtype,
            device=c.device,
            gate=c.gate,
            **c.selection(),
        ).kernel
        row.peak_extra_bytes, out = _first_call(ours, c.device)
        if pairs:
            row.accuracy = accuracy.sparse_accuracy(out, inputs, c, pairs)
        expiry = select(inputs.scores, **c.selection()).expiry
        row.details["rows_entering_per_tile"] = score_files.rows_entering(expiry, c)
        return {
            row.key: ours,
            f"{row.key} selection": lambda: select(inputs.scores, **c.selection()),
        }

    def _time(self, configuration: Configuration, calls: dict) -> tuple[dict, int]:
        """Timings of all calls and the number of iterations behind them."""
        if configuration.is_cuda:
            iters = max(self._arguments.iters or 0, timing.MIN_SUSTAINED_LAUNCHES)
            with progress(self._console, "timing", 3 * len(calls)) as step:
                return timing.time_cuda(calls, iters=iters, repetitions=3, on_step=step), iters
        iters = self._arguments.iters
        if iters is None:
            start = time.perf_counter()
            for call in calls.values():
                call()
            iters = min(20, max(3, round(_CPU_BUDGET_S / (time.perf_counter() - start))))
        with progress(self._console, "timing", iters * len(calls)) as step:
            return timing.time_cpu(calls, iters=iters, on_step=step), iters

    def measure(self, configuration: Configuration) -> tuple[list[report.Row], int]:
        """All rows of one configuration, timed and checked."""
        inputs = make_inputs(configuration, self._arguments.seed)
        with torch.inference_mode():
            rows, calls = self._prepare(configuration, inputs)
            timings, iters = self._time(configuration, calls)
            for row in rows:
                row.timing = timings.get(row.key)
            for row in rows:
                if not row.key.startswith("sparsek"):
                    continue
                selection_us = timings[f"{row.key} selection"].us_per_iter
                row.details["selection_us"] = selection_us
                row.details["selection_share"] = selection_us / row.timing.us_per_iter
                if configuration.is_cuda:
                    row.details["host_us"] = timing.host_us(calls[row.key])
        return rows, iters

    def show(self, configuration: Configuration, rows: list[report.Row]) -> None:
        lines = []
        for index, row in enumerate(rows):
            number = f"[{index + 1}/3]" if index < 3 else "[more]"
            lines += report.row_lines(number, row, configuration)
        by_key = {row.key: row for row in rows}
        lines += ["", *report.tier_lines(by_key["sparsek"], by_key["sdpa"], configuration), ""]
        checked = [report.accuracy_line(row) for row in rows if row.accuracy]
        lines += ["CORRECTNESS (against fp64)", *(checked or ["  not checked (--pairs 0)"])]
        print("\n".join(lines), end="\n\n", flush=True)


def _first_call(call: Callable[[], torch.Tensor], device: str) -> tuple[int | None, torch.Tensor]:
    """The peak of memory of a call after one warm-up call, and the output."""
    out = call()
    del out
    peak = memory.peak_extra_bytes(call, device)
    return peak, call()


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    chosen = configurations(arguments, has_gpu=torch.cuda.is_available())
    if arguments.sweep:
        chosen = [c for configuration in chosen for c in sweep(configuration, arguments.sweep)]
    machine = machine_info.describe(chosen[0].device)
    print("BlackwellSparseK forward benchmark")
    print(f"  machine   {machine_info.headline(machine)}")
    print(
        f"  versions  blackwell_sparsek {machine['blackwell_sparsek']} ({machine['git_revision']}), "
        f"torch {machine['torch']}, Python {machine['python']}"
    )
    print("  protocol  ", end="")
    if chosen[0].is_cuda:
        print(
            f"CUDA events; sustained: second half of ≥ {timing.MIN_SUSTAINED_LAUNCHES} launches without a "
            f"pause; first: {timing.FIRST_LAUNCHES} launches after {timing.PAUSE_S} s; medians; rows take turns"
        )
    else:
        print("wall clock; median of repetitions, rows take turns; selection time included")

    bench = Bench(arguments, Console())
    document = {"machine": machine, "sweep": arguments.sweep, "runs": []}
    passed = True
    for configuration in chosen:
        print(f"\n== {configuration.describe()} on {configuration.device}", flush=True)
        rows, iters = bench.measure(configuration)
        bench.show(configuration, rows)
        document["runs"].append(report.run_dict(configuration, rows, iters))
        ours = next(row for row in rows if row.key == "sparsek")
        passed &= ours.accuracy is None or ours.accuracy.passed
        report.write_json(
            arguments.output, document
        )  # after each run: an interrupted sweep keeps its part
        if configuration.is_cuda:
            torch.cuda.empty_cache()

    if arguments.sweep:
        print(f"SWEEP over {arguments.sweep}")
        print("\n".join(report.sweep_table(arguments.sweep, document["runs"])))
        plot = arguments.output.with_name(f"{arguments.output.stem}_{arguments.sweep}.png")
        # Over seq_len the batch shrinks so that the number of tokens stays.
        varied = ("dtype", arguments.sweep) + (("batch",) if arguments.sweep == "seq_len" else ())
        title = f"{chosen[0].describe(without=varied)}\n{machine_info.headline(machine)}"
        report.plot_sweep(plot, arguments.sweep, document["runs"], title)
        print(f"plot: {plot}")
    print(f"results: {arguments.output}")
    if not passed:
        print("FAILED: an output differs from the fp64 reference by more than the tolerance")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
