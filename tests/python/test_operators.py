"""The torch operators: opcheck, torch.compile, autograd modes, what is refused."""

from __future__ import annotations

import blackwell_sparsek as bs
import pytest
import torch
from case_table import Inputs
from conftest import default_dtype

OPTIONS = {"num_selected": 8, "window": 4, "chunk_size": 16}
CONFIGURATION = (8, 4, 16, None)
OPS = torch.ops.blackwell_sparsek


def make_small(device: str, dtype: torch.dtype | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(31)
    dtype = dtype or default_dtype(device)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    scores = torch.randn(2, 2, 70, generator=generator).to(device)
    lengths = torch.tensor([70, 33], dtype=torch.int32, device=device)
    return Inputs(normal(2, 4, 50, 64), normal(2, 2, 70, 64), normal(2, 2, 70, 64), scores, lengths)


@pytest.fixture
def small(device) -> Inputs:
    return make_small(device)


def test_opcheck_key_norm_scores(small):
    torch.library.opcheck(OPS.key_norm_scores.default, (small.k, small.lengths, "auto"))


def test_opcheck_select(small):
    torch.library.opcheck(OPS.select.default, (small.scores, small.lengths, *CONFIGURATION, "auto"))
    torch.library.opcheck(OPS.select.default, (small.scores, None, *CONFIGURATION, "auto"))


@pytest.mark.parametrize("return_lse", [True, False])
def test_opcheck_attend(small, return_lse):
    selection = OPS.select(small.scores, small.lengths, *CONFIGURATION, "auto")
    rest = (*CONFIGURATION, None, "softmax", None, return_lse, "auto")
    torch.library.opcheck(
        OPS.attend.default,
        (small.q, small.k, small.v, small.scores, *selection, small.lengths, *rest),
    )
    # A transposed q has a transposed output.
    q = small.q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(
        OPS.attend.default, (q, small.k, small.v, small.scores, *selection, small.lengths, *rest)
    )


def test_opcheck_attend_with_gradients():
    small = make_small("cpu", torch.float64)
    scores = small.scores.double()
    selection = OPS.select(scores, small.lengths, *CONFIGURATION, "reference")
    leaves = [t.detach().requires_grad_() for t in (small.q, small.k, small.v, scores)]
    rest = (*CONFIGURATION, None, "softmax", None, True, "reference")
    torch.library.opcheck(OPS.attend.default, (*leaves, *selection, small.lengths, *rest))


def test_opcheck_attend_backward():
    small = make_small("cpu")
    selection = OPS.select(small.scores, small.lengths, *CONFIGURATION, "reference")
    tensors = (small.q, small.k, small.v, small.scores, *selection, small.lengths)
    options = (*CONFIGURATION, None, "softmax", None)
    out, lse = OPS.attend(*tensors, *options, True, "reference")
    torch.library.opcheck(
        OPS.attend_backward.default,
        (*tensors, *options, out, lse, torch.randn_like(out), True, "reference"),
    )


@pytest.mark.parametrize("return_lse", [True, False])
def test_opcheck_attention_forward(small, return_lse):
    options = (*CONFIGURATION, "softmax", None, return_lse, "auto")
    for scores in (small.scores, None):
        torch.library.opcheck(
            OPS.attention_forward.default,
            (small.q, small.k, small.v, scores, small.lengths, *options),
        )


def test_opcheck_attention_varlen_forward(small):
    q, k, v = (t[0].transpose(0, 1) for t in (small.q, small.k, small.v))
    starts_q = torch.tensor([0, 20, 50], dtype=torch.int32, device=q.device)
    starts_k = torch.tensor([0, 40, 70], dtype=torch.int32, device=q.device)
    options = (*CONFIGURATION, "softmax", None, True, "auto")
    torch.library.opcheck(
        OPS.attention_varlen_forward.default,
        (q, k, v, small.scores[0].T, starts_q, starts_k, *options),
    )


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_forward(small, dynamic):
    def function(q, k, v, scores, lengths):
        out, lse = bs.attention_forward(
            q * 2, k, v, scores, **OPTIONS, lengths=lengths, return_lse=True
        )
        return out + 1, lse

    args = (small.q, small.k, small.v, small.scores, small.lengths)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for mine, theirs in zip(compiled(*args), function(*args), strict=True):
        assert torch.equal(mine, theirs)


def test_compiled_with_inductor(small):
    def function(q, k, v, scores):
        return bs.attention_forward((q + q) / 2, k, v, scores, **OPTIONS)

    args = (small.q.transpose(1, 2).contiguous().transpose(1, 2), small.k, small.v, small.scores)
    assert torch.equal(torch.compile(function, fullgraph=True)(*args), function(*args))


def test_compiled_selection(small):
    def function(q, k, v, scores):
        selection = bs.select(scores, **OPTIONS)
        return bs.attention_forward(q, k, v, scores, selection=selection), selection

    args = (small.q, small.k, small.v, small.scores)
    out, selection = torch.compile(function, fullgraph=True, backend="aot_eager")(*args)
    expected, expected_selection = function(*args)
    assert torch.equal(out, expected)
    assert torch.equal(selection.expiry, expected_selection.expiry)
    assert selection.configuration == expected_selection.configuration


def test_compiled_gradients():
    small = make_small("cpu")

    def function(q, k, v, scores):
        out = bs.attention_forward(q, k, v, scores, **OPTIONS, backend="reference")
        return out.square().sum()

    def gradients(function):
        tensors = (small.q, small.k, small.v, small.scores)
        leaves = [t.clone().requires_grad_() for t in tensors]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(gradients(compiled), gradients(function), strict=True):
        assert torch.equal(mine, theirs)


def test_compiled_varlen(small):
    q, k, v = (t[0].transpose(0, 1) for t in (small.q, small.k, small.v))
    starts_q = torch.tensor([0, 20, 50], dtype=torch.int32, device=q.device)
    starts_k = torch.tensor([0, 40, 70], dtype=torch.int32, device=q.device)
    args = (q, k, v, small.scores[0].T, starts_q, starts_k)

    def function(*tensors):
        return bs.attention_varlen_forward(*tensors, **OPTIONS)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), function(*args))


def test_compiled_sparsek(small):
    compiled = torch.compile(
        lambda z: bs.sparsek(z, 5).sum(-1), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(small.scores), bs.sparsek(small.scores, 5).sum(-1))


# ---- gradients -----------------------------------------------------------------------------------


def missing_backward(device: str) -> bool:
    return not bs.capability(
        (2, 4, 50, 64),
        (2, 2, 70, 64),
        dtype=default_dtype(device),
        device=device,
        stage="attend_backward",
    ).supported


@pytest.mark.parametrize("leaf", ["q", "k", "v", "scores"])
@pytest.mark.parametrize("with_selection", [False, True])
def test_missing_backward_is_said(small, leaf, with_selection):
    """Never a silent detach: a call that cannot be differentiated refuses inputs that want it."""
    if not missing_backward(small.q.device.type):
        pytest.skip("attend_backward is there")
    tensors = {"q": small.q, "k": small.k, "v": small.v, "scores": small.scores}
    options = {"selection": bs.select(small.scores, **OPTIONS)} if with_selection else OPTIONS
    tensors[leaf] = tensors[leaf].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="attend_backward is missing here"):
        bs.attention_forward(**tensors, **options)
    with torch.no_grad():
        bs.attention_forward(**tensors, **options)
    tensors[leaf] = tensors[leaf].detach()
    assert not bs.attention_forward(**tensors, **options).requires_grad


def test_missing_backward_is_said_by_the_operators(small):
    q = small.q.clone().requires_grad_()
    options = (*CONFIGURATION, "softmax", None, True, "auto")
    with pytest.raises(NotImplementedError, match="has no backward"):
        OPS.attention_forward(q, small.k, small.v, small.scores, None, *options)
    if missing_backward(small.q.device.type):
        selection = OPS.select(small.scores, None, *CONFIGURATION, "auto")
        rest = (*CONFIGURATION, None, "softmax", None, True, "auto")
        with pytest.raises(NotImplementedError, match="attend_backward is missing here"):
            OPS.attend(q, small.k, small.v, small.scores, *selection, None, *rest)


def test_missing_backward_is_said_when_compiled(small):
    if not missing_backward(small.q.device.type):
        pytest.skip("attend_backward is there")
    compiled = torch.compile(bs.attention_forward, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="attend_backward is missing here"):
        compiled(small.q.clone().requires_grad_(), small.k, small.v, small.scores, **OPTIONS)


def test_selection_is_not_differentiable(small):
    scores = small.scores.clone().requires_grad_()
    selection = bs.select(scores, **OPTIONS)
    assert not selection.threshold.requires_grad
    assert not OPS.select(scores, None, *CONFIGURATION, "auto")[1].requires_grad
    assert not bs.key_norm_scores(small.k.clone().requires_grad_()).requires_grad


def test_expanded_upstream_gradient():
    """sum().backward() hands down a gradient of stride 0."""
    small = make_small("cpu")
    q = small.q.clone().requires_grad_()
    bs.attention_forward(
        q, small.k, small.v, small.scores, **OPTIONS, backend="reference"
    ).sum().backward()
    dense = small.q.clone().requires_grad_()
    out = bs.attention_forward(
        dense, small.k, small.v, small.scores, **OPTIONS, backend="reference"
    )
    out.backward(torch.ones_like(out))
    assert torch.equal(q.grad, dense.grad)


def test_inference_mode(small):
    expected = bs.attention_forward(small.q, small.k, small.v, small.scores, **OPTIONS)
    with torch.inference_mode():
        q = small.q.clone()
        out = bs.attention_forward(q, small.k, small.v, small.scores, **OPTIONS)
        selection = bs.select(small.scores, **OPTIONS)
        again = bs.attention_forward(q, small.k, small.v, small.scores, selection=selection)
    assert torch.equal(out, expected)
    assert torch.equal(again, expected)


def test_inputs_are_not_written(small):
    copies = [t.clone() for t in (small.q, small.k, small.v, small.scores, small.lengths)]
    bs.attention_forward(
        small.q, small.k, small.v, small.scores, **OPTIONS, lengths=small.lengths, return_lse=True
    )
    for before, after in zip(
        copies, (small.q, small.k, small.v, small.scores, small.lengths), strict=True
    ):
        assert torch.equal(before, after)


# ---- what runs where -----------------------------------------------------------------------------


def test_capability():
    capability = bs.capability((1, 8, 128, 64), (1, 2, 256, 64), dtype=torch.float32)
    assert capability.supported
    assert capability.kernel == "cpu/" + bs.build_info()["cpu_isa"]
    double = bs.capability((1, 8, 128, 64), (1, 2, 256, 64), dtype=torch.float64)
    assert not double.supported
    assert "float64" in double.reason
    reference = bs.capability(
        (1, 8, 128, 64), (1, 2, 256, 64), dtype=torch.float64, backend="reference"
    )
    assert reference.kernel == "reference"
    assert "mps" in bs.capability((1, 8, 128, 64), (1, 2, 256, 64), device="mps").reason
    if not bs.build_info()["built_with_cuda"]:
        missing = bs.capability((1, 8, 128, 64), (1, 2, 256, 64), device="cuda")
        assert not missing.supported
        assert "CUDA" in missing.reason
    with pytest.raises(ValueError, match="stage"):
        bs.capability((1, 8, 128, 64), (1, 2, 256, 64), stage="project")


def test_show_config(capsys):
    bs.show_config()
    text = capsys.readouterr().out
    assert bs.__version__ in text
    assert torch.__version__ in text


# ---- other transforms of torch -------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference"])
def test_forward_mode_is_refused(backend):
    """Never a silent loss of a tangent."""
    small = make_small("cpu")

    def attention(q):
        return bs.attention_forward(q, small.k, small.v, small.scores, **OPTIONS, backend=backend)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(attention, (small.q,), (small.q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(small.q, small.q)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            attention(dual)
        attention(small.q)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            bs.sparsek(torch.autograd.forward_ad.make_dual(small.scores, small.scores), 3)


def test_func_grad_is_refused():
    small = make_small("cpu")

    def loss(q):
        out = bs.attention_forward(
            q, small.k, small.v, small.scores, **OPTIONS, backend="reference"
        )
        return out.sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(loss)(small.q)


def test_checkpointing():
    small = make_small("cpu")

    def attention(q):
        return bs.attention_forward(
            q, small.k, small.v, small.scores, **OPTIONS, backend="reference"
        )

    plain = small.q.clone().requires_grad_()
    attention(plain).square().sum().backward()
    recomputed = small.q.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(attention, recomputed, use_reentrant=False)
    out.square().sum().backward()
    assert torch.equal(recomputed.grad, plain.grad)
