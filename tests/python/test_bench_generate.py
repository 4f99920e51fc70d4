"""The generation benchmark, small, and generation on CUDA through Transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_cuda

pytest.importorskip("transformers", minversion="5.24", reason="needs Transformers 5.24 or later")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_generate
from blackwell_sparsek.integrations import hf
from hf_models import SMALL, make_model, make_tokens

_TINY = (
    "--batch 2 --context 40 --new-tokens 5 --layers 2 --hidden-size 128 --intermediate-size 64 --heads 2 "
    "--kv-heads 1 --vocabulary 100 --num-selected 8 --window 8 --chunk-size 8"
).split()


def test_settings_of_cpu_and_gpu():
    on_gpu, _ = bench_generate.parse_arguments([], has_gpu=True)
    assert (on_gpu.batch, on_gpu.context, on_gpu.device) == (16, 16384, "cuda")
    on_cpu, output = bench_generate.parse_arguments(["--context", "77"], has_gpu=False)
    assert (on_cpu.batch, on_cpu.context, on_cpu.dtype) == (1, 77, "float32")
    assert output.name == "latest_generate.json"
    with pytest.raises(SystemExit):
        bench_generate.parse_arguments(["--new-tokens", "3"], has_gpu=False)


def test_a_small_run(device, tmp_path, capsys):
    output = tmp_path / "generate.json"
    assert bench_generate.main([*_TINY, "--device", device, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == (
        ["dense, generate", "sparsek, generate"]
        if device == "cpu"
        else ["dense, generate", "dense, graph", "sparsek, generate", "sparsek, graph"]
    )
    element_size = 4 if device == "cpu" else 2
    # Two layers of k and v, one KV head of 64; the last token is not in the cache.
    assert rows["dense, generate"]["cache_bytes"] == 2 * 2 * 2 * 44 * 64 * element_size
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    if device == "cuda":
        assert rows["sparsek, graph"]["share_of_tokens_as_generate"] > 0.5
    assert "tokens/s" in capsys.readouterr().out


def _cuda_model():
    """Heads of 64, in float16. Learned scores with a slope: key norms of equal tokens tie, and rounding decides then."""
    options = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.05}
    model = make_model(**options).to("cuda", torch.float16)
    hf.enable_sparsek(model, **SMALL, scorer="learned", position_slope=0.05)
    return model


@needs_cuda
@torch.no_grad()
def test_cuda_generation_has_the_logits_of_the_one_shot_forward():
    model = _cuda_model()
    prompts = make_tokens(2, 50).to("cuda")
    mask = torch.ones_like(prompts)
    mask[0, :20] = 0  # padding on the left
    result = model.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=40,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    whole_mask = torch.cat([mask, mask.new_ones(2, 40)], dim=1)
    positions = (whole_mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        result.sequences, attention_mask=whole_mask, position_ids=positions, use_cache=False
    ).logits
    expected = logits[:, 49:-1].float()
    actual = torch.stack(result.logits, dim=1).float()
    error = (actual - expected).abs().amax(dim=-1) / expected.abs().max()
    # Scores that rounding makes trade places select another key: seldom.
    assert (error < 0.02).float().mean() > 0.9


@needs_cuda
@torch.no_grad()
def test_cuda_steps_do_not_wait_for_the_device():
    """Also with padding: which tokens exist is never asked on the host."""
    model = _cuda_model()
    prompts = make_tokens(2, 50).to("cuda")
    mask = torch.ones_like(prompts)
    mask[1, :5] = 0
    out = model(prompts, attention_mask=mask, use_cache=True)
    token = out.logits[:, -1:].argmax(dim=-1)
    masks = [torch.cat([mask, mask.new_ones(2, n)], dim=1) for n in range(1, 30)]
    positions = [(m.sum(dim=1, keepdim=True) - 1) for m in masks]
    for index, (step_mask, position) in enumerate(zip(masks, positions, strict=True)):
        if index == 1:  # the first step may load modules
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            logits = model(
                token,
                attention_mask=step_mask,
                position_ids=position,
                cache=out.cache,
                use_cache=True,
            ).logits
            token = logits[:, -1:].argmax(dim=-1)
        except BaseException:
            torch.cuda.set_sync_debug_mode("default")
            raise
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(logits).all()


@needs_cuda
def test_cuda_training_of_scorers():
    model = _cuda_model()
    tokens = make_tokens(2, 60).to("cuda")
    model(tokens, labels=tokens).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if hf.SCORER_NAME in n]
    assert len(gradients) == 2
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
