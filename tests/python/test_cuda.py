"""What only a GPU can show: graphs, streams, devices, no waiting, memory, who sees a call."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import blackwell_sparsek as bs
import pytest
import torch
from blackwell_sparsek import _arguments, functional
from blackwell_sparsek._library import need_no_dispatcher
from conftest import needs_cuda
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = needs_cuda

OPTIONS = {"num_selected": 64, "window": 64, "chunk_size": 128}


def make_tensors(seed: int = 0, device: str = "cuda", seq_len: int = 1000, head_dim: int = 64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, torch.float16)

    q = normal(2, 4, seq_len, head_dim)
    k, v = normal(2, 2, seq_len, head_dim), normal(2, 2, seq_len, head_dim)
    return q, k, v, torch.randn(2, 2, seq_len, generator=generator).to(device)


def starts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def packed(q, k, v, scores):
    """The same tensors as one packed batch of two sequences."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    seq_len = len(q) // 2
    cu_seqlens = starts(0, seq_len, 2 * seq_len)
    return q, k, v, scores.transpose(1, 2).flatten(0, 1), cu_seqlens, cu_seqlens


CALLS = {
    "scores": lambda q, k, v, scores: bs.attention_forward(q, k, v, scores, **OPTIONS),
    "key_norms": lambda q, k, v, scores: bs.attention_forward(q, k, v, **OPTIONS),
    "chunk_size_1": lambda q, k, v, scores: bs.attention_forward(
        q, k, v, scores, num_selected=64, window=64, chunk_size=1, gate="value"
    ),
    "selection": lambda q, k, v, scores: bs.attention_forward(
        q, k, v, scores, selection=bs.select(scores, **OPTIONS)
    ),
    "lengths": lambda q, k, v, scores: bs.attention_forward(
        q, k, v, scores, **OPTIONS, lengths=make_lengths(q)
    ),
    "varlen": lambda *tensors: bs.attention_varlen_forward(*packed(*tensors), **OPTIONS),
    "sparsek": lambda q, k, v, scores: bs.sparsek(scores, 64),
}


def make_lengths(q: torch.Tensor) -> torch.Tensor:
    # Made without copying from the host, so that a graph can hold it.
    return torch.full((2,), q.shape[2] - 10, dtype=torch.int32, device="cuda")


GRAPH_CALLS = [name for name in CALLS if name != "varlen"]


@pytest.mark.parametrize("name", GRAPH_CALLS)
def test_graph_capture(name):
    """A captured call replays on new values in the same memory."""
    call = CALLS[name]
    static = make_tensors(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*static)
    for seed in (1, 2):
        fresh = make_tensors(seed)
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(out, call(*fresh))


def test_graph_capture_of_packed_sequences():
    args = packed(*make_tensors(0))
    expected = bs.attention_varlen_forward(*args, **OPTIONS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bs.attention_varlen_forward(*args, **OPTIONS)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "varlen"])
def test_no_call_waits_for_the_device(name):
    tensors = make_tensors()
    CALLS[name](*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_call_returns_before_the_device_is_done():
    """Work is queued behind a long kernel; a call that waited for the device would take as long."""
    tensors = make_tensors()
    CALLS["scores"](*tensors)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    torch.cuda._sleep(int(1e9))  # about half a second
    CALLS["scores"](*tensors)
    returned = time.perf_counter() - begin
    torch.cuda.synchronize()
    finished = time.perf_counter() - begin
    assert returned < finished / 5


def test_two_streams():
    """Calls on two streams at once do not disturb each other."""
    inputs = [make_tensors(seed, seq_len=3000) for seed in (0, 1)]
    expected = [CALLS["scores"](*tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    outs = [[], []]
    for _ in range(20):
        for stream, tensors, out in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(CALLS["scores"](*tensors))
    torch.cuda.synchronize()
    for out, wanted in zip(outs, expected, strict=True):
        assert all(torch.equal(o, wanted) for o in out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    tensors = make_tensors(device="cuda:1")
    expected = CALLS["scores"](*make_tensors(device="cuda:0"))
    with torch.cuda.device(0):
        out = CALLS["scores"](*tensors)
        assert torch.cuda.current_device() == 0
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out.cpu(), expected.cpu(), rtol=1e-3, atol=1e-3)


def test_memory_is_linear_in_the_sequence():
    def extra_bytes(seq_len: int) -> int:
        tensors = make_tensors(seq_len=seq_len)
        CALLS["scores"](*tensors)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = CALLS["scores"](*tensors)
        return torch.cuda.max_memory_allocated() - before - out.numel() * 2

    short, long = extra_bytes(8192), extra_bytes(65536)
    assert long <= 8 * short + (1 << 20)
    # A hundredth of one head's S x S matrix in float16.
    assert long < 65536 * 65536 * 2 / 100


def test_the_best_kernel_is_named():
    capability = bs.capability((2, 4, 1000, 64), (2, 2, 1000, 64), device="cuda", **OPTIONS)
    assert capability.supported
    assert "/" in capability.kernel
    portable = bs.capability(
        (2, 4, 1000, 64), (2, 2, 1000, 64), device="cuda", backend="portable", **OPTIONS
    )
    assert portable.kernel.startswith("portable")


# ---- calls that go past torch's dispatcher ------------------------------------------------------


FUSED_CALLS = {
    "dense": (CALLS["scores"], "attention_forward"),
    "packed": (CALLS["varlen"], "attention_varlen_forward"),
}


@pytest.fixture(params=FUSED_CALLS)
def fused_call(request):
    """A call that takes a fused operator, its arguments, the operator's name."""
    call, name = FUSED_CALLS[request.param]
    return call, make_tensors(), f"blackwell_sparsek.{name}"


def test_ordinary_calls_are_direct(fused_call, monkeypatch):
    """They need no dispatcher, and give what the operators give."""
    answers = []

    def watched(*tensors):
        answers.append(need_no_dispatcher(*tensors))
        return answers[-1]

    call, tensors, _ = fused_call
    monkeypatch.setattr(functional, "need_no_dispatcher", lambda *tensors: False)
    expected = call(*tensors)
    monkeypatch.setattr(functional, "need_no_dispatcher", watched)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(call(*tensors), expected)
    # Packing a parameter makes it a plain tensor.
    with torch.no_grad():
        assert torch.equal(call(torch.nn.Parameter(tensors[0]), *tensors[1:]), expected)
    assert answers == [True] * 4
    out = call(tensors[0].clone().requires_grad_(), *tensors[1:])
    assert out.requires_grad
    assert answers[-1] is False


def test_a_dispatch_mode_sees_the_operator(fused_call):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    call, tensors, name = fused_call
    names = []
    with Recorder():
        call(*tensors)
    assert f"{name}.default" in names


def test_a_function_mode_sees_the_operator(fused_call):
    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    call, tensors, name = fused_call
    names = []
    with Recorder():
        call(*tensors)
    assert any(name in seen for seen in names)


def test_a_subclass_sees_the_operator():
    class Recording(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    q, *rest = make_tensors()
    names = []
    CALLS["scores"](q.as_subclass(Recording), *rest)
    assert any("blackwell_sparsek.attention_forward" in seen for seen in names)


def test_the_profiler_sees_the_operator(fused_call):
    call, tensors, name = fused_call
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*tensors)
    assert name.replace(".", "::") in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_trace_holds_the_operator(pre_dispatch):
    tensors = make_tensors()
    graph = make_fx(CALLS["scores"], pre_dispatch=pre_dispatch)(*tensors)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "blackwell_sparsek.attention_forward.default" in targets
    assert torch.equal(graph(*tensors), CALLS["scores"](*tensors))


def test_a_lazily_negated_tensor():
    """Its memory holds the negated values; torch's dispatcher resolves it."""
    q, k, v, scores = make_tensors()
    negated = torch._neg_view(v)
    assert torch.equal(CALLS["scores"](q, k, negated, scores), -CALLS["scores"](q, k, v, scores))


def test_without_memory_torchs_own_error_is_raised():
    tensors = make_tensors()
    held = []

    def call_until_memory_ends():
        for _ in range(10000):
            held.append(CALLS["scores"](*tensors))

    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            call_until_memory_ends()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.isfinite(held[0]).all()


# ---- values, which are looked at only on request -------------------------------------------------


@pytest.fixture
def check_values(monkeypatch):
    monkeypatch.setattr(_arguments, "CHECK_VALUES_ON_CUDA", True)


def test_checked_values(check_values):
    q, k, v, scores = make_tensors()
    assert torch.isfinite(bs.attention_forward(q, k, v, scores)).all()
    with pytest.raises(ValueError, match="lengths: expected values between 0 and 1000"):
        bs.attention_forward(q, k, v, scores, lengths=starts(3, 1001))
    scores[1, 1, 500] = float("nan")
    for call in (CALLS["scores"], CALLS["selection"], CALLS["varlen"]):
        with pytest.raises(ValueError, match="scores: expected finite values"):
            call(q, k, v, scores)
    lengths = starts(1000, 400)  # the NaN does not exist
    assert torch.isfinite(bs.attention_forward(q, k, v, scores, lengths=lengths)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [((1, 2000), "start at 0"), ((0, 1500, 1000, 2000), "never fall"), ((0, 1999), "end at 2000")],
)
def test_checked_starts(check_values, values, message):
    q, k, v, scores, _, _ = packed(*make_tensors())
    with pytest.raises(ValueError, match=message):
        bs.attention_varlen_forward(q, k, v, scores, starts(*values), starts(*values))


UNCHECKED_CALLS = """
import torch
import blackwell_sparsek as bs

def starts(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")

options = {"num_selected": 64, "window": 64}
q = torch.randn(2, 4, 1000, 64, device="cuda").half()
k, v = (torch.randn(2, 2, 1000, 64, device="cuda").half() for _ in range(2))
scores = torch.randn(2, 2, 1000, device="cuda")
wrong = scores.clone()
wrong[:, :, ::7] = float("nan")
wrong[:, :, 3::11] = float("inf")
for chunk_size in (1, 128):
    bs.attention_forward(q, k, v, wrong, **options, chunk_size=chunk_size)
    bs.attention_forward(q, k, v, scores, **options, chunk_size=chunk_size, lengths=starts(-5, 100_000))
torch.cuda.synchronize()
q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
scores = scores.transpose(1, 2).flatten(0, 1)
bs.attention_varlen_forward(q, k, v, scores, starts(0, 5000, 2000), starts(-3, 7, 90_000), **options)
torch.cuda.synchronize()
"""


def test_unchecked_values_never_crash():
    """Wrong values on CUDA give unspecified numbers, never an access out of bounds.

    In a process of its own: an illegal access would take the CUDA context of every later test with it.
    """
    package = str(Path(bs.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", UNCHECKED_CALLS],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
