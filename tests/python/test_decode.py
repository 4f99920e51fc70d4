"""Decode: prefill and steps reproduce the rows of the one-shot forward, in constant memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import blackwell_sparsek as bs
import pytest
import torch
from blackwell_sparsek.decode import state_layout
from case_table import make_scores
from conftest import assert_out_close, default_dtype, needs_cuda
from torch import Tensor

OPS = torch.ops.blackwell_sparsek


@dataclass(frozen=True)
class Sequences:
    """A batch of whole sequences, in float64 values that every dtype represents, and what the options make of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    options: dict
    gate: str
    expected: Tensor
    lse: Tensor
    selection: bs.Selection
    device: str  # where the calls run

    @property
    def dtype(self) -> torch.dtype:
        return default_dtype(self.device)

    @property
    def seq_len(self) -> int:
        return self.k.shape[2]

    def tokens(self, begin: int, end: int, dtype=None, device=None) -> tuple[Tensor, ...]:
        """q, k, v and scores of tokens begin … end - 1."""
        device = device or self.device
        q, k, v = (
            t[:, :, begin:end].to(device, dtype or self.dtype) for t in (self.q, self.k, self.v)
        )
        return q, k, v, self.scores[:, :, begin:end].to(device)


def make_sequences(
    batch=2, heads=4, kv_heads=2, seq_len=300, head_dim=16, kind="normal", gate="softmax",
    device="cpu", **options,
) -> Sequences:  # fmt: skip
    generator = torch.Generator().manual_seed(seq_len * 31 + head_dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().half().double()

    q = normal(batch, heads, seq_len, head_dim)
    k, v = (normal(batch, kv_heads, seq_len, head_dim) for _ in range(2))
    scores = make_scores(kind, (batch, kv_heads, seq_len), generator)
    double = scores.double()
    selection = bs.select(double, **options, backend="reference")
    expected, lse = bs.attention_forward(
        q, k, v, double, selection=selection, gate=gate, return_lse=True, backend="reference"
    )
    return Sequences(q, k, v, scores, options, gate, expected, lse, selection, device)


def make_cache(sequences: Sequences, dtype=None) -> bs.SparseKCache:
    batch, kv_heads, _, head_dim = sequences.k.shape
    return bs.SparseKCache(
        batch,
        kv_heads,
        head_dim,
        **sequences.options,
        gate=sequences.gate,
        dtype=dtype or sequences.dtype,
        device=sequences.device,
    )


def layout_of(cache: bs.SparseKCache) -> dict[str, int]:
    options = (cache.num_selected, cache.window, cache.chunk_size, cache.num_candidates)
    return state_layout(cache.dtype, cache.num_kv_heads, cache.head_dim, *options)


def head_bytes_of(cache: bs.SparseKCache, b: int, h: int) -> Tensor:
    layout = layout_of(cache)
    return cache.state[b, h * layout["head_bytes"] : (h + 1) * layout["head_bytes"]].cpu()


def assert_state(cache: bs.SparseKCache, sequences: Sequences, num_tokens: list[int]) -> None:
    """The selected positions are exactly those of select, and the threshold to the last bit but one."""
    layout = layout_of(cache)
    k, window, chunk_size = cache.num_selected, cache.window, cache.chunk_size
    assert cache.num_tokens.tolist() == num_tokens
    for b, h in itertools.product(range(cache.batch_size), range(cache.num_kv_heads)):
        if num_tokens[b] == 0:
            continue
        head = head_bytes_of(cache, b, h)
        chunk = (num_tokens[b] - 1) // chunk_size
        pool_end = max(0, chunk * chunk_size - window)
        begin = layout["positions_offset"]
        positions = head[begin : begin + 4 * k].view(torch.int32)[: min(k, pool_end)]
        alive = sequences.selection.expiry[b, h, :pool_end] > num_tokens[b] - 1
        assert sorted(positions.tolist()) == alive.nonzero()[:, 0].tolist()
        threshold = head[8:12].view(torch.float32)
        # The reference's thresholds are float64; as float32 they round down.
        expected = sequences.selection.threshold[b, h, chunk]
        torch.testing.assert_close(threshold[0].double(), expected, rtol=2e-7, atol=2e-7)


def run_pieces(sequences, cache, pieces, dtype=None) -> Tensor:
    """Feeds the sequences in pieces: ("prefill" | "step", tokens). Returns the rows of the steps, NaN elsewhere."""
    dtype = dtype or sequences.dtype
    out = torch.full(sequences.q.shape, float("nan"), dtype=dtype, device=sequences.device)
    begin = 0
    for kind, count in pieces:
        q, k, v, scores = sequences.tokens(begin, begin + count, dtype)
        if kind == "prefill":
            cache.prefill(k, v, scores)
        else:
            out[:, :, begin : begin + count] = cache.step(q, k, v, scores)
        begin += count
    return out


def assert_rows(out: Tensor, sequences: Sequences) -> None:
    """Every row that was computed equals the one-shot forward's (rows of the tokens where out is not NaN)."""
    seen = ~out[0, 0, :, 0].isnan().cpu()
    assert_close(out.cpu()[:, :, seen], sequences, (slice(None), slice(None), seen))


def assert_close(out: Tensor, sequences: Sequences, where: tuple) -> None:
    """The error is at most twice that of the CPU's one-shot forward at that dtype, plus a floor."""
    expected = sequences.expected[where]
    plain = None
    if out.dtype != torch.float32:
        plain = plain_forward(sequences, out.dtype)[where]
    assert_out_close(out.reshape(expected.shape), expected, plain, gate_error=4e-6)


_plain_forwards: dict = {}


def plain_forward(sequences: Sequences, dtype: torch.dtype) -> Tensor:
    key = (id(sequences), dtype)
    if key not in _plain_forwards:
        _plain_forwards.clear()  # one at a time: an id may be used again
        q, k, v, scores = sequences.tokens(0, sequences.seq_len, dtype, "cpu")
        plain = bs.attention_forward(q, k, v, scores, **sequences.options, gate=sequences.gate)
        _plain_forwards[key] = (sequences, plain.double())
    return _plain_forwards[key][1]


def steps(count: int, size: int = 1) -> list[tuple[str, int]]:
    return [("step", size)] * (count // size) + ([("step", count % size)] if count % size else [])


@pytest.mark.parametrize("gate", ["softmax", "value", "none"])
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
@pytest.mark.parametrize("window", [0, 1, 100])
@pytest.mark.parametrize("num_selected", [0, 1, 64])
def test_steps_equal_one_shot(device, gate, chunk_size, window, num_selected):
    sequences = make_sequences(
        device=device,
        gate=gate,
        chunk_size=chunk_size,
        window=window,
        num_selected=num_selected,
        num_candidates=None,
    )
    cache = make_cache(sequences)
    out = run_pieces(sequences, cache, [("prefill", 37), *steps(263)])
    assert_rows(out, sequences)
    assert_state(cache, sequences, [300, 300])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 20, 40, 64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 1)])
def test_dtypes_and_groups(device, dtype, head_dim, heads, kv_heads):
    if device == "cuda" and (dtype == torch.float32 or head_dim % 8):
        pytest.skip("CUDA decode: 16-bit dtypes and multiples of 8")
    sequences = make_sequences(
        device=device,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        seq_len=130,
        num_selected=20,
        window=9,
        chunk_size=16,
    )
    cache = make_cache(sequences, dtype)
    out = run_pieces(sequences, cache, [("prefill", 50), *steps(80)], dtype)
    assert_rows(out, sequences)


@pytest.mark.parametrize("kind", ["ties", "equal", "ascending", "descending"])
@pytest.mark.parametrize("chunk_size", [1, 16])
@pytest.mark.parametrize("num_candidates", [8, 9, 32, 1000])
def test_ties_and_candidates(device, kind, chunk_size, num_candidates):
    """The order of eviction, ties included, and the threshold of few, many and all candidates."""
    sequences = make_sequences(
        kind=kind, seq_len=120, num_selected=8, window=5, chunk_size=chunk_size,
        num_candidates=num_candidates, device=device,
    )  # fmt: skip
    cache = make_cache(sequences)
    out = run_pieces(sequences, cache, [("prefill", 1)])
    for t in range(1, 120):
        out[:, :, t : t + 1] = cache.step(*sequences.tokens(t, t + 1))
        assert_state(cache, sequences, [t + 1, t + 1])
    assert_rows(out, sequences)


PIECES = {
    "prefill alone": [("prefill", 700)],
    "prefill in pieces": [("prefill", n) for n in (1, 15, 16, 17, 128, 200, 323)],
    "steps of a few tokens": [("prefill", 100), *steps(600, 5)],
    "steps longer than a chunk": [("prefill", 10), ("step", 300), ("step", 1), ("step", 389)],
    "one step": [("prefill", 0), ("step", 700)],
    "in turns": [("prefill", 64), *steps(36), ("prefill", 200), *steps(30, 7), ("prefill", 370)],
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_pieces(device, name, chunk_size):
    """How a sequence is cut into calls does not matter."""
    sequences = make_sequences(
        seq_len=800, num_selected=30, window=40, chunk_size=chunk_size, device=device
    )
    cache = make_cache(sequences)
    out = run_pieces(sequences, cache, [*PIECES[name], *steps(100)])
    assert_rows(out, sequences)
    assert_state(cache, sequences, [800, 800])


def test_thousands_of_steps(device):
    sequences = make_sequences(
        seq_len=5000, batch=1, heads=2, kv_heads=1, num_selected=64, window=32, chunk_size=64,
        device=device,
    )  # fmt: skip
    cache = make_cache(sequences)
    out = run_pieces(sequences, cache, [("prefill", 100), *steps(4900)])
    assert_rows(out, sequences)
    assert_state(cache, sequences, [5000])


@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_ragged_batch(device, chunk_size):
    """Each row has its own position and chunk borders; memory beyond a length is not read."""
    sequences = make_sequences(
        batch=4, seq_len=260, num_selected=20, window=10, chunk_size=chunk_size, device=device
    )
    prompt = [200, 0, 33, 128]
    lengths = torch.tensor(prompt, dtype=torch.int32, device=device)
    _, k, v, scores = (t.clone() for t in sequences.tokens(0, 200))
    for b, length in enumerate(prompt):
        for tensor in (k, v):
            tensor[b, :, length:] = float("nan")
        scores[b, :, length:] = float("nan")
    cache = make_cache(sequences)
    cache.prefill(k[:, :, :90], v[:, :, :90], scores[:, :, :90], lengths.clamp(max=90))
    rest = (lengths - 90).clamp(min=0)
    cache.prefill(k[:, :, 90:], v[:, :, 90:], scores[:, :, 90:], rest)
    assert_state(cache, sequences, prompt)
    for t in range(60):
        rows = [
            [tensor[b : b + 1, :, n + t : n + t + 1] for b, n in enumerate(prompt)]
            for tensor in sequences.tokens(0, 260)
        ]
        out, lse = cache.step(*(torch.cat(row) for row in rows), return_lse=True)
        for b, n in enumerate(prompt):
            assert_close(out[b, :, 0], sequences, (b, slice(None), n + t))
            assert_out_close(lse[b, :, 0], sequences.lse[b, :, n + t].float(), gate_error=4e-5)
    assert_state(cache, sequences, [n + 60 for n in prompt])


def test_ragged_steps(device):
    """A row may take part in a step with fewer tokens than others, or with none."""
    sequences = make_sequences(seq_len=80, num_selected=10, window=7, chunk_size=8, device=device)
    cache = make_cache(sequences)
    run_pieces(sequences, cache, [("prefill", 20)])
    done = [20, 20]
    for counts in [(3, 1), (0, 4), (8, 8), (8, 0), (0, 0), (1, 8)]:
        rows = [
            torch.cat([tensor[b : b + 1, :, n : n + 8] for b, n in enumerate(done)])
            for tensor in sequences.tokens(0, 80)
        ]
        out = cache.step(*rows, lengths=torch.tensor(counts, dtype=torch.int32, device=device))
        for b, count in enumerate(counts):
            where = (b, slice(None), slice(done[b], done[b] + count))
            assert_close(out[b, :, :count], sequences, where)
            assert not bool(out[b, :, count:].any())
            done[b] += count
        assert_state(cache, sequences, done)


def test_key_norm_scores(device):
    sequences = make_sequences(
        seq_len=200, gate="none", num_selected=16, window=8, chunk_size=16, device=device
    )
    cache = make_cache(sequences)
    q, k, v, _ = sequences.tokens(0, 200)
    expected = bs.attention_forward(q, k, v, **sequences.options)
    cache.prefill(k[:, :, :100], v[:, :, :100], None)
    out = [cache.step(*(x[:, :, t : t + 1] for x in (q, k, v)), None) for t in range(100, 200)]
    expected = expected[:, :, 100:].double().cpu()
    plain = expected if device == "cpu" else expected + torch.finfo(q.dtype).eps
    assert_out_close(torch.cat(out, 2), expected, plain, gate_error=1e-6)


def test_strided_inputs(device):
    """[B, S, H, D] tensors seen as [B, H, S, D], scores [B, S, H], and every second token."""
    sequences = make_sequences(seq_len=120, num_selected=10, window=7, chunk_size=8, device=device)
    cache = make_cache(sequences)

    def lay_out(tensor):
        moved = tensor.transpose(1, 2).repeat_interleave(2, 1).contiguous()
        return moved[:, ::2].transpose(1, 2)

    out = []
    for begin, end in [(0, 40), *((t, t + 1) for t in range(40, 60)), (60, 120)]:
        q, k, v, scores = (lay_out(t) for t in sequences.tokens(begin, end))
        assert not k.is_contiguous()
        if begin == 0:
            cache.prefill(k, v, scores)
        else:
            out.append(cache.step(q, k, v, scores))
    assert_close(torch.cat(out, 2), sequences, (slice(None), slice(None), slice(40, None)))


def test_reset(device):
    sequences = make_sequences(seq_len=100, num_selected=10, window=7, chunk_size=8, device=device)
    cache = make_cache(sequences)
    first = run_pieces(sequences, cache, [("prefill", 60), *steps(40)])
    cache.reset()
    assert cache.num_tokens.tolist() == [0, 0]
    again = run_pieces(sequences, cache, [("prefill", 60), *steps(40)])
    assert torch.equal(first[:, :, 60:], again[:, :, 60:])


def test_reorder(device):
    """Rows become copies of other rows, as beam search needs them, in the same memory."""
    sequences = make_sequences(
        batch=3, seq_len=90, num_selected=10, window=7, chunk_size=8, device=device
    )
    cache = make_cache(sequences)
    run_pieces(sequences, cache, [("prefill", 50)])
    address = cache.state.data_ptr()
    cache.reorder(torch.tensor([2, 0, 2]))
    assert cache.state.data_ptr() == address
    for t in range(50, 90):
        tokens = [x[[2, 0, 2]] for x in sequences.tokens(t, t + 1)]
        out = cache.step(*tokens)
        assert_close(out[:, :, 0], sequences, ([2, 0, 2], slice(None), t))


def test_state_dict(device):
    sequences = make_sequences(seq_len=90, num_selected=10, window=7, chunk_size=8, device=device)
    cache = make_cache(sequences)
    run_pieces(sequences, cache, [("prefill", 40), *steps(13)])
    saved = cache.state_dict()
    other = make_cache(sequences)
    other.load_state_dict(saved)
    for t in range(53, 90):
        assert torch.equal(
            cache.step(*sequences.tokens(t, t + 1)), other.step(*sequences.tokens(t, t + 1))
        )
    assert int(saved["state"][:, :4].contiguous().view(torch.int32)[0, 0]) == 53  # a copy

    options = dict(num_selected=10, window=8, chunk_size=8)
    wider = bs.SparseKCache(2, 2, 16, **options, dtype=sequences.dtype, device=device)
    with pytest.raises(ValueError, match="expected window = 8, got 7"):
        wider.load_state_dict(saved)
    with pytest.raises(ValueError, match="expected the keys"):
        other.load_state_dict({"state": saved["state"]})


def test_memory_is_constant(device):
    """As many bytes after 100 000 tokens as after 1 000, in the same place; and what they are made of."""
    cache = bs.SparseKCache(
        1, 2, 8, num_selected=16, window=8, chunk_size=8, dtype=torch.float16, device=device
    )
    address, num_bytes = cache.state.data_ptr(), cache.num_bytes
    q, k, v = torch.randn(3, 1, 2, 1000, 8, device=device).half()
    scores = torch.randn(1, 2, 1000, device=device)
    cache.prefill(k[:, :, :0], v[:, :, :0], scores[:, :, :0])
    for t in range(1000):
        cache.step(*(x[:, :, t : t + 1] for x in (q, k, v, scores)))
    held = (cache.state.data_ptr(), cache.num_bytes, cache.state.untyped_storage().nbytes())
    assert held == (address, num_bytes, num_bytes)
    for _ in range(99):
        cache.step(q, k, v, scores)
    assert cache.num_tokens.tolist() == [100_000]
    held = (cache.state.data_ptr(), cache.num_bytes, cache.state.untyped_storage().nbytes())
    assert held == (address, num_bytes, num_bytes)
    # Header, 64 candidates, 16 positions, 32 scores, 32 rows of k and of v of 8 halves, all in lines of 64 bytes.
    assert num_bytes == 2 * (64 + 256 + 64 + 128 + 2 * 32 * 8 * 2)


def test_state_is_never_read_before_it_is_written(device):
    """NaN in every row, score and candidate of a block that starts afresh has no influence."""
    sequences = make_sequences(
        seq_len=200, num_selected=20, window=10, chunk_size=16, device=device
    )
    options = (20, 10, 16, None)
    cache = make_cache(sequences)
    state = torch.full_like(cache.state, 255)  # NaN in every dtype, -1 as integers
    blocks = torch.arange(2, dtype=torch.int32, device=device)
    fresh, out = torch.zeros(2, dtype=torch.int32, device=device), []
    for t in range(200):
        tokens = sequences.tokens(t, t + 1)
        continues = fresh if t == 0 else None
        out.append(
            OPS.decode(*tokens, None, state, blocks, continues, *options, "softmax", None, False)[0]
        )
    assert_rows(torch.cat(out, 2), sequences)


def test_packed_batch_of_prompts_and_steps(device):
    """What a serving engine does: blocks in any order, fresh and continuing sequences in one packed call."""
    sequences = make_sequences(
        batch=3, seq_len=100, num_selected=10, window=7, chunk_size=8, device=device
    )
    options = (10, 7, 8, None)
    layout = state_layout(sequences.dtype, 2, 16, *options)
    pool = torch.full((5, layout["block_bytes"] + 64), 255, dtype=torch.uint8, device=device)
    blocks = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    done = [0, 0, 0]
    for call, counts in enumerate([(60, 0, 0), (1, 40, 0), (1, 1, 70), (3, 0, 1), (30, 1, 29)]):
        pieces = []
        for b, count in enumerate(counts):
            q, k, v, scores = sequences.tokens(done[b], done[b] + count)
            pieces.append([x[b].transpose(0, 1) for x in (q, k, v, scores)])
        tokens = [torch.cat(column) for column in zip(*pieces, strict=True)]
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
        continues = torch.tensor([int(n > 0) for n in done], dtype=torch.int32, device=device)
        arguments = (starts, pool, blocks, continues, *options)
        if call == 0:
            OPS.decode_append_varlen(*tokens[1:], *arguments)
        else:
            out, lse = OPS.decode_varlen(*tokens, *arguments, "softmax", None, True)
            for b, count in enumerate(counts):
                rows = slice(int(starts[b]), int(starts[b + 1]))
                where = (b, slice(None), slice(done[b], done[b] + count))
                assert_close(out[rows].transpose(0, 1), sequences, where)
                expected = sequences.lse[where].transpose(0, 1).float()
                assert_out_close(lse[rows], expected, gate_error=4e-5)
        done = [n + count for n, count in zip(done, counts, strict=True)]
    assert bool((pool[[1, 3]] == 255).all())  # nobody's blocks


def operator_calls():
    sequences = make_sequences(seq_len=20, num_selected=4, window=2, chunk_size=8)
    options = (4, 2, 8, 16)
    state = make_cache(sequences).state
    blocks = torch.arange(2, dtype=torch.int32)
    q, k, v, scores = sequences.tokens(0, 20)
    lengths = torch.tensor([20, 3], dtype=torch.int32)
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v, scores)]
    starts = torch.tensor([0, 5, 20], dtype=torch.int32)
    attention = ("softmax", None, True)
    pool = (state, blocks, None)
    return {
        "decode": (q, k, v, scores, lengths, *pool, *options, *attention),
        "decode_append": (k, v, scores, None, *pool, *options),
        "decode_varlen": (*packed, starts, *pool, *options, *attention),
        "decode_append_varlen": (*packed[1:], starts, *pool, *options),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name).default, operator_calls()[name])


# ---- CUDA ----------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("chunk_size", [1, 8, 128])
def test_cuda_graph(chunk_size):
    """One captured step, replayed over chunk borders: nothing of it depends on the host."""
    sequences = make_sequences(
        batch=2, seq_len=500, num_selected=40, window=20, chunk_size=chunk_size, device="cuda"
    )
    cache = make_cache(sequences)
    run_pieces(sequences, cache, [("prefill", 100), *steps(3)])
    buffers = [x.clone() for x in sequences.tokens(103, 104)]
    saved = cache.state.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        cache.step(*buffers)  # warm-up
        with torch.cuda.graph(graph, stream=stream):
            out = cache.step(*buffers)
    torch.cuda.synchronize()
    cache.state.copy_(saved)
    rows = []
    for t in range(103, 500):
        for buffer, token in zip(buffers, sequences.tokens(t, t + 1), strict=True):
            buffer.copy_(token)
        graph.replay()
        rows.append(out.clone())
    assert_close(torch.cat(rows, 2), sequences, (slice(None), slice(None), slice(103, 500)))
    assert_state(cache, sequences, [500, 500])


@needs_cuda
def test_two_streams():
    """Two caches on two streams, and steps of each that wait for nothing but their own stream."""
    sequences = [
        make_sequences(
            seq_len=300 + 8 * i, num_selected=20, window=10, chunk_size=16, device="cuda"
        )
        for i in range(2)
    ]
    caches = [make_cache(s) for s in sequences]
    streams = [torch.cuda.Stream() for _ in sequences]
    tokens = [[s.tokens(t, t + 1) for t in range(200)] for s in sequences]
    torch.cuda.synchronize()
    out = [[], []]
    for cache, stream, of_sequence in zip(caches, streams, tokens, strict=True):
        with torch.cuda.stream(stream):
            cache.prefill(*(x[:, :, :0] for x in of_sequence[0][1:]))
    for t in range(200):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                out[i].append(caches[i].step(*tokens[i][t]))
    torch.cuda.synchronize()
    for s, cache, rows in zip(sequences, caches, out, strict=True):
        assert_close(torch.cat(rows, 2), s, (slice(None), slice(None), slice(200)))
        assert_state(cache, s, [200, 200])


@needs_cuda
def test_steps_take_no_memory():
    """After the first step, generation allocates its outputs and nothing else."""
    sequences = make_sequences(
        seq_len=300, num_selected=20, window=10, chunk_size=16, device="cuda"
    )
    cache = make_cache(sequences)
    run_pieces(sequences, cache, [("prefill", 100)])
    tokens = sequences.tokens(100, 101)
    cache.step(*tokens)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        cache.step(*tokens)
    assert torch.cuda.memory_allocated() == before


@needs_cuda
def test_values_are_checked_on_request(monkeypatch):
    """BLACKWELL_SPARSEK_CHECK=1 looks at values on CUDA too."""
    monkeypatch.setattr("blackwell_sparsek._arguments.CHECK_VALUES_ON_CUDA", True)
    sequences = make_sequences(seq_len=30, num_selected=6, window=5, chunk_size=8, device="cuda")
    cache = make_cache(sequences)
    _, k, v, scores = sequences.tokens(0, 3)
    before = cache.state.clone()
    with pytest.raises(ValueError, match="scores: expected finite values"):
        cache.prefill(k, v, to_nan(scores))
    with pytest.raises(ValueError, match="lengths: expected values between 0 and 3"):
        cache.prefill(k, v, scores, int32(4, 1).cuda())
    assert torch.equal(cache.state, before)


# ---- compilation ---------------------------------------------------------------------------------


def test_compile(device):
    sequences = make_sequences(seq_len=60, num_selected=6, window=5, chunk_size=8, device=device)
    cache, other = make_cache(sequences), make_cache(sequences)
    for c in (cache, other):
        run_pieces(sequences, c, [("prefill", 40)])
    step = torch.compile(
        lambda *tokens: cache.step(*tokens) + 1, fullgraph=True, backend="aot_eager"
    )
    for t in range(40, 60):
        tokens = sequences.tokens(t, t + 1)
        assert torch.equal(step(*tokens), other.step(*tokens) + 1)
    assert torch.equal(cache.state, other.state)


# ---- wrong calls ---------------------------------------------------------------------------------


def to_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 0, 0] = float("nan")
    return tensor


# (what is wrong, the changed call, the error, fragments of its message)
WRONG_STEPS = {
    "another batch": (
        lambda q, k, v, s: (q[:1], k[:1], v[:1], s[:1]),
        ["q: expected shape [2, Hq, tokens, 16]", "[1, 4, 1, 16]"],
    ),
    "more sequences than the cache has": (
        lambda *tokens: [t.repeat(2, *[1] * (t.dim() - 1)) for t in tokens],
        ["q: expected shape [2, Hq, tokens, 16]", "[4, 4, 1, 16]"],
    ),
    "other KV heads": (
        lambda q, k, v, s: (q, k[:, :1], v[:, :1], s[:, :1]),
        ["k: expected shape [2, 2, tokens, 16]", "[2, 1, 1, 16]"],
    ),
    "heads that do not divide": (
        lambda q, k, v, s: (q[:, :3], k, v, s),
        ["q: expected a number of heads divisible by Hkv = 2", "3"],
    ),
    "another head_dim": (
        lambda q, k, v, s: (q, k, v[..., :8], s),
        ["v: expected shape [2, 2, tokens, 16]", "[2, 2, 1, 8]"],
    ),
    "q of rank 3": (lambda q, k, v, s: (q[:, :, 0], k, v, s), ["q: expected shape", "[2, 4, 16]"]),
    "another dtype": (
        lambda q, k, v, s: (q, k.half(), v, s),
        ["k: expected dtype float32", "float16"],
    ),
    "another device": (
        lambda q, k, v, s: (q, k, v.to("meta"), s),
        ["v: expected a tensor on cpu", "meta"],
    ),
    "more queries than tokens": (
        lambda q, k, v, s: (q.repeat(1, 1, 2, 1), k, v, s),
        ["q: expected shape [N, Hq, S, D] = [2, 4, 1, 16]", "[2, 4, 2, 16]"],
    ),
    "v longer than k": (
        lambda q, k, v, s: (q, k, v.repeat(1, 1, 2, 1), s),
        ["v: expected shape [N, Hkv, S, D] = [2, 2, 1, 16]"],
    ),
    "scores of another shape": (
        lambda q, k, v, s: (q, k, v, s.repeat(1, 2, 1)),
        ["scores: expected shape [N, Hkv, S] = [2, 2, 1]", "[2, 4, 1]"],
    ),
    "half-precision scores": (
        lambda q, k, v, s: (q, k, v, s.half()),
        ["scores: expected dtype float32", "float16"],
    ),
    "scores of NaN": (
        lambda q, k, v, s: (q, k, v, to_nan(s)),
        ["scores: expected finite values", "sequence 1, head 0, token 0"],
    ),
    "a strided last dimension": (
        lambda q, k, v, s: (q, k.repeat(1, 1, 1, 2)[..., ::2], v, s),
        ["k: expected a contiguous last dimension", "2"],
    ),
}


@pytest.fixture
def filled():
    sequences = make_sequences(seq_len=31, num_selected=6, window=5, chunk_size=8)
    cache = make_cache(sequences)
    run_pieces(sequences, cache, [("prefill", 30)])
    return sequences, cache


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_wrong_steps_leave_the_cache_as_it_was(filled, name):
    sequences, cache = filled
    change, fragments = WRONG_STEPS[name]
    before = cache.state.clone()
    with pytest.raises(ValueError, match="expected") as error:
        cache.step(*change(*sequences.tokens(30, 31)))
    for fragment in fragments:
        assert fragment in str(error.value)
    assert torch.equal(cache.state, before)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


WRONG_PREFILLS = {
    "lengths beyond the call": (int32(4, 1), ["lengths: expected values from 0 to Sk = 3", "4"]),
    "negative lengths": (int32(1, -1), ["lengths", "lengths[1] = -1"]),
    "lengths of another batch": (int32(1), ["lengths: expected shape [B] = [2]", "[1]"]),
    "64-bit lengths": (torch.tensor([1, 1]), ["lengths", "int64"]),
}


@pytest.mark.parametrize("name", WRONG_PREFILLS)
def test_wrong_prefills_leave_the_cache_as_it_was(filled, name):
    sequences, cache = filled
    lengths, fragments = WRONG_PREFILLS[name]
    before = cache.state.clone()
    _, k, v, scores = sequences.tokens(20, 23)
    with pytest.raises(ValueError, match="expected") as error:
        cache.prefill(k, v, scores, lengths)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert torch.equal(cache.state, before)


def test_step_before_prefill(filled):
    sequences, cache = filled
    cache.reset()
    with pytest.raises(ValueError, match="expected a prefill before the first step"):
        cache.step(*sequences.tokens(0, 1))
    assert cache.num_tokens.tolist() == [0, 0]


WRONG_CACHES = {
    "negative batch": (dict(batch_size=-1), ValueError, "batch_size: expected a number >= 0"),
    "negative window": (dict(window=-1), ValueError, "window: expected a number >= 0, got -1"),
    "empty chunks": (dict(chunk_size=0), ValueError, "chunk_size: expected a number >= 1, got 0"),
    "too few candidates": (dict(num_candidates=5), ValueError, "at least num_selected = 6, got 5"),
    "another gate": (dict(gate="hard"), ValueError, "gate: expected one of none, value, softmax"),
    "integers": (dict(dtype=torch.int32), ValueError, "dtype: expected a floating-point dtype"),
    "float64": (dict(dtype=torch.float64), NotImplementedError, "float64 is not served by decode"),
    "float32 on CUDA": (
        dict(device="cuda", dtype=torch.float32),
        NotImplementedError,
        "SparseKCache: ",
    ),
    "another device": (dict(device="meta"), NotImplementedError, "supported are cpu and cuda"),
    "too many rows": (dict(window=2**31), ValueError, "at most 2147483646 rows of the window"),
}


@pytest.mark.parametrize("name", WRONG_CACHES)
def test_wrong_caches(name):
    options, error, message = WRONG_CACHES[name]
    good = dict(batch_size=2, num_kv_heads=2, head_dim=16, num_selected=6)
    with pytest.raises(error, match=message):
        bs.SparseKCache(**{**good, **options})


def test_wrong_blocks():
    """What the operators refuse beyond that: pools and indices."""
    calls = operator_calls()["decode_append"]
    k, v, scores, lengths, state, _, _, *options = calls

    def append(message, state=state, blocks=(0, 1), continues=None):
        before = state.clone()
        with pytest.raises(ValueError, match=message):
            OPS.decode_append(k, v, scores, lengths, state, int32(*blocks), continues, *options)
        assert torch.equal(state, before)

    append("block_index: expected values from 0 to 1, got 2", blocks=(0, 2))
    append("block_index: expected values from 0 to 1, got -1", blocks=(-1, 0))
    append("block_index: expected a block of its own for each sequence, got 1 twice", blocks=(1, 1))
    append(r"block_index: expected shape \[N\] = \[2\]", blocks=(0,))
    append(r"continues: expected shape \[N\] = \[2\]", continues=int32(1))
    append("state: expected blocks of at least", state=state[:, 64:])
    append("state: expected uint8", state=state.view(torch.int32))
    append("state: expected blocks of zeros or that were filled with these options",
           state=torch.full_like(state, 255))  # fmt: skip
    full = state.clone()
    full.view(torch.int32)[:, :: full.shape[1] // 8] = 2**31 - 10  # num_tokens of both heads
    append("k: expected at most 2147483646 positions in sequence 0", state=full)


def test_inputs_that_require_grad(filled):
    sequences, cache = filled
    q, k, v, scores = sequences.tokens(30, 31)
    before = cache.state.clone()
    with pytest.raises(NotImplementedError, match="decode has no backward"):
        cache.step(q.requires_grad_(), k, v, scores)
    assert torch.equal(cache.state, before)


def test_wrong_reorder(filled):
    _, cache = filled
    with pytest.raises(ValueError, match=r"batch_indices: expected integers of shape \[2\]"):
        cache.reorder(torch.tensor([0]))
