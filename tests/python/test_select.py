"""select on every backend: against the reference over the case table, and properties that hold for any input."""

from __future__ import annotations

import blackwell_sparsek as bs
import pytest
import torch
from case_table import lay_out, load_cases, make_inputs, poison
from conftest import dense_selection_of, expected_of

CASES = load_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case, device):
    inputs = poison(make_inputs(case))
    expected = expected_of(case).selection
    scores = lay_out(inputs.scores.to(device), case.layout)
    lengths = None if inputs.lengths is None else inputs.lengths.to(device)
    selection = bs.select(scores, **case.configuration, lengths=lengths)
    assert selection.expiry.device.type == device
    assert torch.equal(selection.expiry.cpu(), expected.expiry)

    end = case.seq_len_k if inputs.lengths is None else inputs.lengths[:, None, None]
    exists = (torch.arange(case.num_chunks) * case.chunk_size < end).expand(
        expected.threshold.shape
    )
    last_candidate = selection.last_candidate.cpu()
    assert torch.equal(last_candidate[exists], expected.last_candidate[exists])

    threshold = selection.threshold.cpu()
    assert threshold.dtype == torch.float32
    exact = expected.threshold
    infinite = torch.isinf(exact)
    assert torch.equal(threshold[infinite & exists].double(), exact[infinite & exists])
    finite = exists & ~infinite
    # Rounded down, never more than a step or two of float32; found from scores shifted by the k-th.
    error = threshold.double() - exact
    step = torch.finfo(torch.float32).eps * (1 + exact.abs())
    assert (error[finite] <= 1e-12 * (1 + exact.abs()[finite])).all()
    assert (error[finite] >= -2 * step[finite]).all()
    # Every selected key keeps a gate.
    selected = dense_selection_of(case).selected & exists[..., None]
    clean = make_inputs(case).scores[:, :, None, :].expand(selected.shape)
    assert (
        (torch.where(selected, clean, float("inf")) > threshold[..., None])
        .logical_or(~selected)
        .all()
    )
    # The threshold never falls.
    steps = threshold[..., 1:] >= threshold[..., :-1]
    assert steps[exists[..., 1:]].all()


@pytest.mark.parametrize("chunk_size", [1, 16, 100])
def test_expiry_is_monotone_in_the_score(device, chunk_size):
    """Raising one key's score never shortens its life, and never lengthens another's."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 1, 300, generator=generator)
    options = {"num_selected": 20, "window": 8, "chunk_size": chunk_size}
    before = bs.select(scores.to(device), **options).expiry.cpu()
    for position in range(0, 300, 37):
        raised = scores.clone()
        raised[..., position] += 0.7
        after = bs.select(raised.to(device), **options).expiry.cpu()
        assert after[0, 0, position] >= before[0, 0, position]
        others = torch.arange(300) != position
        assert (after[0, 0, others] <= before[0, 0, others]).all()


def test_a_prefix_has_the_same_thresholds(device):
    """Pools only grow: what is decided for early queries does not depend on later keys."""
    scores = torch.randn(2, 3, 700, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"num_selected": 32, "window": 10, "chunk_size": 16}
    whole = bs.select(scores, **options)
    prefix = bs.select(scores[..., :400], **options)
    assert torch.equal(prefix.threshold, whole.threshold[..., :25])
    assert torch.equal(prefix.expiry, whole.expiry[..., :400].clamp(max=400))


def test_lengths_equal_truncation(device):
    scores = torch.randn(3, 2, 500, generator=torch.Generator().manual_seed(2)).to(device)
    lengths = [500, 123, 256]
    options = {"num_selected": 32, "window": 10, "chunk_size": 16}
    ragged = bs.select(
        scores, **options, lengths=torch.tensor(lengths, dtype=torch.int32, device=device)
    )
    for b, length in enumerate(lengths):
        single = bs.select(scores[b : b + 1, :, :length], **options)
        num_chunks = -(-length // 16)
        assert torch.equal(ragged.expiry[b, :, :length], single.expiry[0])
        assert torch.equal(ragged.threshold[b, :, :num_chunks], single.threshold[0])
        own = torch.arange(length, 500, dtype=torch.int32).to(device)
        assert torch.equal(ragged.expiry[b, :, length:], own.expand(2, -1))


def test_shuffled_rows_give_shuffled_selections(device):
    scores = torch.randn(4, 3, 333, generator=torch.Generator().manual_seed(3)).to(device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    options = {"num_selected": 16, "window": 5, "chunk_size": 32}
    selection = bs.select(scores, **options)
    shuffled = bs.select(scores[order].flip(1), **options)
    assert torch.equal(shuffled.expiry, selection.expiry[order].flip(1))
    assert torch.equal(shuffled.threshold, selection.threshold[order].flip(1))


def test_signed_zeros_are_equal(device):
    """-0.0 ties with 0.0: the smaller position ranks first."""
    zeros = torch.zeros(1, 1, 200)
    zeros[..., ::2] = -0.0
    options = {"num_selected": 8, "window": 0, "chunk_size": 4}
    plain = bs.select(torch.zeros(1, 1, 200, device=device), **options)
    mixed = bs.select(zeros.to(device), **options)
    assert torch.equal(mixed.expiry, plain.expiry)
    assert torch.equal(mixed.last_candidate, plain.last_candidate)
    # Of equal scores the first eight positions stay for ever.
    assert (plain.expiry[0, 0, :8] == 200).all()


def test_deterministic(device):
    scores = torch.randn(2, 4, 2000, device=device).round(decimals=1)
    first = bs.select(scores, num_selected=100)
    for _ in range(10):
        again = bs.select(scores, num_selected=100)
        assert torch.equal(again.expiry, first.expiry)
        assert torch.equal(again.threshold, first.threshold)
        assert torch.equal(again.last_candidate, first.last_candidate)


def test_long_row(device):
    """Beyond what one block of shared memory or one heap holds comfortably."""
    scores = torch.randn(1, 1, 100_000, generator=torch.Generator().manual_seed(4))
    selection = bs.select(scores.to(device), num_selected=300, window=0, chunk_size=128)
    expiry = selection.expiry.cpu()[0, 0]
    # The last query's selected keys are the top 300 of its pool.
    pool_end = (100_000 - 1) // 128 * 128
    top = scores[0, 0, :pool_end].topk(300).indices.sort().values
    alive = (expiry[:pool_end] == 100_000).nonzero()[:, 0]
    assert torch.equal(alive, top)


def test_empty(device):
    selection = bs.select(torch.empty(0, 2, 100, device=device))
    assert selection.expiry.shape == (0, 2, 100)
    assert selection.threshold.shape == (0, 2, 1)
    assert bs.select(torch.empty(1, 2, 0, device=device)).expiry.shape == (1, 2, 0)


def test_configuration_is_kept():
    selection = bs.select(torch.randn(1, 1, 50), num_selected=7, window=3, chunk_size=5)
    assert selection.configuration == bs.SelectionConfiguration(7, 3, 5, 28)
    assert not selection.is_foreign
    with pytest.raises(AttributeError):
        selection.expiry = None


def test_key_norm_scores(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    k = torch.randn(2, 3, 100, 64, generator=torch.Generator().manual_seed(6)).to(device, dtype)
    scores = bs.key_norm_scores(k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, -k.float().norm(dim=-1), rtol=1e-6, atol=1e-6)
    k[0, :, 60:] = float("nan")
    ragged = bs.key_norm_scores(
        k, lengths=torch.tensor([60, 100], dtype=torch.int32, device=device)
    )
    assert torch.equal(ragged[0, :, :60], scores[0, :, :60])
    assert (ragged[0, :, 60:] == 0).all()
