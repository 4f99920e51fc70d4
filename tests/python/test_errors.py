"""Wrong calls: each names the tensor or option, what was expected and what came."""

from __future__ import annotations

import blackwell_sparsek as bs
import pytest
import torch
from blackwell_sparsek import _arguments
from conftest import default_dtype, needs_cuda

B, HQ, HKV, SQ, SK, D = 2, 4, 2, 30, 50, 64


@pytest.fixture
def good(device) -> dict:
    """The arguments of a call that works; a wrong call differs in one of them."""
    dtype = default_dtype(device)
    tensors = {
        "q": torch.randn(B, HQ, SQ, D),
        "k": torch.randn(B, HKV, SK, D),
        "v": torch.randn(B, HKV, SK, D),
    }
    return {
        **{name: tensor.to(device, dtype) for name, tensor in tensors.items()},
        "scores": torch.randn(B, HKV, SK, device=device),
        "lengths": torch.tensor([SK, 7], dtype=torch.int32, device=device),
    }


def change(name, function):
    """A wrong call: the argument `name` becomes function(its value)."""
    return lambda good: {**good, name: function(good[name])}


def give(**options):
    return lambda good: {**good, **options}


def to_nan(tensor):
    tensor = tensor.clone()
    tensor[0, 1, 3] = float("nan")
    return tensor


def int32(*values):
    return lambda tensor: torch.tensor(values, dtype=torch.int32, device=tensor.device)


# (what is wrong, the changed call, fragments of the message)
WRONG_VALUES = {
    "q of rank 3": (
        change("q", lambda t: t[0]),
        ["q: expected 4 dimensions [B, Hq, Sq, D]", "[4, 30, 64]"],
    ),
    "k of rank 5": (change("k", lambda t: t[None]), ["k: expected 4 dimensions [B, Hkv, Sk, D]"]),
    "scores of rank 2": (
        change("scores", lambda t: t[0]),
        ["scores: expected 3 dimensions [B, Hkv, Sk]"],
    ),
    "lengths of rank 0": (
        change("lengths", lambda t: t[0]),
        ["lengths: expected 1 dimensions [B]"],
    ),
    "another batch": (
        change("k", lambda t: t[:1]),
        ["k: expected shape [B, Hkv, Sk, D]", "[1, 2, 50, 64]"],
    ),
    "another head_dim": (
        change("k", lambda t: t[..., :32].contiguous()),
        ["k: expected shape", "[2, 2, 50, 32]"],
    ),
    "v shorter than k": (
        change("v", lambda t: t[:, :, :49]),
        ["v: expected shape", "[2, 2, 49, 64]"],
    ),
    "heads that do not divide": (
        change("q", lambda t: t[:, :3]),
        ["q: expected a number of heads divisible by Hkv = 2", "3"],
    ),
    "more queries than keys": (
        change("q", lambda t: t.repeat(1, 1, 2, 1)),
        ["q: expected at most Sk = 50", "60"],
    ),
    "another dtype": (change("v", lambda t: t.bfloat16()), ["v: expected dtype", "bfloat16"]),
    "integers": (change("q", lambda t: t.int()), ["q: expected a floating-point", "int32"]),
    "an unknown dtype": (
        change("k", lambda t: t.to(torch.int64)),
        ["k: expected a floating-point", "int64"],
    ),
    "a strided last dimension": (
        change("q", lambda t: t.repeat(1, 1, 1, 2)[..., ::2]),
        ["q: expected a contiguous last dimension", "2"],
    ),
    "half-precision scores": (
        change("scores", lambda t: t.half()),
        ["scores: expected dtype float32", "float16"],
    ),
    "scores for query heads": (
        change("scores", lambda t: t.repeat(1, 2, 1)),
        ["scores: expected shape [2, 2, 50]", "[2, 4, 50]"],
    ),
    "scores that are too short": (
        change("scores", lambda t: t[..., :49]),
        ["scores", "[2, 2, 49]"],
    ),
    "64-bit lengths": (change("lengths", lambda t: t.long()), ["lengths", "int32", "int64"]),
    "lengths of another batch": (
        change("lengths", lambda t: t.repeat(2)),
        ["lengths: expected shape [B]", "[4]"],
    ),
    "negative num_selected": (give(num_selected=-1), ["num_selected: expected", ">= 0", "-1"]),
    "negative window": (give(window=-3), ["window: expected", ">= 0", "-3"]),
    "chunk_size 0": (give(chunk_size=0), ["chunk_size: expected", "1", "0"]),
    "too few candidates": (
        give(num_selected=8, num_candidates=7),
        ["num_candidates: expected at least num_selected = 8", "7"],
    ),
    "an unknown gate": (
        give(gate="hard"),
        ["gate: expected one of none, value, softmax", "'hard'"],
    ),
    "an unknown backend": (
        give(backend="triton"),
        ["backend: expected one of auto, reference, cpu", "'triton'"],
    ),
    "an infinite sm_scale": (
        give(sm_scale=float("inf")),
        ["sm_scale: expected a finite number", "inf"],
    ),
}

# Values, which a call on CUDA does not look at.
WRONG_ON_HOST = {
    "NaN scores": (
        change("scores", to_nan),
        ["scores: expected finite values", "batch 0, head 1, position 3"],
    ),
    "infinite scores": (
        change("scores", lambda t: t / 0),
        ["scores: expected finite values", "inf"],
    ),
    "negative lengths": (
        change("lengths", int32(3, -1)),
        ["lengths: expected values", "lengths[1] = -1"],
    ),
    "lengths beyond the keys": (
        change("lengths", int32(51, 3)),
        ["lengths: expected values", "50", "51"],
    ),
    "a CUDA backend on the CPU": (
        give(backend="sm90"),
        ["backend: expected one that runs on the CPU"],
    ),
}


def check(good, wrong, fragments, error=ValueError):
    with pytest.raises(error) as caught:
        bs.attention_forward(**wrong(good))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_good_call_works(good):
    assert bs.attention_forward(**good).shape == (B, HQ, SQ, D)


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_wrong_call(good, wrong):
    check(good, *WRONG_VALUES[wrong])


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("wrong", WRONG_ON_HOST)
def test_wrong_value_on_the_host(good, wrong, device):
    check(good, *WRONG_ON_HOST[wrong])


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_wrong_call_with_a_selection(good, wrong):
    """The path through the stages' operators refuses what the fused one does."""
    changed = WRONG_VALUES[wrong][0](good)
    options = ("num_selected", "window", "chunk_size", "num_candidates")
    if any(name in changed for name in options):
        with pytest.raises(ValueError, match="expected"):
            bs.select(good["scores"], **{n: changed[n] for n in options if n in changed})
        return
    selection = bs.select(good["scores"], lengths=good["lengths"])
    with pytest.raises(ValueError, match="expected"):
        bs.attention_forward(**changed, selection=selection)


# ---- selections ----------------------------------------------------------------------------------


def test_options_that_disagree_with_the_selection(good):
    selection = bs.select(good["scores"], num_selected=8, lengths=good["lengths"])
    for name, value, own in (
        ("num_selected", 9, 8),
        ("window", 64, 128),
        ("chunk_size", 1, 128),
        ("num_candidates", 8, 32),
    ):
        with pytest.raises(
            ValueError, match=f"{name}: expected {own}, the selection's, or None, got {value}"
        ):
            bs.attention_forward(**good, selection=selection, **{name: value})


def test_selection_of_other_shapes(good):
    selection = bs.select(good["scores"][..., :40], num_selected=8)
    with pytest.raises(ValueError, match="expiry: expected shape"):
        bs.attention_forward(**good, selection=selection)


def test_gates_need_scores(good):
    selection = bs.select(good["scores"], num_selected=8)
    with pytest.raises(
        ValueError, match="scores: expected the scores that the selection was made from"
    ):
        bs.attention_forward(**{**good, "scores": None}, selection=selection, gate="softmax")


def test_foreign_selections_have_no_gates_and_no_configuration(good):
    selection = bs.Selection(bs.select(good["scores"]).expiry)
    with pytest.raises(ValueError, match="gate: expected 'none' with a foreign selection"):
        bs.attention_forward(**good, selection=selection, gate="value")
    with pytest.raises(ValueError, match="window: expected None with a foreign selection"):
        bs.attention_forward(**good, selection=selection, window=128)
    with pytest.raises(ValueError, match="max_keys_per_tile: expected a number >= 0, got -1"):
        bs.attention_forward(
            **good, selection=bs.Selection(selection.expiry, max_keys_per_tile=-1), gate="none"
        )
    with pytest.raises(ValueError, match="expiry: expected dtype int32, got float32"):
        bs.attention_forward(**good, selection=bs.Selection(selection.expiry.float()))


# ---- packed sequences ----------------------------------------------------------------------------


@pytest.fixture
def packed(device) -> dict:
    dtype = default_dtype(device)

    def starts(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    return {
        "q": torch.randn(30, HQ, D, device=device).to(dtype),
        "k": torch.randn(50, HKV, D, device=device).to(dtype),
        "v": torch.randn(50, HKV, D, device=device).to(dtype),
        "scores": torch.randn(50, HKV, device=device),
        "cu_seqlens_q": starts(0, 10, 30),
        "cu_seqlens_k": starts(0, 20, 50),
    }


WRONG_PACKED = {
    "a dense q": (change("q", lambda t: t[None]), ["q: expected 3 dimensions [total_q, Hq, D]"]),
    "scores of KV heads first": (change("scores", lambda t: t.T), ["scores", "[2, 50]"]),
    "64-bit starts": (change("cu_seqlens_q", lambda t: t.long()), ["cu_seqlens_q", "int64"]),
    "starts of another batch": (
        change("cu_seqlens_q", lambda t: t[:2]),
        ["cu_seqlens_k: expected shape [N + 1]", "[2] and [3]"],
    ),
    "no starts": (
        change("cu_seqlens_q", lambda t: t[:0]),
        ["cu_seqlens_q: expected shape [N + 1]"],
    ),
}

WRONG_PACKED_ON_HOST = {
    "a first start that is not 0": (
        change("cu_seqlens_k", int32(1, 20, 50)),
        ["cu_seqlens_k", "first value of 0"],
    ),
    "starts that fall": (change("cu_seqlens_k", int32(0, 60, 50)), ["cu_seqlens_k", "never fall"]),
    "a last start that is not the total": (
        change("cu_seqlens_k", int32(0, 20, 49)),
        ["cu_seqlens_k", "50", "49"],
    ),
    "a sequence with more queries than keys": (
        change("cu_seqlens_q", int32(0, 25, 30)),
        ["cu_seqlens_q: expected at most as many queries as keys", "sequence 0"],
    ),
}


def check_packed(packed, wrong, fragments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the fragments are checked)
        bs.attention_varlen_forward(**wrong(packed))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_good_packed_call_works(packed):
    assert bs.attention_varlen_forward(**packed).shape == (30, HQ, D)


@pytest.mark.parametrize("wrong", WRONG_PACKED)
def test_wrong_packed_call(packed, wrong):
    check_packed(packed, *WRONG_PACKED[wrong])


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("wrong", WRONG_PACKED_ON_HOST)
def test_wrong_packed_value_on_the_host(packed, wrong, device):
    check_packed(packed, *WRONG_PACKED_ON_HOST[wrong])


# ---- the SPARSEK operator, dtypes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("z", "k", "dim", "message"),
    [
        (torch.tensor(1.0), 1, -1, "z: expected at least one dimension"),
        (torch.zeros(3, dtype=torch.float16), 1, -1, "z: expected float32 or float64, got float16"),
        (torch.zeros(3), -1, -1, "k: expected a number >= 0, got -1"),
        (torch.zeros(3), 1, 1, "dim: expected between -1 and 0, got 1"),
        (torch.tensor([0.0, float("nan")]), 1, -1, "z: expected finite values"),
    ],
)
def test_wrong_sparsek_call(z, k, dim, message):
    with pytest.raises(ValueError, match=message):
        bs.sparsek(z, k, dim)


def test_float64_is_for_the_reference(good):
    double = {name: good[name].double() for name in ("q", "k", "v")}
    with pytest.raises(
        NotImplementedError, match="float64 is served by the reference backend only"
    ):
        bs.attention_forward(**{**good, **double})


@needs_cuda
def test_tensors_on_several_devices(good):
    device = good["q"].device.type
    other = "cpu" if device == "cuda" else "cuda"
    for name in ("k", "v", "scores", "lengths"):
        with pytest.raises(ValueError, match=r"on cuda:0|on cpu"):
            bs.attention_forward(**{**good, name: good[name].to(other)})


# ---- the checks that CUDA tensors get with BLACKWELL_SPARSEK_CHECK=1, on the host ------------------


def test_check_values():
    scores = torch.zeros(2, 1, 5)
    scores[1, 0, 4] = float("inf")
    with pytest.raises(ValueError, match="scores: expected finite values"):
        _arguments.check_values(scores, None, 5)
    with pytest.raises(ValueError, match="lengths: expected values between 0 and 5"):
        _arguments.check_values(scores, torch.tensor([6, 0]), 5)
    _arguments.check_values(scores, torch.tensor([5, 4]), 5)
    _arguments.check_values(None, None, 5)


@pytest.mark.parametrize(
    ("starts_q", "starts_k", "message"),
    [
        ([0, 3], [1, 5], "cu_seqlens_k: expected values that start at 0"),
        ([0, 4, 3], [0, 4, 5], "cu_seqlens_q: expected values that start at 0, never fall"),
        ([0, 2], [0, 5], "cu_seqlens_q: expected values .* end at 3"),
        ([0, 2, 3], [0, 1, 5], "got 2 queries and 1 keys in sequence 0"),
    ],
)
def test_check_cu_seqlens(starts_q, starts_k, message):
    with pytest.raises(ValueError, match=message):
        _arguments.check_cu_seqlens(torch.tensor(starts_q), torch.tensor(starts_k), 3, 5)
