"""The training example, small enough for a test: every attention learns, runs resume, dense models become sparse."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import blackwell_sparsek as bs
import pytest
import torch
from conftest import needs_cuda

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from lm import data, training  # noqa: E402
from lm.model import ATTENTIONS, LanguageModel, ModelConfig, make_attention, window_mask  # noqa: E402


def load_example():
    """examples/02_train_lm.py, whose name no import statement can spell."""
    spec = importlib.util.spec_from_file_location("train_lm", EXAMPLES / "02_train_lm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they bring at these sizes, above all where others use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Something with a structure that 20 steps can learn a little of."""
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("\n".join(f"number {i} is followed by number {i + 1}" for i in range(2000)))
    return path


def train(text: Path, out: Path, *options: str) -> dict:
    argv = ["--preset", "tiny", "--text", str(text), "--out", str(out), *options]
    return example.run(example.parse_arguments(argv))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_loss_falls(text, tmp_path, attention):
    result = train(text, tmp_path, "--attention", attention)
    first, *_, last = result["log"]
    assert first["loss"] == pytest.approx(math.log(256))  # uniform over bytes
    assert last["loss"] < 0.7 * first["loss"]
    assert last["step"] == result["steps"] == 20
    assert len(last["loss_by_position"]) == training.NUM_POSITION_BUCKETS
    support = last["gate_support"]
    assert support is None if attention != "sparsek" else all(0.5 < s < 10 for s in support)
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_mib"] > 0
    assert json.loads((tmp_path / f"{attention}.json").read_text()) == result
    assert (tmp_path / f"{attention}.png").read_bytes().startswith(b"\x89PNG")


@needs_cuda
@pytest.mark.parametrize(
    "options",
    [["dense"], ["window"], ["window", "--window-kernel", "flex"], ["sparsek"]],
    ids=["dense", "window", "flex", "sparsek"],
)
def test_loss_falls_on_cuda_with_inductor(text, tmp_path, options):
    """As the preset h200 does it, smaller: autocast to bfloat16, blocks compiled."""
    sizes = "--hidden-size 128 --num-kv-heads 2 --seq-len 256 --window 16 --chunk-size 16".split()
    how = "--device cuda --dtype bfloat16 --compile".split()
    result = train(text, tmp_path, *sizes, *how, "--attention", *options)
    assert result["valid_loss"] < 0.7 * math.log(256)
    assert result["compile_seconds"] > 0


def test_scorers_learn(text, tmp_path):
    saved = tmp_path / "sparsek.pt"
    train(text, tmp_path, "--save", str(saved))
    checkpoint = training.read_checkpoint(saved)
    before = LanguageModel(ModelConfig(**checkpoint["model_config"])).state_dict()
    names = [name for name in before if ".scorer." in name]
    assert len(names) == 2
    for name in names:
        assert not torch.equal(before[name], checkpoint["model"][name])


def test_variants_start_alike():
    states = {
        attention: LanguageModel(ModelConfig(attention=attention), seed=5).state_dict()
        for attention in ATTENTIONS
    }
    assert list(states["dense"]) == list(states["window"])
    for name, value in states["dense"].items():
        assert torch.equal(states["window"][name], value), name
        assert torch.equal(states["sparsek"][name], value), name


def test_resumed_run_equals_the_uninterrupted_one(text, tmp_path):
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    expected = train(text, tmp_path, "--save", str(whole))
    stopped = train(text, tmp_path, "--save", str(half), "--stop-at", "10")
    assert stopped["steps"] == 10
    resumed = train(text, tmp_path, "--resume", str(half), "--save", str(half))
    assert resumed["valid_loss"] == expected["valid_loss"]
    one, other = training.read_checkpoint(whole), training.read_checkpoint(half)
    assert one["step"] == other["step"] == 20
    for name, value in one["model"].items():
        assert torch.equal(other["model"][name], value), name


def test_resume_refuses_another_text(text, tmp_path):
    saved = tmp_path / "saved.pt"
    train(text, tmp_path, "--save", str(saved), "--stop-at", "1")
    other = tmp_path / "other.txt"
    other.write_text("another text " * 500)
    with pytest.raises(ValueError, match="text: expected the one of the checkpoint"):
        train(other, tmp_path, "--resume", str(saved))


def test_fine_tuning_from_a_dense_model(text, tmp_path):
    """It starts as the dense model, and anneals down to the target."""
    saved = tmp_path / "dense.pt"
    dense = train(text, tmp_path, "--attention", "dense", "--save", str(saved))
    options = ["--from-dense", str(saved), "--eval-every", "5", "--anneal-steps", "10"]
    result = train(text, tmp_path, *options)
    assert result["log"][0]["loss"] == pytest.approx(dense["valid_loss"], abs=1e-4)
    selected = [entry["num_selected"] for entry in result["log"]]
    assert selected[0] == 64
    assert selected == sorted(selected, reverse=True)
    assert selected[-2:] == [8, 8]
    assert result["valid_loss"] < dense["valid_loss"]
    with pytest.raises(ValueError, match="--from-dense: expected a checkpoint with dense"):
        train(text, tmp_path, *options, "--attention", "window")


def test_annealing_schedule():
    config = training.TrainConfig(seq_len=1024, anneal_steps=100)
    selected = [config.num_selected_at(step, 64) for step in (0, 25, 50, 75, 100, 1000)]
    assert selected == [1024, 512, 256, 128, 64, 64]
    assert training.TrainConfig(seq_len=32).num_selected_at(0, 64) == 64
    assert config.num_selected_at(100, 0) == 0


def test_compare(text, tmp_path):
    """From the command line: three processes, one table."""
    package = str(Path(bs.__file__).parents[1])
    options = ["--preset", "tiny", "--steps", "2", "--text", str(text), "--out", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "02_train_lm.py"), "--compare", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    table = result.stdout.splitlines()[-5:-1]
    assert [line.split()[0] for line in table] == ["attention", *ATTENTIONS]
    results = json.loads((tmp_path / "compare.json").read_text())
    assert [r["attention"] for r in results] == list(ATTENTIONS)
    assert len({r["log"][0]["loss"] for r in results}) == 1
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_variants_trained_one_at_a_time_are_joined(text, tmp_path):
    results = [train(text, tmp_path, "--attention", name) for name in ("dense", "sparsek")]
    assert example.join(tmp_path) == results
    assert json.loads((tmp_path / "compare.json").read_text()) == results
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    train(text, tmp_path, "--attention", "window", "--steps", "10")
    with pytest.raises(ValueError, match="train_config: expected that of dense"):
        example.join(tmp_path)
    with pytest.raises(SystemExit, match="no results"):
        example.join(tmp_path / "nothing")


def test_scores_of_the_trained_model_are_saved(text, tmp_path):
    saved = tmp_path / "scores.pt"
    train(text, tmp_path, "--save-scores", str(saved))
    content = torch.load(saved, weights_only=True)
    assert content["step"] == 20
    assert content["scores"].shape == (2, 2, 1, 64)  # layers, batch, KV heads, positions
    assert content["scores"].dtype == torch.float32
    assert content["scores"].std() > 0.1
    with pytest.raises(SystemExit):
        example.parse_arguments(["--attention", "dense", "--save-scores", str(saved)])


def test_a_terminated_run_leaves_its_results(text, tmp_path):
    """SIGTERM ends the run after the step, with an evaluation; what was there before it is in the file too."""
    package = str(Path(bs.__file__).parents[1])
    options = ["--preset", "tiny", "--steps", "100000", "--text", str(text), "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "02_train_lm.py"), *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
    )
    try:
        for line in process.stdout:
            if "step 20:" in line:
                break
        partial = json.loads((tmp_path / "sparsek.json").read_text())
        assert partial["log"][-1]["step"] >= 20
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    result = json.loads((tmp_path / "sparsek.json").read_text())
    assert partial["steps"] <= result["steps"] < 100_000
    assert result["log"][-1]["step"] == result["steps"]


def test_compiled_blocks_learn_the_same(text, tmp_path):
    plain = train(text, tmp_path, "--steps", "3")
    compiled = train(text, tmp_path, "--steps", "3", "--compile")
    assert compiled["compile_seconds"] > 0
    assert compiled["valid_loss"] == pytest.approx(plain["valid_loss"], abs=1e-3)


def test_window_mask_is_the_window_variants():
    """FlexAttention's mask has the keys that this library's window kernel attends to."""
    config = ModelConfig(attention="window", num_selected=5, window=6, chunk_size=4)
    selection = bs.select(torch.zeros(1, 1, 50), num_selected=0, window=11, chunk_size=4)
    position = torch.arange(50)
    query, key = position[:, None], position[None, :]
    expected = (key <= query) & (query < selection.expiry[0, 0][None, :])
    actual = window_mask(config, 50, "cpu").mask_mod(0, 0, query, key)
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="window_kernel: expected one of sparsek, flex, got 'x'"):
        make_attention(ModelConfig(attention="window", window_kernel="x"))


# ---- data ----------------------------------------------------------------------------------------


def test_batches(text):
    corpus = data.load_file(text, max_bytes=10_000)
    assert corpus.description["train_bytes"] == 9500
    assert corpus.description["valid_bytes"] == 500
    batch = corpus.train_batch(step=3, seed=0, batch_size=4, seq_len=100)
    assert batch.shape == (4, 101)
    assert torch.equal(batch, corpus.train_batch(3, 0, 4, 100))
    assert not torch.equal(batch, corpus.train_batch(4, 0, 4, 100))
    assert bytes(batch[0].tolist()) in text.read_bytes()
    valid = torch.cat(list(corpus.valid_batches(2, 3, 100)))
    assert valid.shape == (6, 101)
    held_out = text.read_bytes()[9500:10_000]
    assert bytes(valid[0].tolist()) == held_out[:101]
    assert bytes(valid[-1].tolist()) == held_out[-101:]
    with pytest.raises(ValueError, match="expected more than seq_len = 500 bytes of validation"):
        list(corpus.valid_batches(1, 1, 500))


def test_python_sources():
    corpus = data.load_python_sources(max_bytes=2**20)
    sizes = corpus.description
    assert sizes["valid_bytes"] > 10_000
    # Each file is followed by a separator.
    assert 2**20 <= sizes["train_bytes"] + sizes["valid_bytes"] < 2**20 + 2**12
    assert corpus.description == data.load_python_sources(max_bytes=2**20).description


@pytest.mark.parametrize("preset", example.PRESETS)
def test_presets(preset):
    args = example.parse_arguments(["--preset", preset])
    config = example.configuration_of(ModelConfig, args)
    assert config.hidden_size % config.num_heads == 0
    if preset == "h200":
        assert LanguageModel(config).num_parameters() >= 40_000_000
        assert args.steps >= 3000
        assert args.seq_len == 4096
