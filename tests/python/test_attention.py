"""attention_forward on every backend: against the reference over the case table, and properties."""

from __future__ import annotations

import blackwell_sparsek as bs
import pytest
import torch
from case_table import Inputs, load_cases, poison
from conftest import (
    Target,
    assert_out_close,
    default_dtype,
    expected_of,
    find_case,
    gate_error_of,
    plain_attention_of,
    skip_unless_supported,
)

CASES = load_cases()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attend(inputs: Inputs, case, target: Target, **options):
    return bs.attention_forward(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.scores,
        **case.options,
        lengths=inputs.lengths,
        backend=target.backend,
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case, target, dtype):
    if dtype not in target.dtypes:
        with pytest.raises(NotImplementedError, match="float32"):
            attend(expected_of(case).inputs.to(dtype, target.device, case.layout), case, target)
        return
    skip_unless_supported(case, target, dtype)
    expected = expected_of(case)
    plain = plain_attention_of(case, dtype)
    inputs = poison(expected.inputs).to(dtype, target.device, case.layout)
    out, lse = attend(inputs, case, target, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    gate_error = gate_error_of(case, expected.inputs)
    assert_out_close(out, expected.out, plain, gate_error * float(expected.inputs.v.abs().max()))

    lse = lse.cpu().double()
    sees = torch.isfinite(expected.lse)
    assert torch.equal(lse[~sees], expected.lse[~sees])
    # lse is float32 whatever the dtype of q: logits are sums of head_dim products.
    logit_error = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(
        lse[sees], expected.lse[sees], rtol=0, atol=logit_error + 4 * gate_error
    )


@pytest.fixture
def small(device) -> Inputs:
    """Two batch rows, four query heads over two KV heads, 300 keys, D = 64."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, default_dtype(device))

    scores = torch.randn(2, 2, 300, generator=generator).to(device)
    return Inputs(normal(2, 4, 300, 64), normal(2, 2, 300, 64), normal(2, 2, 300, 64), scores, None)


OPTIONS = {"num_selected": 32, "window": 16, "chunk_size": 16}


def assert_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal on the CPU. On CUDA another layout or another order of heads may take another kernel or schedule."""
    if mine.device.type == "cpu":
        assert torch.equal(mine, theirs)
    else:
        tolerance = 2 * torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_enough_keys_give_dense_causal_attention(small):
    k = small.k.repeat_interleave(2, dim=1)
    v = small.v.repeat_interleave(2, dim=1)
    dense = torch.nn.functional.scaled_dot_product_attention(small.q, k, v, is_causal=True)
    for gate in ("none", "value", "softmax"):
        out = bs.attention_forward(
            small.q, small.k, small.v, small.scores, num_selected=300, gate=gate
        )
        tolerance = 4 * torch.finfo(out.dtype).eps
        torch.testing.assert_close(out, dense, rtol=tolerance, atol=tolerance)


def test_defaults(small):
    """Without scores: key norms, no gate; with scores: the softmax gate."""
    q, k, v, scores = small.q, small.k, small.v, small.scores
    out = bs.attention_forward(q, k, v)
    same = bs.attention_forward(
        q, k, v, bs.key_norm_scores(k), num_selected=256, window=128, chunk_size=128, gate="none"
    )
    assert torch.equal(out, same)
    out = bs.attention_forward(q, k, v, scores, **OPTIONS)
    assert torch.equal(
        out,
        bs.attention_forward(
            q, k, v, scores, **OPTIONS, gate="softmax", num_candidates=128, sm_scale=64**-0.5
        ),
    )


def test_sm_scale(small):
    doubled = bs.attention_forward(
        small.q, small.k, small.v, small.scores, **OPTIONS, sm_scale=2 * 64**-0.5
    )
    same = bs.attention_forward(2 * small.q, small.k, small.v, small.scores, **OPTIONS)
    torch.testing.assert_close(doubled, same, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gate", ["none", "value", "softmax"])
def test_a_selection_can_be_reused(small, gate):
    q, k, v, scores = small.q, small.k, small.v, small.scores
    selection = bs.select(scores, **OPTIONS)
    fused = bs.attention_forward(q, k, v, scores, **OPTIONS, gate=gate, return_lse=True)
    reused = bs.attention_forward(q, k, v, scores, selection=selection, gate=gate, return_lse=True)
    assert torch.equal(fused[0], reused[0])
    assert torch.equal(fused[1], reused[1])
    agreeing = bs.attention_forward(q, k, v, scores, selection=selection, gate=gate, **OPTIONS)
    assert torch.equal(fused[0], agreeing)
    if gate == "none":
        assert torch.equal(fused[0], bs.attention_forward(q, k, v, selection=selection))


@pytest.mark.parametrize("max_keys_per_tile", [None, 63])
def test_foreign_selection(small, max_keys_per_tile):
    """A sliding window of 64 keys, as an expiry that no select made."""
    seq_len = 300
    expiry = (torch.arange(seq_len, device=small.q.device) + 64).clamp(max=seq_len).int()
    selection = bs.Selection(
        expiry.expand(2, 2, seq_len).contiguous(), max_keys_per_tile=max_keys_per_tile
    )
    assert selection.is_foreign
    out = bs.attention_forward(small.q, small.k, small.v, selection=selection)
    # chunk_size = 1 and nothing selected is the same window: w keys to the left and the query itself.
    window = bs.attention_forward(
        small.q, small.k, small.v, num_selected=0, window=63, chunk_size=1, gate="none"
    )
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, window, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seq_len_q", [1, 2, 15, 17, 128, 299])
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_few_queries_are_the_last_rows(small, seq_len_q, chunk_size):
    options = {**OPTIONS, "chunk_size": chunk_size}
    whole, whole_lse = bs.attention_forward(
        small.q, small.k, small.v, small.scores, **options, return_lse=True
    )
    out, lse = bs.attention_forward(
        small.q[:, :, -seq_len_q:], small.k, small.v, small.scores, **options, return_lse=True
    )
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, whole[:, :, -seq_len_q:], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, whole_lse[:, :, -seq_len_q:], rtol=1e-5, atol=1e-5)


def test_lengths_equal_truncation(small):
    lengths = torch.tensor([300, 117], dtype=torch.int32, device=small.q.device)
    out, lse = bs.attention_forward(
        small.q, small.k, small.v, small.scores, **OPTIONS, lengths=lengths, return_lse=True
    )
    single, single_lse = bs.attention_forward(
        *(t[1:, :, :117] for t in (small.q, small.k, small.v, small.scores)),
        **OPTIONS,
        return_lse=True,
    )
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out[1:, :, :117], single, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse[1:, :, :117], single_lse, rtol=1e-5, atol=1e-5)
    assert (out[1, :, 117:] == 0).all()
    assert (lse[1, :, 117:] == -torch.inf).all()


def test_shuffling_heads_and_batch_shuffles_the_output(small):
    out = bs.attention_forward(small.q, small.k, small.v, small.scores, **OPTIONS)
    shuffled = bs.attention_forward(
        *(t.flip(0, 1) for t in (small.q, small.k, small.v, small.scores)), **OPTIONS
    )
    assert_same(shuffled, out.flip(0, 1))


def test_every_layout_gives_the_same_values(device):
    case = find_case("group_3")
    inputs = expected_of(case).inputs
    dtype = default_dtype(device)
    target = Target(device, None)
    outs = [
        attend(inputs.to(dtype, device, layout), case, target)
        for layout in ("bhsd", "bshd", "sliced")
    ]
    assert_same(outs[0], outs[1])
    assert_same(outs[0], outs[2])
    # Outputs take the layout of q where it is dense.
    assert outs[1].transpose(1, 2).is_contiguous()


def test_unaligned_rows(small):
    """Rows that start at odd elements: no vector loads, no TMA, the same values."""

    def unaligned(tensor):
        buffer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 1), float("nan"))
        view = buffer[..., 1:]
        view.copy_(tensor)
        return view

    out = bs.attention_forward(small.q, small.k, small.v, small.scores, **OPTIONS)
    for name in ("q", "k", "v"):
        tensors = {"q": small.q, "k": small.k, "v": small.v}
        tensors[name] = unaligned(tensors[name])
        assert_same(bs.attention_forward(**tensors, scores=small.scores, **OPTIONS), out)


def test_expanded_keys(small):
    """Stride 0: one row of keys for the whole batch."""
    k, v = small.k[:1].expand(2, -1, -1, -1), small.v[:1].expand(2, -1, -1, -1)
    scores = small.scores[:1].expand(2, -1, -1)
    out = bs.attention_forward(small.q, k, v, scores, **OPTIONS)
    same = bs.attention_forward(
        small.q, k.contiguous(), v.contiguous(), scores.contiguous(), **OPTIONS
    )
    assert_same(out, same)


def test_nan_stays_in_its_row(small):
    """A NaN in one (batch, KV head) reaches the query heads of that group and nothing else."""
    clean = bs.attention_forward(small.q, small.k, small.v, small.scores, **OPTIONS)
    for tensor in ("k", "v"):
        tensors = {"k": small.k.clone(), "v": small.v.clone()}
        tensors[tensor][1, 0, 40] = float("nan")
        out = bs.attention_forward(small.q, **tensors, scores=small.scores, **OPTIONS)
        assert torch.equal(out[0], clean[0])
        assert torch.equal(out[1, 2:], clean[1, 2:])
        assert out[1, :2, 40].isnan().all()


@pytest.mark.parametrize(
    "case", ["default_small", "c1_softmax", "group_8", "ragged", "few_queries_1"]
)
def test_deterministic(case, target):
    case = find_case(case)
    dtype = target.dtypes[0]
    skip_unless_supported(case, target, dtype)
    inputs = expected_of(case).inputs.to(dtype, target.device, case.layout)
    first, first_lse = attend(inputs, case, target, return_lse=True)
    for _ in range(100 if target.device == "cuda" else 10):
        out, lse = attend(inputs, case, target, return_lse=True)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def test_number_of_threads_does_not_matter():
    case = find_case("default_small")
    inputs = expected_of(case).inputs.to(torch.float32, "cpu", "bhsd")
    threads = torch.get_num_threads()
    outs = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            outs.append(attend(inputs, case, Target("cpu", None)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_empty(device):
    dtype = default_dtype(device)

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype, device=device)

    k = torch.randn(2, 2, 40, 64, device=device).to(dtype)
    out, lse = bs.attention_forward(empty(2, 4, 0, 64), k, k, return_lse=True)
    assert out.shape == (2, 4, 0, 64)
    assert lse.shape == (2, 4, 0)
    no_batch = empty(0, 2, 40, 64)
    assert bs.attention_forward(empty(0, 4, 40, 64), no_batch, no_batch).shape == (0, 4, 40, 64)
    nothing = empty(2, 2, 0, 64)
    assert bs.attention_forward(empty(2, 4, 0, 64), nothing, nothing).shape == (2, 4, 0, 64)


def test_reference_takes_tensors_of_any_device(device):
    case = find_case("group_3")
    expected = expected_of(case)
    inputs = expected.inputs.to(torch.float64, device, "bshd")
    out = attend(inputs, case, Target(device, "reference"))
    assert out.device.type == device
    assert_out_close(out, expected.out)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("name", ["default_small", "c1_value", "head_dim_33", "ragged_c16_group_3"])
def test_every_instruction_set(name, isa, monkeypatch):
    case = find_case(name)
    expected = expected_of(case)
    monkeypatch.setenv("BLACKWELL_SPARSEK_CPU_ISA", isa)
    try:
        assert bs.build_info()["cpu_isa"] == isa
    except ValueError as error:
        pytest.skip(str(error))
    for dtype in DTYPES:
        plain = plain_attention_of(case, dtype)
        inputs = poison(expected.inputs).to(dtype, "cpu", case.layout)
        out = attend(inputs, case, Target("cpu", None))
        gate_error = gate_error_of(case, expected.inputs)
        largest = float(expected.inputs.v.abs().max())
        assert_out_close(out, expected.out, plain, gate_error * largest)


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("BLACKWELL_SPARSEK_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="BLACKWELL_SPARSEK_CPU_ISA"):
        bs.attention_forward(*(torch.randn(1, 1, 4, 8) for _ in range(3)))
