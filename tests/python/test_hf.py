"""Transformers models switched to SparseK: forward, training and generation, on small random models."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import blackwell_sparsek as bs
import pytest
import torch
from torch import Tensor

MINIMUM_VERSION = "5.24"
transformers = pytest.importorskip(
    "transformers",
    minversion=MINIMUM_VERSION,
    reason=f"Transformers >= {MINIMUM_VERSION} is not installed here",
)
from blackwell_sparsek.integrations import hf  # noqa: E402
from hf_models import (  # noqa: E402
    FAMILIES,
    PAD,
    SMALL,
    VOCABULARY,
    assert_logits_close,
    make_model,
    make_padded,
    make_switched,
    make_tokens,
    plain_logits,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and lose much where other programs want the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", hf.SCORERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward(family, scorer):
    model = make_switched(family, scorer)
    tokens = make_tokens(2, 75)
    for arguments in ({"use_cache": False}, {}):  # {}: the cache that the model makes by itself
        logits = model(tokens, **arguments).logits
        for b in range(2):
            assert_logits_close(logits[b], plain_logits(model, tokens[b]))
    assert not torch.allclose(logits, make_model(family)(tokens).logits, atol=1e-2)


@pytest.mark.parametrize("gate", ["softmax", "value", "none"])
@torch.no_grad()
def test_gates(gate):
    model = make_switched(gate=gate, num_candidates=9)
    tokens = make_tokens(1, 60)
    expected = plain_logits(model, tokens[0], gate=gate, num_candidates=9)
    assert_logits_close(model(tokens, use_cache=False).logits[0], expected)
    generated = model.generate(tokens[:, :20], max_new_tokens=40, **GREEDY)
    assert_generated_rows(
        model, generated, [generated.sequences[0]], 20, gate=gate, num_candidates=9
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_many_selected_keys_are_dense_attention(family):
    tokens = make_tokens(2, 70)
    model = make_model(family)
    dense = model(tokens).logits
    hf.enable_sparsek(model, num_selected=70, window=3, chunk_size=8)
    torch.testing.assert_close(model(tokens).logits, dense, rtol=1e-4, atol=1e-4)
    hf.disable_sparsek(model)
    hf.enable_sparsek(model, num_selected=70, window=3, chunk_size=8, scorer="learned")
    torch.testing.assert_close(model(tokens).logits, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scorer", hf.SCORERS)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@torch.no_grad()
def test_padded_rows_equal_rows_alone(side, scorer):
    model = make_switched(scorer=scorer)
    padded = make_padded([40, 1, 23, 0], 40, side)
    # Positions count tokens, as generate makes them; the model's default counts columns.
    positions = (padded.mask.cumsum(-1) - 1).clamp(min=0)
    for use_cache in (False, True):
        logits = model(
            padded.tokens,
            attention_mask=padded.mask,
            position_ids=positions,
            use_cache=use_cache,
        ).logits
        assert logits.isfinite().all()
        for row, mask, tokens in zip(logits, padded.mask, padded.rows, strict=True):
            if len(tokens) > 0:
                assert_logits_close(row[mask.bool()], plain_logits(model, tokens))


@torch.no_grad()
def test_bfloat16_and_autocast():
    model = make_switched()
    tokens = make_tokens(1, 60)
    expected = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens).logits
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    model = model.bfloat16()
    assert model.model.layers[0].self_attn.sparsek_scorer.weight.dtype == torch.bfloat16
    generated = model.generate(tokens, max_new_tokens=20, **GREEDY)
    one_shot = model(generated.sequences, use_cache=False).logits[:, 59:-1]
    generated_logits = torch.stack(generated.logits, dim=1)
    error = (generated_logits.float() - one_shot.float()).abs().mean()
    assert error < 0.03 * one_shot.float().abs().mean()


# ---- generation ----------------------------------------------------------------------------------

# A token is not generated twice, for the reason given at make_tokens.
GREEDY = {
    "do_sample": False,
    "no_repeat_ngram_size": 1,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def assert_generated_rows(model, generated, rows: list[Tensor], num_prompt: int, **options) -> None:
    """Every step's logits are the one-shot forward's row, and the token is its largest that is new."""
    steps = torch.stack(generated.logits, dim=1)
    num_new = steps.shape[1]
    for b, row in enumerate(rows):
        expected = plain_logits(model, row[:-1], **options)[-num_new:]
        assert_logits_close(steps[b], expected)
        assert torch.equal(row[-num_new:], generated.sequences[b, num_prompt:])
        for step in range(num_new):
            begin = len(row) - num_new + step
            is_new = torch.ones(VOCABULARY, dtype=torch.bool)
            is_new[row[:begin]] = False
            is_new[PAD] = b == 0  # padding counts as generated where there is some
            assert steps[b, step].masked_fill(~is_new, -torch.inf).argmax() == row[begin]


@pytest.mark.parametrize("scorer", hf.SCORERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_generation_equals_one_shot_forward(family, scorer):
    """A left-padded batch, over many chunk borders and far past the window."""
    model = make_switched(family, scorer)
    padded = make_padded([21, 4, 11], 21, "left")
    generated = model.generate(
        padded.tokens, attention_mask=padded.mask, max_new_tokens=70, **GREEDY
    )
    assert all(isinstance(layer, hf.SparseKCacheLayer) for layer in generated.cache.layers)
    sequences = zip(generated.sequences, padded.rows, strict=True)
    rows = [torch.cat([row, sequence[21:]]) for sequence, row in sequences]
    assert_generated_rows(model, generated, rows, 21)


@torch.no_grad()
def test_greedy_generation_equals_token_by_token_recomputation():
    """The other side of the same coin: Transformers' own loop without a cache."""
    model = make_switched()
    padded = make_padded([17, 9], 17, "left")
    arguments = {"attention_mask": padded.mask, "max_new_tokens": 40, **GREEDY}
    generated = model.generate(padded.tokens, **arguments)
    recomputed = model.generate(padded.tokens, use_cache=False, **arguments)
    assert torch.equal(generated.sequences, recomputed.sequences)
    for step, expected in zip(generated.logits, recomputed.logits, strict=True):
        assert_logits_close(step, expected.double())


@pytest.mark.parametrize("scorer", hf.SCORERS)
@torch.no_grad()
def test_beam_search(scorer):
    model = make_switched(scorer=scorer)
    padded = make_padded([17, 9], 17, "left")
    arguments = {
        "attention_mask": padded.mask,
        "max_new_tokens": 40,
        "num_beams": 4,
        "num_return_sequences": 3,
        "do_sample": False,
        "length_penalty": 0.0,
        "no_repeat_ngram_size": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    generated = model.generate(padded.tokens, **arguments)
    recomputed = model.generate(padded.tokens, use_cache=False, **arguments)
    assert torch.equal(generated.sequences, recomputed.sequences)
    # The score of a sequence is the sum of its tokens' logarithms in a forward of its own.
    for index, sequence in enumerate(generated.sequences):
        row = torch.cat([padded.rows[index // 3], sequence[17:]])
        logits = plain_logits(model, row[:-1])[-40:].log_softmax(dim=-1)
        score = logits.gather(1, row[-40:, None]).sum()
        assert float(generated.sequences_scores[index]) == pytest.approx(float(score), abs=1e-2)
    beams = generated.beam_indices[:, :40]
    assert (beams[:, 1:] != beams[:, :-1]).any(), (
        "no beam changed places: reordering was not tested"
    )


@torch.no_grad()
def test_sampling():
    model = make_switched()
    padded = make_padded([17, 9], 17, "left")
    arguments = {
        "attention_mask": padded.mask,
        "max_new_tokens": 40,
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 20,
        "num_return_sequences": 2,
    }
    torch.manual_seed(5)
    generated = model.generate(padded.tokens, **arguments)
    torch.manual_seed(5)
    assert torch.equal(generated, model.generate(padded.tokens, use_cache=False, **arguments))
    assert not torch.equal(generated[0], generated[1])


@torch.no_grad()
def test_prefill_in_pieces():
    model = make_switched()
    padded = make_padded([30, 13], 30, "left")
    arguments = {"attention_mask": padded.mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(padded.tokens, **arguments)
    assert torch.equal(model.generate(padded.tokens, prefill_chunk_size=7, **arguments), expected)


@torch.no_grad()
def test_cache_is_continued_with_padded_pieces():
    """A conversation: pieces of different lengths per row, through the cache that a forward returns."""
    model = make_switched()
    pieces = [make_padded(lengths, max(lengths), "left") for lengths in ([9, 14], [20, 1], [0, 30])]
    cache, seen = transformers.DynamicCache(), torch.zeros(2, 0, dtype=torch.long)
    logits = [[], []]
    for piece in pieces:
        seen = torch.cat([seen, piece.mask], dim=1)
        positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -piece.tokens.shape[1] :]
        result = model(
            piece.tokens, attention_mask=seen, position_ids=positions, cache=cache, use_cache=True
        )
        assert result.cache is cache
        for b in range(2):
            logits[b].append(result.logits[b][piece.mask[b].bool()])
    assert cache.get_seq_length() == seen.shape[1]
    assert cache.layers[0].num_tokens.tolist() == [29, 45]
    for b in range(2):
        row = torch.cat([piece.rows[b] for piece in pieces])
        assert_logits_close(torch.cat(logits[b]), plain_logits(model, row))
    cache.reset()
    again = model(pieces[0].tokens, attention_mask=pieces[0].mask, cache=cache).logits
    first = model(pieces[0].tokens, attention_mask=pieces[0].mask).logits
    assert torch.equal(again, first)


@torch.no_grad()
def test_memory_of_the_cache_is_constant():
    model = make_switched()
    arguments = {"do_sample": False, "return_dict_in_generate": True}
    sizes = [
        hf.num_cache_bytes(model.generate(tokens, max_new_tokens=new, **arguments).cache)
        for tokens, new in (
            (make_tokens(2, 3), 2),
            (make_tokens(2, 3), 100),
            (make_tokens(2, 600), 2),
        )
    ]
    assert sizes[0] == sizes[1] == sizes[2]
    rows = SMALL["num_selected"] + SMALL["window"] + SMALL["chunk_size"]
    keys_and_values = (
        2 * 2 * 2 * rows * 2 * 8 * 4
    )  # layers, batch, KV heads, rows, k and v, head_dim, bytes
    assert keys_and_values < sizes[0] < 2 * keys_and_values


# ---- training ------------------------------------------------------------------------------------


def skip_without_backward():
    answer = bs.capability((1, 4, 8, 8), (1, 2, 8, 8), dtype=torch.float32, stage="attend_backward")
    if not answer.supported:
        pytest.skip(f"attend_backward: {answer.reason}")


def test_gradients():
    """Of every parameter, against differences of the loss; with checkpointed activations the same."""
    skip_without_backward()
    model = make_switched()
    padded = make_padded([40, 33], 40, "left")
    labels = padded.tokens.masked_fill(padded.mask == 0, -100)
    inputs = {"input_ids": padded.tokens, "attention_mask": padded.mask, "labels": labels}
    model(**inputs).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())

    for name in (
        "model.layers.0.self_attn.sparsek_scorer.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ):
        parameter = model.get_parameter(name)
        direction = gradients[name] / gradients[name].norm()
        losses = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter += step * direction
                losses.append(float(model(**inputs).loss.double()))
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 2e-3
        assert difference == pytest.approx(float(gradients[name].norm()), rel=0.03), name

    model.zero_grad()
    model.train()
    model.activation_checkpointing_enable()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_compiled_training():
    skip_without_backward()
    model = make_switched().train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    padded = make_padded([40, 33], 40, "left")
    inputs = {"input_ids": padded.tokens, "attention_mask": padded.mask, "labels": padded.tokens}
    gradients = []
    for function in (model, compiled):
        model.zero_grad()
        function(**inputs, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_training_of_scorers_alone_and_annealing():
    skip_without_backward()
    model = make_model()
    options = hf.enable_sparsek(model, scorer="learned", **SMALL)
    scorers = [p for name, p in model.named_parameters() if "sparsek_scorer" in name]
    model.requires_grad_(False)
    for parameter in scorers:
        parameter.requires_grad_(True)
    tokens = make_tokens(4, 48)
    optimizer = torch.optim.Adam(scorers, lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        dense = make_model()(tokens).logits
        options.num_selected = 48
        torch.testing.assert_close(model(tokens).logits, dense, rtol=1e-4, atol=1e-4)


def test_generating_needs_no_grad():
    skip_without_backward()
    model = make_switched()
    tokens = make_tokens(1, 10)
    trained = model(
        tokens
    )  # gradients are recorded, and a cache is made because the config says so
    with torch.no_grad(), pytest.raises(ValueError, match="filled while gradients were recorded"):
        model(tokens, cache=trained.cache)
    with torch.no_grad():
        cache = model(tokens).cache
    with pytest.raises(NotImplementedError, match="no backward"):
        model(tokens[:, :1], cache=cache)


# ---- switching, saving ---------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", hf.SCORERS)
@torch.no_grad()
def test_disable_restores_the_model(scorer):
    model = make_model()
    tokens = make_tokens(1, 50)
    before, names = model(tokens).logits, list(model.state_dict())
    implementation = model.config._attn_implementation
    for _ in range(2):
        hf.enable_sparsek(model, scorer=scorer, **SMALL)
        assert not torch.equal(model(tokens).logits, before)
        hf.disable_sparsek(model)
        assert torch.equal(model(tokens).logits, before)
        assert list(model.state_dict()) == names
        assert model.config._attn_implementation == implementation
    model.generate(tokens, max_new_tokens=2, do_sample=False)


@torch.no_grad()
def test_state_dict_of_scorers():
    model = make_switched(seed=0)
    tokens = make_tokens(1, 50)
    scorers = hf.scorer_state_dict(model)
    assert sorted(scorers) == [
        f"model.layers.{index}.self_attn.sparsek_scorer.weight" for index in range(2)
    ]
    other = make_switched(seed=0)
    for name in scorers:
        other.get_parameter(name).normal_()
    assert not torch.equal(other(tokens).logits, model(tokens).logits)
    keys = other.load_state_dict(scorers, strict=False)
    assert keys.unexpected_keys == []
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    other = make_switched(seed=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_save_and_load(tmp_path):
    model = make_switched()
    tokens = make_tokens(1, 50)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    torch.save(hf.scorer_state_dict(model), tmp_path / "scorers.pt")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation != "sparsek"
    hf.enable_sparsek(loaded, scorer="learned", position_slope=0.05, **SMALL)
    loaded.load_state_dict(torch.load(tmp_path / "scorers.pt"), strict=False)
    assert torch.equal(loaded(tokens).logits, expected)


@torch.no_grad()
def test_deep_copy_is_independent():
    model = make_switched()
    tokens = make_tokens(1, 50)
    expected = model(tokens).logits
    twin = copy.deepcopy(model)
    hf.disable_sparsek(model)
    assert torch.equal(twin(tokens).logits, expected)
    hf.disable_sparsek(twin)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_decoder_without_a_head():
    model = make_switched()
    tokens = make_tokens(1, 30)
    expected = model.model(tokens).last_hidden_state
    hf.disable_sparsek(model)
    hf.enable_sparsek(model.model, **SMALL)
    assert model.model(tokens).last_hidden_state.shape == expected.shape
    hf.disable_sparsek(model.model)


def test_examples_of_the_documentation(tmp_path, monkeypatch, capsys):
    skip_without_backward()
    page = Path(__file__).parents[2] / "docs" / "huggingface.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
    assert "torch.Size([2, 550])" in capsys.readouterr().out


# ---- wrong calls ---------------------------------------------------------------------------------

WRONG_MODELS = {
    "not a model": (lambda: torch.nn.Linear(2, 2), ValueError, ["PreTrainedModel", "Linear"]),
    "another family": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=5)
        ),
        NotImplementedError,
        ["llama, mistral, qwen2, qwen3", "'gpt2'"],
    ),
    "Mistral with a sliding window": (
        lambda: make_model("mistral", sliding_window=16),
        NotImplementedError,
        ["sliding_window = 16", "full attention"],
    ),
    "Qwen2 with sliding layers": (
        lambda: make_model(
            "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1
        ),
        NotImplementedError,
        ["sliding_attention"],
    ),
    "switched already": (make_switched, ValueError, ["already", "disable_sparsek"]),
}


@pytest.mark.parametrize("what", WRONG_MODELS)
def test_wrong_model(what):
    make, error, fragments = WRONG_MODELS[what]
    with pytest.raises(error) as caught:
        hf.enable_sparsek(make())
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


WRONG_OPTIONS = [
    ({"scorer": "random"}, ["scorer", "key_norm, learned", "'random'"]),
    ({"gate": "hard"}, ["gate", "'hard'"]),
    ({"num_selected": -1}, ["num_selected", "-1"]),
    ({"chunk_size": 0}, ["chunk_size", "0"]),
    ({"num_selected": 4, "num_candidates": 3}, ["num_candidates", "3"]),
    ({"scorer": "learned", "score_scale": 0.0}, ["score_scale"]),
]


@pytest.mark.parametrize(("options", "fragments"), WRONG_OPTIONS)
def test_wrong_options_leave_the_model_alone(options, fragments):
    model = make_model()
    with pytest.raises(ValueError, match=".*".join(fragments)):
        hf.enable_sparsek(model, **options)
    hf.enable_sparsek(model, **SMALL)


def wrong_call(**arguments):
    return lambda model, tokens: model(tokens, **arguments)


def give_dense_cache(model, tokens):
    hf.disable_sparsek(model)
    cache = model(tokens).cache
    hf.enable_sparsek(model, **SMALL)
    return model(tokens[:, :1], cache=cache)


def give_cache_to_dense_model(model, tokens):
    cache = model(tokens).cache
    hf.disable_sparsek(model)
    return model(tokens[:, :1], cache=cache)


def change_options(model, tokens):
    cache = model(tokens).cache
    hf.disable_sparsek(model)
    hf.enable_sparsek(model, **{**SMALL, "window": 9})
    return model(tokens[:, :1], cache=cache)


def change_batch(model, tokens):
    cache = model(tokens).cache
    return model(tokens[:1, :1], cache=cache)


def choose_sdpa(model, tokens):
    model.set_attn_implementation("sdpa")
    return model(tokens)


def share_a_config(model, tokens):
    return transformers.AutoModelForCausalLM.from_config(model.config)(tokens)


def drop_attention(model, tokens):
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model.train()(tokens)


def assist(model, tokens):
    return model.generate(tokens[:1], max_new_tokens=5, prompt_lookup_num_tokens=2)


def generate(**arguments):
    return lambda model, tokens: model.generate(tokens, max_new_tokens=5, **arguments)


# 16 tokens, batch 2. (call, error, fragments of its message)
WRONG_CALLS = {
    "4-D mask": (
        wrong_call(attention_mask=torch.ones(2, 1, 16, 16)),
        NotImplementedError,
        ["attention_mask", "[2, 1, 16, 16]"],
    ),
    "mask of another length": (
        wrong_call(attention_mask=torch.ones(2, 9)),
        ValueError,
        ["attention_mask", "[2, 16]", "[2, 9]"],
    ),
    "packed sequences": (
        wrong_call(position_ids=torch.arange(16).remainder(8)[None], use_cache=False),
        NotImplementedError,
        ["packed"],
    ),
    "attention weights": (
        wrong_call(output_attentions=True),
        NotImplementedError,
        ["output_attentions"],
    ),
    "dropout": (drop_attention, NotImplementedError, ["attention_dropout", "0.5"]),
    "float64": (lambda model, tokens: model.double()(tokens), NotImplementedError, ["float64"]),
    "dense cache": (give_dense_cache, ValueError, ["cache", "dense attention filled"]),
    "cache for a dense model": (give_cache_to_dense_model, ValueError, ["SparseKCacheLayer"]),
    "cache with other options": (
        change_options,
        ValueError,
        ["cache", "'window': 9", "'window': 5"],
    ),
    "cache with another batch": (change_batch, ValueError, ["[2, ", "[1, "]),
    "static cache": (generate(cache_implementation="static"), NotImplementedError, ["static"]),
    "offloaded cache": (generate(cache_implementation="offloaded"), ValueError, ["offloading"]),
    "assisted decoding": (assist, ValueError, ["Assisted decoding requires a cache"]),
    "another implementation": (choose_sdpa, ValueError, ["'sdpa'", "disable_sparsek"]),
    "shared config": (share_a_config, ValueError, ["share", "config"]),
}


@pytest.mark.parametrize("what", WRONG_CALLS)
@torch.no_grad()
def test_wrong_call(what):
    call, error, fragments = WRONG_CALLS[what]
    with pytest.raises(error) as caught:
        call(make_switched(scorer="key_norm"), make_tokens(2, 16))
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_cache_layer_refuses_what_it_cannot_do():
    model = make_switched()
    layer = model.generate(
        make_tokens(1, 9), max_new_tokens=2, return_dict_in_generate=True
    ).cache.layers[0]
    layer.crop(0)
    with pytest.raises(NotImplementedError, match="crop"):
        layer.crop(-1)
    with pytest.raises(NotImplementedError, match="batch_select_indices"):
        layer.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="DynamicLayer"):
        hf.num_cache_bytes(transformers.DynamicCache(config=model.config))


def test_disable_needs_enable():
    with pytest.raises(ValueError, match="not enabled"):
        hf.disable_sparsek(make_model())
