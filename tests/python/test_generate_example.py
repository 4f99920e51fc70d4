"""The generation example, small: cached logits are those of the one-shot forward, memory, and the command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import default_dtype

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from lm import generation, training  # noqa: E402
from lm.data import load_file  # noqa: E402
from lm.model import LanguageModel, ModelConfig  # noqa: E402


def load_example():
    """examples/03_generate.py, whose name no import statement can spell."""
    spec = importlib.util.spec_from_file_location("generate_text", EXAMPLES / "03_generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()

_CONFIG = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_heads": 2,
    "num_kv_heads": 1,
    "num_selected": 8,
    "window": 8,
    "chunk_size": 8,
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(device: str = "cpu", **changes) -> LanguageModel:
    """Random weights, with logits that differ from byte to byte."""
    model = LanguageModel(ModelConfig(**{**_CONFIG, **changes}), seed=1)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.to(device, default_dtype(device)).eval()


def random_tokens(batch_size: int, count: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch_size, count), generator=generator).to(device)


@torch.no_grad()
def one_shot_logits(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of each position, by a forward over what it may see: token by token, without any cache."""
    return torch.cat([model(tokens[:, : end + 1])[:, -1:] for end in range(tokens.shape[1])], dim=1)


def cached_logits(generator: generation.Generator, tokens, prompt_tokens: int) -> torch.Tensor:
    logits = [generator.logits(tokens[:, :prompt_tokens])]
    logits += [generator.logits(token) for token in tokens[:, prompt_tokens:].split(1, dim=1)]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("gate", ["softmax", "value"])
@pytest.mark.parametrize("prompt_tokens", [1, 20, 40])
def test_cached_logits_are_those_of_the_one_shot_forward(device, gate, prompt_tokens):
    """Over several chunk borders, when keys have been evicted."""
    model = make_model(device, gate=gate)
    tokens = random_tokens(2, 70, device)
    generator = generation.Generator(model, "sparsek", 2, 70)
    actual = cached_logits(generator, tokens, prompt_tokens)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(actual, one_shot_logits(model, tokens), **tolerance)


def test_dense_cache_is_dense_attention(device):
    """The SparseK model with every key visible, and a model with dense attention."""
    tokens = random_tokens(2, 50, device)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    for changes in ({"num_selected": 50}, {"attention": "dense"}):
        model = make_model(device, **changes)
        generator = generation.Generator(model, "dense", 2, 50)
        actual = cached_logits(generator, tokens, 20)
        torch.testing.assert_close(actual, one_shot_logits(model, tokens), **tolerance)


def test_a_dense_model_generates_with_key_norms(device):
    """Every key visible: what it was. Fewer: something near it, from constant memory."""
    tokens = random_tokens(1, 50, device)
    model = make_model(device, attention="dense", num_selected=50)
    generator = generation.Generator(model, "sparsek", 1, 50)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    actual = cached_logits(generator, tokens, 20)
    torch.testing.assert_close(actual, one_shot_logits(model, tokens), **tolerance)
    assert generator.layers[0].options["gate"] == "none"


def test_memory(device):
    model = make_model(device)
    tokens = random_tokens(1, 60, device)
    sizes = {}
    for cache in generation.CACHES:
        generator = generation.Generator(model, cache, 1, 60)
        generator.logits(tokens[:, :30])
        early = generator.num_bytes
        for token in tokens[:, 30:].split(1, dim=1):
            generator.logits(token)
        sizes[cache] = (early, generator.num_bytes)
    assert sizes["sparsek"][0] == sizes["sparsek"][1]
    element_size = default_dtype(device).itemsize
    assert sizes["dense"] == tuple(2 * 2 * tokens * 64 * element_size for tokens in (30, 60))


def test_greedy_and_sampled_continuations(device):
    model = make_model(device)
    prompt = random_tokens(3, 20, device)

    def run(temperature, seed=0):
        generator = generation.Generator(model, "sparsek", 3, 40)
        return generation.generate(generator, prompt, 12, temperature=temperature, seed=seed)

    greedy = run(0.0).tokens
    assert greedy.shape == (3, 12)
    whole = torch.cat([prompt, greedy], dim=1)
    with torch.no_grad():
        best = model(whole)[:, 19:-1].argmax(dim=-1)
    assert (best == greedy).float().mean() > (0.99 if device == "cpu" else 0.8)
    assert torch.equal(run(1.0, seed=3).tokens, run(1.0, seed=3).tokens)
    assert not torch.equal(run(1.0, seed=3).tokens, run(1.0, seed=4).tokens)
    assert run(1.0).tokens_per_second > 0


def test_refusals():
    model = make_model()
    with pytest.raises(ValueError, match="cache: expected one of dense, sparsek, got 'paged'"):
        generation.Generator(model, "paged", 1, 10)
    with pytest.raises(ValueError, match="expected dense or sparsek attention, got 'window'"):
        generation.Generator(make_model(attention="window"), "dense", 1, 10)
    generator = generation.Generator(model, "dense", 1, 10)
    generator.logits(random_tokens(1, 4, "cpu"))
    with pytest.raises(ValueError, match="expected one token after the prompt, got 2"):
        generator.logits(random_tokens(1, 2, "cpu"))


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(f"number {i} is followed by number {i + 1}" for i in range(2000)))
    return path


_SMALL = "--prompt-bytes 100 --new-bytes 12 --batch-size 2".split()


def test_from_the_command_line(text, capsys):
    """Without a checkpoint a model is trained first."""
    training_options = ["--text", str(text), "--steps", "2", "--seq-len", "128"]
    results = example.main([*training_options, *_SMALL])
    printed = capsys.readouterr().out
    assert "trained 2 steps of 2 x 128 bytes" in printed
    assert "--- dense cache: every earlier byte" in printed
    assert "--- SparseK cache: 64 selected, 32 recent, chunks of 32, by trained scorers" in printed
    assert printed.count("bytes/s") == 2
    assert all(result.tokens.shape == (2, 12) for result in results.values())


def test_with_a_checkpoint(text, tmp_path, capsys):
    corpus = load_file(text, 2**20)
    config = training.TrainConfig(steps=3, seq_len=64, eval_every=3, eval_batches=1)
    saved = tmp_path / "lm.pt"
    state = training.make_state(ModelConfig(**_CONFIG, attention="dense"), config)
    training.train(state, corpus, save_to=saved)
    example.main(["--checkpoint", str(saved), "--text", str(text), *_SMALL, "--temperature", "0"])
    printed = capsys.readouterr().out
    assert f"{saved}: 3 steps of training" in printed
    assert "8 selected, 8 recent, chunks of 8, by key norms" in printed
    with pytest.raises(SystemExit):
        example.parse_arguments(["--new-bytes", "1"])
