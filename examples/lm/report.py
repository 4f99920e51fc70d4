"""What a run leaves behind: a JSON file with everything, and plots of the curves."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from lm.data import Corpus
from lm.training import NUM_POSITION_BUCKETS, State, peak_memory_mib

# The benchmarks say in the same words what machine and revision a result is from.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from machine import describe

COLORS = {"dense": "tab:gray", "window": "tab:orange", "sparsek": "tab:blue"}


def result_of(state: State, corpus: Corpus) -> dict:
    last = state.log[-1]
    return {
        "attention": state.model.config.attention,
        "num_parameters": state.model.num_parameters(),
        "steps": state.step,
        "valid_loss": last["loss"],
        "valid_loss_late": last["loss_late"],
        "tokens_per_second": last["tokens_per_second"],
        "train_seconds": state.seconds,
        "compile_seconds": state.compile_seconds,
        "peak_memory_mib": peak_memory_mib(state.config.device),
        "model_config": asdict(state.model.config),
        "train_config": asdict(state.config),
        "corpus": corpus.description,
        "machine": describe(state.config.device),
        "log": state.log,
    }


def require_comparable(results: list[dict]) -> None:
    """ValueError unless the runs differ in nothing but their attention."""

    def common_of(result: dict) -> dict:
        model = {**result["model_config"], "attention": None}
        return {
            "model_config": model,
            "train_config": result["train_config"],
            "corpus": result["corpus"],
        }

    first = common_of(results[0])
    for result in results[1:]:
        for name, value in common_of(result).items():
            if value != first[name]:
                raise ValueError(
                    f"{name}: expected that of {results[0]['attention']}, {first[name]}, got {value} with "
                    f"{result['attention']}"
                )


def write_json(path: Path, content: object) -> None:
    """Whole or not at all: a run that is killed meanwhile leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def table_of(results: list[dict]) -> str:
    """One line per run."""
    lines = [
        f"{'attention':<10}{'valid loss':>12}{'late':>9}{'tokens/s':>11}{'peak MiB':>10}{'seconds':>9}"
    ]
    for result in results:
        rate = result["tokens_per_second"]
        lines.append(
            f"{result['attention']:<10}{result['valid_loss']:>12.4f}{result['valid_loss_late']:>9.4f}"
            f"{0 if rate is None else rate:>11,.0f}{result['peak_memory_mib']:>10,.0f}"
            f"{result['train_seconds']:>9.1f}"
        )
    return "\n".join(lines)


def plot(path: Path, results: list[dict]) -> None:
    """Validation loss by tokens, by training time, and at the end by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_tokens, by_time, by_position) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for result in results:
        name = result["attention"]
        style = {"color": COLORS[name], "label": name}
        log = result["log"]
        tokens = [entry["tokens"] for entry in log]
        by_tokens.plot(tokens, [entry["loss"] for entry in log], **style)
        trained = [entry for entry in log if entry["train_loss"] is not None]
        by_tokens.plot(
            [entry["tokens"] for entry in trained],
            [entry["train_loss"] for entry in trained],
            color=COLORS[name],
            linestyle=":",
        )
        seconds = [entry["seconds"] for entry in log]
        by_time.plot(seconds, [entry["loss"] for entry in log], **style)
        bucket = result["train_config"]["seq_len"] / NUM_POSITION_BUCKETS
        middles = [bucket * (i + 0.5) for i in range(NUM_POSITION_BUCKETS)]
        by_position.plot(middles, log[-1]["loss_by_position"], marker="o", **style)
    by_tokens.set(xlabel="bytes trained on", title="validation (dotted: training)")
    by_time.set(xlabel="seconds of training", title="validation by time")
    by_position.set(xlabel="position in the sequence", title="validation at the end, by position")
    for axes in (by_tokens, by_time, by_position):
        axes.set_ylabel("nats per byte")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
