"""Generates text with a small language model, with a cache of every key and with SparseK's, which does not grow.

    python examples/03_generate.py                                   # trains a model first; one to two minutes on the CPU
    python examples/02_train_lm.py --save lm.pt && python examples/03_generate.py --checkpoint lm.pt
    python examples/03_generate.py --checkpoint lm.pt --prompt-bytes 16384 --batch-size 16 --device cuda

Both caches use the same weights and the same random numbers. With the dense cache every byte sees all bytes before it, with
SparseK's the selected and the recent ones, as in training. The model speaks bytes: a token is a byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from lm import data, generation, training
from lm.generation import Continuation, Generator
from lm.model import LanguageModel, ModelConfig
from lm.training import TrainConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="of 02_train_lm.py --save; without one a model is trained"
    )
    parser.add_argument("--steps", type=int, default=300, help="of that training")
    parser.add_argument("--seq-len", type=int, default=1024, help="of that training")
    parser.add_argument("--text", type=Path, help="a text file for training and prompts")
    parser.add_argument("--prompt-bytes", type=int, default=2048, help="of held-out text")
    parser.add_argument("--new-bytes", type=int, default=256, help="to generate")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at a time")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the most likely byte")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of weights and caches (default: float32 on the CPU, bfloat16 on a GPU)",
    )
    args = parser.parse_args(argv)
    if args.new_bytes < 2 or args.prompt_bytes < 1:
        parser.error("--new-bytes must be at least 2, --prompt-bytes at least 1")
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    return args


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(20), TimeRemainingColumn())
    return Progress(*columns, transient=True)


def trained_model(args: argparse.Namespace, corpus: data.Corpus) -> LanguageModel:
    """From the checkpoint, or trained now on the CPU or the GPU."""
    if args.checkpoint is not None:
        checkpoint = training.read_checkpoint(args.checkpoint)
        model = LanguageModel(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        print(f"{args.checkpoint}: {checkpoint['step']} steps of training")
        return model
    config = TrainConfig(steps=args.steps, seq_len=args.seq_len, eval_every=args.steps)
    if args.device.startswith("cuda"):
        config.device, config.dtype = args.device, "bfloat16"
    state = training.make_state(ModelConfig(), config)
    with progress_bar() as progress:
        task = progress.add_task("training", total=config.steps)
        training.train(state, corpus, report=lambda _: progress.advance(task))
    first, last = state.log[0]["loss"], state.log[-1]["loss"]
    print(
        f"trained {config.steps} steps of {config.batch_size} x {config.seq_len} bytes in {state.seconds:.0f} s: "
        f"validation loss {first:.2f} -> {last:.2f} nats per byte"
    )
    return state.model


def prompts_of(corpus: data.Corpus, args: argparse.Namespace) -> torch.Tensor:
    """``[batch, bytes]`` of held-out text."""
    (batch,) = corpus.valid_batches(1, args.batch_size, args.prompt_bytes)
    return batch[:, :-1].to(args.device)


def continue_with(
    cache: str, model: LanguageModel, prompts: torch.Tensor, args: argparse.Namespace
) -> Continuation:
    max_tokens = args.prompt_bytes + args.new_bytes

    def run(num_new_tokens: int, report=lambda _: None) -> Continuation:
        generator = Generator(model, cache, args.batch_size, max_tokens)
        return generation.generate(
            generator,
            prompts,
            num_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            report=report,
        )

    run(2)  # what a first call loads is not timed
    with progress_bar() as progress:
        task = progress.add_task(cache, total=args.new_bytes)
        return run(args.new_bytes, lambda done: progress.update(task, completed=done))


def text_of(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def description_of(cache: str, config: ModelConfig) -> str:
    if cache == "dense":
        return "dense cache: every earlier byte"
    rows = f"{config.num_selected} selected, {config.window} recent, chunks of {config.chunk_size}"
    by = "trained scorers" if config.attention == "sparsek" else "key norms"
    return f"SparseK cache: {rows}, by {by}"


def main(argv: list[str]) -> dict[str, Continuation]:
    args = parse_arguments(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no CUDA device here")
    corpus = data.load_file(args.text, 2**24) if args.text else data.load_python_sources(2**24)
    model = trained_model(args, corpus)
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    prompts = prompts_of(corpus, args)
    print(
        f"\n--- end of the first prompt of {args.prompt_bytes} bytes\n{text_of(prompts[0, -300:])}"
    )
    results = {}
    for cache in generation.CACHES:
        result = results[cache] = continue_with(cache, model, prompts, args)
        print(f"\n--- {description_of(cache, model.config)}\n{text_of(result.tokens[0])}")
        print(
            f"\n    cache {result.num_bytes / 2**20:.2f} MiB after {args.prompt_bytes + args.new_bytes - 1} bytes of "
            f"each of {args.batch_size}; prompt {result.prompt_seconds * 1e3:.1f} ms, then "
            f"{result.tokens_per_second:,.0f} bytes/s"
        )
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
