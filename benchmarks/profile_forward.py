"""Profiles selection and attention, and SDPA beside them, with Nsight Compute. This is `make bench-profile`.

    python benchmarks/profile_forward.py [--batch ... --seq-len ...]   the flags of bench_forward.py's configuration

Writes benchmarks/metrics.json: per kernel its utilisations and duration, and prints each against its target with one line on
what bounds it. Needs a GPU and the right to read its counters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bench_forward
import machine as machine_info
import ncu
import peers
import report
import torch
from configuration import Configuration, make_inputs

_OUTPUT = Path(__file__).parent / "metrics.json"
_STAGES = ("select", "attend", "sdpa")


def stage_call(stage: str, configuration: Configuration, seed: int) -> Callable[[], object]:
    """The call whose kernels are profiled; for `attend` the selection is made beforehand."""
    from blackwell_sparsek import attention_forward, select

    inputs = make_inputs(configuration, seed)
    if stage == "sdpa":
        return peers.SDPA.prepare(configuration, inputs)
    if stage == "select":
        return lambda: select(inputs.scores, **configuration.selection())
    selection = select(inputs.scores, **configuration.selection())
    return lambda: attention_forward(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.scores,
        gate=configuration.gate,
        selection=selection,
    )


def run_stage(stage: str, configuration: Configuration, seed: int) -> None:
    """What runs under ncu: warm up, then one call between cudaProfilerStart and Stop."""
    with torch.inference_mode():
        call = stage_call(stage, configuration, seed)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parse_arguments() -> tuple[argparse.Namespace, str | None]:
    """bench_forward's arguments, and the stage if this is the process that ncu started."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--stage", choices=_STAGES)
    stage, rest = parser.parse_known_args()
    return bench_forward.parse_arguments(rest), stage.stage


def main() -> int:
    arguments, stage = parse_arguments()
    if not torch.cuda.is_available():
        print("bench-profile: needs an NVIDIA GPU and a CUDA build of PyTorch; none was found")
        return 1
    (configuration, *_) = bench_forward.configurations(arguments, has_gpu=True)
    if stage:
        run_stage(stage, configuration, arguments.seed)
        return 0

    try:
        program = ncu.find()
        tensor = ncu.tensor_metric(program)
        metrics = [tensor if name == "tensor" else metric for name, metric in ncu.METRICS.items()]
        stages = {}
        print(f"Nsight Compute: {configuration.describe()}")
        for name in _STAGES:
            command = [sys.executable, __file__, *sys.argv[1:], "--stage", name]
            stages[name] = ncu.profile(program, metrics, command)
            print(f"\n{name}")
            for record in stages[name]:
                print("\n".join(ncu.lines(record, tensor)), flush=True)
    except ncu.NcuError as error:
        print(f"bench-profile: {error}")
        return 1
    document = {
        "machine": machine_info.describe(configuration.device),
        "configuration": configuration.to_dict(),
        "ncu": subprocess.run(
            [program, "--version"], capture_output=True, text=True
        ).stdout.strip(),
        "targets_percent": {ncu.METRICS[name]: target for name, target in ncu.TARGETS.items()},
        "tensor_metric": tensor,
        "stages": {
            name: [record | {"bound": ncu.bound(record, tensor)} for record in records]
            for name, records in stages.items()
        },
    }
    report.write_json(_OUTPUT, document)
    print(f"\nmetrics: {_OUTPUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
