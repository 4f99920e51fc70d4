"""Times forward plus backward against SDPA, xFormers and FlexAttention, and checks the gradients. This is
`make bench-backward`.

    python benchmarks/bench_backward.py                         the default configuration of this machine
    python benchmarks/bench_backward.py --peers all             on a GPU: SDPA's back ends, FlexAttention, xFormers
    python benchmarks/bench_backward.py --long                  B=1 H=8 up to S=65536: is the cost linear in S?
    python benchmarks/bench_backward.py --scores scores.pt      also with a trained model's scores

Everything that a training step needs counts: selection, forward with lse, dq, dk, dv and the gradient of the
scores. Without a GPU: B=1 H=8 S=4096 D=128 in float32. With one: B=4 H=96 in float16. The file of --scores comes
from `examples/02_train_lm.py --attention sparsek --save-scores`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
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
GPU_DEFAULT = replace(TIER, batch=4)
# Few heads, so that only the length can keep a GPU busy.
_LONG = {"batch": 1, "heads": 8, "kv_heads": 8}
_LONG_SEQ_LENS = (4096, 16384, 65536)
# Longer sequences are timed without a check: the reference takes a minute for one head of 65 536 tokens.
_MAX_CHECKED_SEQ_LEN = 8192

_DEFAULT_PEERS = {"sdpa": peers.SDPA, "xformers": peers.XFORMERS}
_FURTHER_PEERS = {
    "sdpa_cudnn": peers.SDPA_CUDNN,
    "sdpa_flash": peers.SDPA_FLASH,
    "flex_causal": peers.FLEX_CAUSAL,
    "flex_window": peers.FLEX_WINDOW,
    "xformers_local": peers.XFORMERS_LOCAL,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--iters",
        type=int,
        help="CPU: repetitions of each row (default 5); GPU: launches of the sustained protocol "
        f"(default and least: {timing.MIN_SUSTAINED_LAUNCHES})",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="GPU: how often each row is measured, in turns"
    )
    parser.add_argument("--peers", choices=("none", "default", "all"), default="default")
    parser.add_argument(
        "--long",
        action="store_true",
        help=f"then SparseK alone at B=1 H=8, S = {', '.join(map(str, _LONG_SEQ_LENS))}",
    )
    parser.add_argument("--scores", type=Path, help="scores of a trained model, a row of their own")
    parser.add_argument(
        "--pairs",
        type=int,
        default=2,
        help=f"(batch, KV head) pairs whose gradients are checked against fp64 (0: none), up to S={_MAX_CHECKED_SEQ_LEN}",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=_RESULTS / "latest_backward.json", help="JSON file"
    )
    return parser.parse_args(argv)


def configurations(arguments: argparse.Namespace, *, has_gpu: bool) -> list[Configuration]:
    return from_arguments(
        arguments,
        has_gpu=has_gpu,
        gpu_default=GPU_DEFAULT,
        cpu_default=CPU_DEFAULT,
        cpu_dtypes=(CPU_DEFAULT.dtype,),
    )


def long_configurations(configuration: Configuration) -> list[Configuration]:
    return [
        replace(configuration, **_LONG, seq_len=seq_len, seq_len_q=seq_len)
        for seq_len in _LONG_SEQ_LENS
    ]


@dataclass(frozen=True)
class Step:
    """A training step of one attention layer: `forward`, then the gradients of its `leaves`."""

    forward: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    dout: torch.Tensor

    def __call__(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.dout)


def make_dout(inputs: Inputs, seed: int) -> torch.Tensor:
    """A standard-normal upstream gradient [B, H, Sq, D]."""
    q = inputs.q
    generator = torch.Generator(device=q.device).manual_seed(seed + 1)
    return torch.randn(q.shape, generator=generator, device=q.device, dtype=q.dtype)


def peer_step(
    peer: peers.Peer, configuration: Configuration, inputs: Inputs, dout: torch.Tensor
) -> Step:
    """A peer's step on leaves of its own, in the layout that it works in, so that no copy is timed."""
    leaves = [t.detach() for t in (inputs.q, inputs.k, inputs.v)]
    if peer.to_bhsd is peers.transposed:
        leaves = [t.transpose(1, 2).contiguous() for t in leaves]
        dout = dout.transpose(1, 2).contiguous()
    for leaf in leaves:
        leaf.requires_grad_()
    views = [peer.to_bhsd(leaf) for leaf in leaves]
    call = peer.prepare(configuration, Inputs(*views, scores=inputs.scores))
    return Step(call, tuple(leaves), dout)


def sparsek_step(configuration: Configuration, inputs: Inputs, dout: torch.Tensor) -> Step:
    from blackwell_sparsek import attention_forward

    c = configuration
    q, k, v, scores = (
        t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.scores)
    )

    def forward() -> torch.Tensor:
        return attention_forward(q, k, v, scores, gate=c.gate, **c.selection())

    leaves = (q, k, v) if c.gate == "none" else (q, k, v, scores)
    return Step(forward, leaves, dout)


class Bench:
    """Measures configurations one after another, with a progress bar in a terminal."""

    def __init__(self, arguments: argparse.Namespace, console: Console):
        self._arguments = arguments
        self._console = console

    def _prepare_peers(
        self, configuration: Configuration, inputs: Inputs, dout: torch.Tensor, with_peers: bool
    ) -> tuple[list[report.Row], dict[str, Callable]]:
        chosen = dict(_DEFAULT_PEERS)
        if self._arguments.peers == "all":
            chosen |= _FURTHER_PEERS
        rows: list[report.Row] = []
        calls: dict[str, Callable] = {}
        for key, peer in chosen.items():
            row = report.Row(key, peer.name)
            rows.append(row)
            if not with_peers:
                row.unavailable = "left out"
                continue
            with peers.refusal_in(row):
                step = peer_step(peer, configuration, inputs, dout)
                step()
                row.peak_extra_bytes = memory.peak_extra_bytes(step, configuration.device)
                calls[key] = step
        return rows, calls

    def _prepare_ours(
        self, row: report.Row, configuration: Configuration, inputs: Inputs, dout: torch.Tensor
    ) -> dict[str, Callable]:
        """The calls behind a row of ours: the whole step, its forward and its selection."""
        from blackwell_sparsek import capability, select

        c = configuration
        options = {"dtype": c.torch_dtype, "device": c.device, "gate": c.gate, **c.selection()}
        row.details["kernel"] = ", ".join(
            f"{stage}: {capability(inputs.q.shape, inputs.k.shape, stage=stage, **options).kernel}"
            for stage in ("attend", "attend_backward")
        )
        step = sparsek_step(c, inputs, dout)
        gradients = step()
        if self._arguments.pairs > 0 and c.seq_len <= _MAX_CHECKED_SEQ_LEN:
            pairs = accuracy.sample_kv_pairs(c, self._arguments.pairs, self._arguments.seed)
            row.details["gradients"] = accuracy.gradient_accuracy(
                gradients, inputs, dout, c, pairs
            ).to_dict()
        del gradients
        row.peak_extra_bytes = memory.peak_extra_bytes(step, c.device)
        selection = select(inputs.scores, **c.selection())
        row.details["rows_entering_per_tile"] = score_files.rows_entering(selection.expiry, c)
        return {
            row.key: step,
            f"{row.key} forward": step.forward,
            f"{row.key} selection": lambda: select(inputs.scores, **c.selection()),
        }

    def _time(self, configuration: Configuration, calls: dict) -> tuple[dict, int]:
        """Timings of all calls and the number of iterations behind them."""
        if configuration.is_cuda:
            iters = max(self._arguments.iters or 0, timing.MIN_SUSTAINED_LAUNCHES)
            rounds = self._arguments.rounds
            with progress(self._console, "timing", rounds * len(calls)) as step:
                return timing.time_cuda(calls, iters=iters, repetitions=rounds, on_step=step), iters
        iters = self._arguments.iters or 5
        with progress(self._console, "timing", iters * len(calls)) as step:
            return timing.time_cpu(calls, iters=iters, on_step=step), iters

    def measure(
        self, configuration: Configuration, *, with_peers: bool
    ) -> tuple[list[report.Row], int]:
        """All rows of one configuration, timed; ours checked too."""
        inputs = make_inputs(configuration, self._arguments.seed)
        dout = make_dout(inputs, self._arguments.seed)
        rows, calls = self._prepare_peers(configuration, inputs, dout, with_peers)
        ours = [report.Row("sparsek", "BlackwellSparseK (learnable sparse)")]
        of_row = {"sparsek": inputs}
        if self._arguments.scores is not None and with_peers:
            ours.append(report.Row("sparsek_learned", "BlackwellSparseK, learned scores"))
            path = self._arguments.scores
            of_row["sparsek_learned"] = score_files.with_learned(inputs, path, configuration)
        for row in ours:
            calls |= self._prepare_ours(row, configuration, of_row[row.key], dout)
        timings, iters = self._time(configuration, calls)
        for row in rows + ours:
            row.timing = timings.get(row.key)
        for row in ours:
            row.details["forward_us"] = timings[f"{row.key} forward"].us_per_iter
            row.details["forward_us_first"] = timings[f"{row.key} forward"].us_first
            row.details["selection_us"] = timings[f"{row.key} selection"].us_per_iter
            row.details["selection_share"] = row.details["selection_us"] / row.timing.us_per_iter
            if configuration.is_cuda:
                row.details["host_us"] = timing.host_us(calls[row.key])
        return rows + ours, iters


def show(configuration: Configuration, rows: list[report.Row]) -> None:
    lines = []
    for index, row in enumerate(rows):
        lines += report.row_lines(f"[{index + 1}/{len(rows)}]", row, configuration)
        if "forward_us" in row.details:
            lines.append(
                f"      of it forward with selection: {report.format_us(row.details['forward_us'])} µs"
            )
        if "gradients" in row.details:
            errors = row.details["gradients"]
            figures = " ".join(f"{n}={e:.1e}" for n, e in errors["relative_error"].items())
            lines.append(
                f"      gradients against fp64, ‖x − ref‖ / ‖ref‖: {figures} passed={errors['passed']}"
            )
    print("\n".join([*lines, "", *report.speedup_lines(rows), ""]), flush=True)


def show_long(runs: list[dict]) -> None:
    """Microseconds per head and token: flat where the cost is linear."""
    first = runs[0]
    print("COST PER TOKEN, forward + backward (flat: linear in S)")
    for run in runs:
        c, us = run["configuration"], run["rows"]["sparsek"]["us_per_head"]
        ns = us / c["seq_len"] * 1e3
        base = first["rows"]["sparsek"]["us_per_head"] / first["configuration"]["seq_len"] * 1e3
        row = run["rows"]["sparsek"]
        # Launches wait for Python then, and the figure says little about the kernels.
        is_host_bound = row.get("host_us", 0.0) > 0.8 * row["us_per_iter"]
        print(
            f"  B={c['batch']} H={c['heads']} S={c['seq_len']:>6}: {us:>10,.2f} µs/head, "
            f"{ns:.3f} ns per head and token, {ns / base:.2f}x the first line"
            f"{' (bound by the host)' if is_host_bound else ''}"
        )


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    chosen = configurations(arguments, has_gpu=torch.cuda.is_available())
    machine = machine_info.describe(chosen[0].device)
    print("BlackwellSparseK forward + backward benchmark")
    print(f"  machine   {machine_info.headline(machine)}")
    print(
        f"  versions  blackwell_sparsek {machine['blackwell_sparsek']} ({machine['git_revision']}), "
        f"torch {machine['torch']}, Python {machine['python']}"
    )
    bench = Bench(arguments, Console())
    document = {"machine": machine, "runs": []}
    passed = True
    for configuration in chosen:
        runs = []
        extra = long_configurations(configuration) if arguments.long else []
        for index, each in enumerate([configuration, *extra]):
            print(f"\n== {each.describe()} on {each.device}", flush=True)
            rows, iters = bench.measure(each, with_peers=index == 0 and arguments.peers != "none")
            show(each, rows)
            run = report.run_dict(each, rows, iters)
            runs.append(run)
            document["runs"].append(run)
            report.write_json(arguments.output, document)
            passed &= all(
                row.details["gradients"]["passed"] for row in rows if "gradients" in row.details
            )
            if each.is_cuda:
                torch.cuda.empty_cache()
        if arguments.long:
            show_long(runs)
    print(f"results: {arguments.output}")
    if not passed:
        print("FAILED: a gradient differs from the fp64 reference by more than the tolerance")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
