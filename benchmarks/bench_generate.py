"""Tokens per second of generation with Transformers, with a dense cache and with SparseK's.

    python benchmarks/bench_generate.py                          on a GPU: batch 16, 16 384 tokens of context
    python benchmarks/bench_generate.py --context 65536 --batch 4

A Llama-class model with random weights generates greedily; SparseK selects by key norms, which is as fast as any other score.
Each cache is measured in two ways: through `model.generate`, where Python's share of a step counts, and as a CUDA graph of one
step that is replayed, where the device alone counts (a GPU only). The dense graph uses Transformers' StaticCache, because a cache
that grows cannot be captured.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import machine as machine_info
import report
import torch

_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    batch: int = 16
    context: int = 16384  # tokens of the prompt
    new_tokens: int = 64
    layers: int = 8
    hidden_size: int = 2048
    intermediate_size: int = 5632
    heads: int = 16
    kv_heads: int = 8
    vocabulary: int = 32000
    num_selected: int = 256
    window: int = 128
    chunk_size: int = 128
    dtype: str = "float16"
    device: str = "cuda"
    seed: int = 0


# Without a GPU: seconds.
CPU_SETTINGS = Settings(
    batch=1,
    context=2048,
    new_tokens=16,
    layers=2,
    hidden_size=512,
    intermediate_size=1024,
    heads=8,
    kv_heads=4,
    vocabulary=1000,
    dtype="float32",
    device="cpu",
)


def parse_arguments(argv: list[str] | None, *, has_gpu: bool) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="cuda" if has_gpu else "cpu")
    on_gpu = device.parse_known_args(argv)[0].device.startswith("cuda")
    for name, default in asdict(Settings() if on_gpu else CPU_SETTINGS).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help=f"({default})")
    parser.add_argument("--output", type=Path, default=_RESULTS / "latest_generate.json")
    arguments = vars(parser.parse_args(argv))
    output = arguments.pop("output")
    settings = Settings(**arguments)
    if settings.new_tokens < 4:
        parser.error("--new-tokens must be at least 4")
    return settings, output


def make_model(settings: Settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context + settings.new_tokens + 1,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(settings.device):
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, settings.dtype)).eval()


def synchronize(settings: Settings) -> None:
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()


def cache_bytes(cache) -> int:
    """Of whichever cache: what its layers hold for keys and values."""
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "num_bytes"):
            total += layer.num_bytes
        else:
            total += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    return total


class StepTimes:
    """A stopping criterion that never stops and notes when each token was there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, _scores, **_kwargs) -> torch.Tensor:
        synchronize(self.settings)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def through_generate(model, prompts: torch.Tensor, settings: Settings) -> dict:
    from transformers import StoppingCriteriaList

    def run(new_tokens: int) -> tuple[list[float], object]:
        """Seconds until the first token and between the others, and generate's result."""
        clock = StepTimes(settings)
        synchronize(settings)
        clock.times.append(time.perf_counter())
        result = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            return_dict_in_generate=True,
        )
        return [after - before for before, after in itertools.pairwise(clock.times)], result

    run(3)  # warm-up
    (prompt_s, *steps), result = run(settings.new_tokens)
    step_s = statistics.median(steps)
    return {
        "step_ms": step_s * 1e3,
        "tokens_per_second": settings.batch / step_s,
        "prompt_ms": prompt_s * 1e3,
        "cache_bytes": cache_bytes(result.cache),
        "tokens": result.sequences[:, prompts.shape[1] :],
    }


@torch.no_grad()
def through_graph(model, prompts: torch.Tensor, cache, settings: Settings) -> dict:
    """One greedy step, captured after the prompt and a few steps, and replayed."""
    out = model(prompts, cache=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
    del out
    position = torch.full_like(token, prompts.shape[1])
    produced = [token.clone()]

    def step() -> None:
        logits = model(token, position_ids=position, cache=cache, use_cache=True).logits
        token.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))
        position.add_(1)

    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(2):  # what the first calls load and allocate stays out of the graph
            step()
            produced.append(token.clone())
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(settings.new_tokens - len(produced)):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        produced.append(token.clone())
    step_s = statistics.median(times)
    return {
        "step_ms": step_s * 1e3,
        "tokens_per_second": settings.batch / step_s,
        "cache_bytes": cache_bytes(cache),
        "tokens": torch.cat(produced, dim=1),
    }


def measure(settings: Settings) -> dict[str, dict]:
    """Rows by name: dense and SparseK, through generate and as a graph."""
    from blackwell_sparsek.integrations.hf import disable_sparsek, enable_sparsek
    from transformers import DynamicCache, StaticCache

    model = make_model(settings)
    generator = torch.Generator(device=settings.device).manual_seed(settings.seed)
    shape = (settings.batch, settings.context)
    prompts = torch.randint(
        3, settings.vocabulary, shape, generator=generator, device=settings.device
    )
    with_graph = settings.device.startswith("cuda")
    rows = {}

    def add(name: str, call: Callable[[], dict]) -> None:
        print(f"  {name} ...", flush=True)
        try:
            rows[name] = call()
        except torch.OutOfMemoryError:
            rows[name] = {"unavailable": "out of device memory"}
        if with_graph:
            torch.cuda.empty_cache()

    add("dense, generate", lambda: through_generate(model, prompts, settings))
    if with_graph:
        length = settings.context + settings.new_tokens + 1
        static = StaticCache(config=model.config, max_cache_len=length)
        add("dense, graph", lambda: through_graph(model, prompts, static, settings))
        del static
    enable_sparsek(
        model,
        num_selected=settings.num_selected,
        window=settings.window,
        chunk_size=settings.chunk_size,
    )
    add("sparsek, generate", lambda: through_generate(model, prompts, settings))
    if with_graph:
        cache = DynamicCache(config=model.config)
        add("sparsek, graph", lambda: through_graph(model, prompts, cache, settings))
    disable_sparsek(model)
    for kind in ("dense", "sparsek"):
        compare_tokens(rows, kind)
    return rows


def compare_tokens(rows: dict[str, dict], kind: str) -> None:
    """The graph's tokens against generate's: rounding may part them at some time, but not at once."""
    tokens = {
        name: row.pop("tokens")
        for name, row in rows.items()
        if name.startswith(kind) and "tokens" in row
    }
    if len(tokens) == 2:
        first, second = tokens.values()
        same = (first == second).float().cummin(dim=1).values.mean().item()
        rows[f"{kind}, graph"]["share_of_tokens_as_generate"] = same


def table_of(rows: dict[str, dict]) -> list[str]:
    lines = [f"  {'':<18} {'ms/step':>9} {'tokens/s':>10} {'cache MiB':>11} {'prompt ms':>10}"]
    for name, row in rows.items():
        if "unavailable" in row:
            lines.append(f"  {name:<18} {row['unavailable']}")
            continue
        prompt = f"{row['prompt_ms']:>10,.0f}" if "prompt_ms" in row else f"{'':>10}"
        lines.append(
            f"  {name:<18} {row['step_ms']:>9.3f} {row['tokens_per_second']:>10,.0f} "
            f"{row['cache_bytes'] / 2**20:>11,.1f} {prompt}"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    settings, output = parse_arguments(argv, has_gpu=torch.cuda.is_available())
    machine = machine_info.describe(settings.device)
    print("Generation with Transformers")
    print(f"  machine   {machine_info.headline(machine)}")
    print(
        f"  batch {settings.batch}, {settings.context} tokens of context, {settings.layers} layers of "
        f"{settings.hidden_size}, {settings.heads} heads and {settings.kv_heads} KV heads, {settings.dtype}; SparseK "
        f"k={settings.num_selected} w={settings.window} C={settings.chunk_size}"
    )
    rows = measure(settings)
    print("\n".join(table_of(rows)))
    document = {"machine": machine, "settings": asdict(settings), "rows": rows}
    report.write_json(output, document)
    print(f"results: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
