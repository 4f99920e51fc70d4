"""Trains a small language model on real text with dense, sliding-window or SparseK attention.

    python examples/02_train_lm.py                                      # SparseK on the CPU, one to two minutes
    python examples/02_train_lm.py --compare                            # dense, window and SparseK, one after another
    python examples/02_train_lm.py --preset h200 --compare              # on a GPU: 43M parameters, 4096 bytes of context
    python examples/02_train_lm.py --attention dense --save dense.pt    # then fine-tune that model with SparseK:
    python examples/02_train_lm.py --from-dense dense.pt

The text is the Python source code that comes with the interpreter, byte by byte, or --text FILE. Every
variant starts from the same weights and sees the same batches; window and SparseK see equally many keys.
Results go to --out: a JSON file with everything, rewritten at each evaluation, and a plot. docs/training.md explains the
choices.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import torch
from lm import data, report, training
from lm.model import ATTENTIONS, ModelConfig
from lm.training import State, TrainConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]

# What differs from the defaults of ModelConfig, TrainConfig and the options below.
PRESETS: dict[str, dict] = {
    "cpu": {},
    "h200": {
        "num_layers": 6,
        "hidden_size": 768,
        "num_heads": 6,
        "num_kv_heads": 6,
        "num_selected": 256,
        "window": 128,
        "chunk_size": 128,
        "window_kernel": "flex",
        "steps": 3000,
        "batch_size": 6,
        "seq_len": 4096,
        "learning_rate": 8e-4,
        "warmup_steps": 200,
        "eval_every": 500,
        "eval_batches": 16,
        "dtype": "bfloat16",
        "device": "cuda",
        "compile": True,
        "max_bytes": 2**27,
    },
    "tiny": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "num_selected": 8,
        "window": 8,
        "chunk_size": 8,
        "steps": 20,
        "batch_size": 2,
        "seq_len": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_every": 10,
        "eval_batches": 2,
        "max_bytes": 2**18,
    },
}
HELP = {
    "attention": "what the model attends with",
    "num_selected": "keys that SparseK selects; the window variant gets as many more recent ones",
    "window": "recent keys that are always visible, besides the query's chunk",
    "chunk_size": "queries that share a selection",
    "gate": "softmax or value",
    "window_kernel": "of the window variant: sparsek (this library's, without selected keys) or flex (FlexAttention, on a GPU)",
    "backend": "kernels to use instead of the fastest, e.g. reference",
    "anneal_steps": "steps over which num_selected falls from seq_len to its target; with --from-dense half of --steps",
    "dtype": "float32, or bfloat16 (autocast)",
    "compile": "torch.compile the model's blocks",
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="defaults of the rest")
    parser.add_argument("--compare", action="store_true", help="all variants, and one plot")
    parser.add_argument(
        "--join",
        action="store_true",
        help="train nothing: table and plot of the variants whose results are in --out",
    )
    parser.add_argument("--text", type=Path, help="a text file to train on")
    parser.add_argument("--max-bytes", type=int, default=2**24, help="of text")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/latest_lm")
    parser.add_argument(
        "--save", type=Path, help="checkpoint, written at each evaluation and at the end"
    )
    parser.add_argument("--resume", type=Path, help="go on from a checkpoint, with its settings")
    parser.add_argument("--stop-at", type=int, help="end at this step; --resume goes on from there")
    parser.add_argument("--from-dense", type=Path, help="fine-tune a dense model's checkpoint")
    parser.add_argument(
        "--save-scores",
        type=Path,
        help="the scores that the trained scorers give validation text, for benchmarks/bench_*.py --scores",
    )
    for field in (*fields(ModelConfig), *fields(TrainConfig)):
        add_field(parser, field)
    preset, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[preset.preset])
    args = parser.parse_args(argv)
    if args.compare and (args.resume or args.from_dense or args.save or args.save_scores):
        parser.error("--compare takes neither --save, --resume, --from-dense nor --save-scores")
    if args.save_scores and args.attention != "sparsek":
        parser.error(f"--save-scores needs --attention sparsek, got {args.attention}")
    if args.resume and args.from_dense:
        parser.error("--resume and --from-dense exclude each other")
    return args


def add_field(parser: argparse.ArgumentParser, field) -> None:
    """An option for a field of a configuration."""
    name, help_text = "--" + field.name.replace("_", "-"), HELP.get(field.name)
    if isinstance(field.default, bool):
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=help_text)
        parser.set_defaults(**{field.name: field.default})
        return
    kind = str if field.default is None else type(field.default)
    choices = ATTENTIONS if field.name == "attention" else None
    parser.add_argument(name, type=kind, default=field.default, choices=choices, help=help_text)


def configuration_of(cls, args: argparse.Namespace):
    return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def load_corpus(args: argparse.Namespace) -> data.Corpus:
    if args.text is not None:
        return data.load_file(args.text, args.max_bytes)
    return data.load_python_sources(args.max_bytes)


def prepare(args: argparse.Namespace, corpus: data.Corpus) -> State:
    if args.resume is not None:
        return training.resume(training.read_checkpoint(args.resume), corpus)
    model_config, config = configuration_of(ModelConfig, args), configuration_of(TrainConfig, args)
    if args.from_dense is None:
        return training.make_state(model_config, config)
    checkpoint = training.read_checkpoint(args.from_dense)
    config.anneal_steps = config.anneal_steps or config.steps // 2
    return training.start_from_dense(checkpoint, model_config, config)


def run(args: argparse.Namespace) -> dict:
    """One variant: trains, writes JSON and plot, returns the result."""
    corpus = load_corpus(args)
    state = prepare(args, corpus)
    print(headline(state, corpus), flush=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        name = state.model.config.attention
        task = progress.add_task(name, total=state.config.steps, figures="", completed=state.step)

        def show(state: State) -> None:
            progress.update(task, completed=state.step, figures=figures_of(state))
            if state.log[-1]["step"] == state.step:
                # A run that is killed leaves what it found out so far.
                report.write_json(args.out / f"{name}.json", report.result_of(state, corpus))
                if not progress.console.is_terminal:
                    print(f"  step {state.step}: {figures_of(state)}", flush=True)

        training.train(state, corpus, stop_at=args.stop_at, report=show, save_to=args.save)
    result = report.result_of(state, corpus)
    report.write_json(args.out / f"{name}.json", result)
    report.plot(args.out / f"{name}.png", [result])
    if args.save_scores is not None:
        training.save_scores(args.save_scores, state, corpus)
    return result


def headline(state: State, corpus: data.Corpus) -> str:
    config, model = state.config, state.model.config
    keys = {
        "dense": "all earlier keys",
        "window": f"{model.num_selected + model.window} recent keys and the chunk of {model.chunk_size} ({model.window_kernel})",
        "sparsek": f"{model.num_selected} selected keys, {model.window} recent ones and the chunk of {model.chunk_size}",
    }
    return (
        f"{model.attention}: {keys[model.attention]}\n"
        f"  {state.model.num_parameters():,} parameters, {config.steps} steps of {config.batch_size} x "
        f"{config.seq_len} bytes, {config.dtype} on {config.device}\n"
        f"  {corpus.description['source']}: {corpus.description['train_bytes']:,} bytes, "
        f"{corpus.description['valid_bytes']:,} held out"
    )


def figures_of(state: State) -> str:
    rate = state.step * state.config.batch_size * state.config.seq_len / state.seconds
    last = state.log[-1]
    return f"validation {last['loss']:.3f} (late {last['loss_late']:.3f})  {rate:,.0f} bytes/s"


def compare(args: argparse.Namespace, argv: list[str]) -> list[dict]:
    """Each variant in a process of its own: none inherits memory or warm caches from another."""
    options = [argument for argument in argv if argument != "--compare"]
    for attention in ATTENTIONS:
        command = [sys.executable, __file__, *options, "--attention", attention]
        subprocess.run(command, check=True)
    return join(args.out)


def join(folder: Path) -> list[dict]:
    """One file and one plot of the variants that were trained, in however many calls."""
    paths = [folder / f"{attention}.json" for attention in ATTENTIONS]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not results:
        sys.exit(f"--join: no results of {', '.join(ATTENTIONS)} in {folder}")
    report.require_comparable(results)
    report.write_json(folder / "compare.json", results)
    report.plot(folder / "compare.png", results)
    return results


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.join:
        print(report.table_of(join(args.out)))
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no CUDA device here")
    results = compare(args, argv) if args.compare else [run(args)]
    if args.compare:
        print()
    print(report.table_of(results))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
