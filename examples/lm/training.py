"""The training loop: schedule, annealing of the selection, evaluation, checkpoints."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from blackwell_sparsek import select
from torch import Tensor

from lm.data import Corpus
from lm.model import LanguageModel, ModelConfig, load_dense

NUM_POSITION_BUCKETS = 8


@dataclass
class TrainConfig:
    steps: int = 240
    batch_size: int = 2
    seq_len: int = 2048
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    anneal_steps: int = 0  # over which num_selected falls from seq_len to its target
    eval_every: int = 40
    eval_batches: int = 8
    dtype: str = "float32"  # bfloat16: autocast
    device: str = "cpu"
    compile: bool = False
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))

    def num_selected_at(self, step: int, target: int) -> int:
        """Falls from seq_len, where SparseK is dense attention, to the target by equal factors."""
        if step >= self.anneal_steps or target >= self.seq_len:
            return target
        share = step / self.anneal_steps
        return round(self.seq_len ** (1 - share) * max(1, target) ** share)


@dataclass
class Evaluation:
    loss: float  # nats per byte
    loss_late: float  # over the last quarter of the positions
    loss_by_position: list[float]  # buckets of equal size
    gate_support: (
        float | None
    )  # keys with a positive gate over num_selected; None where all are visible


@dataclass
class State:
    """All that a run needs to go on."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    step: int = 0
    seconds: float = 0.0  # of training; compilation and evaluations excluded
    compile_seconds: float = 0.0
    log: list[dict] = field(default_factory=list)


def make_state(model_config: ModelConfig, config: TrainConfig) -> State:
    model = LanguageModel(model_config, config.seed).to(config.device)
    model.set_seq_len(config.seq_len)
    return State(model, make_optimizer(model, config), config)


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone: not norms and embeddings, and not scorers, whose scale matters."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_exempt = parameter.dim() < 2 or "embedding" in name or ".scorer." in name
        (others if is_exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    is_cuda = config.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=is_cuda)


def train(
    state: State,
    corpus: Corpus,
    *,
    stop_at: int | None = None,
    report: Callable[[State], None] = lambda state: None,
    save_to: Path | None = None,
) -> None:
    """Trains up to ``config.steps``, or up to ``stop_at`` as an interruption would.

    ``report`` is called after each step; ``state.log`` has grown where the step was evaluated. Checkpoints are saved at each
    evaluation, at the end and on Ctrl-C or SIGTERM, which end the run after an evaluation.
    """
    config = state.config
    corpus.to(config.device)
    if not state.log:
        anneal(state)
        record(state, corpus, math.nan)
    forward = compiled(state, corpus) if config.compile else state.model
    losses: list[Tensor] = []
    last_step = config.steps if stop_at is None else min(stop_at, config.steps)
    with interruptible() as interrupted:
        clock = Clock(state)
        while state.step < last_step and not interrupted.is_set():
            anneal(state)
            losses.append(train_step(state, forward, corpus))
            state.step += 1
            clock.tick()
            is_last = state.step == config.steps or interrupted.is_set()
            if state.step % config.eval_every == 0 or is_last:
                with clock.stopped():
                    record(state, corpus, float(torch.stack(losses).mean()))
                    losses.clear()
                    if save_to is not None:
                        save_checkpoint(save_to, state, corpus)
            report(state)
    if save_to is not None:
        save_checkpoint(save_to, state, corpus)


class Clock:
    """Counts ``state.seconds``. It waits for the device only where it is stopped: a step does not end with a wait."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._start()

    def tick(self) -> None:
        self.state.seconds = time.perf_counter() - self.begin

    @contextlib.contextmanager
    def stopped(self):
        synchronize(self.state.config.device)
        self.tick()
        yield
        self._start()

    def _start(self) -> None:
        synchronize(self.state.config.device)
        self.begin = time.perf_counter() - self.state.seconds


def compiled(state: State, corpus: Corpus) -> Callable:
    """The model's forward with its blocks compiled, which was called once, so that no step has to wait for the compiler.

    The blocks are alike and share one compilation. Each num_selected compiles anew.
    """
    begin = time.perf_counter()
    blocks = [torch.compile(block, dynamic=False) for block in state.model.blocks]
    forward = partial(state.model, blocks=blocks)
    anneal(state)
    loss_of_batch(state, forward, corpus).backward()
    state.optimizer.zero_grad(set_to_none=True)
    synchronize(state.config.device)
    state.compile_seconds += time.perf_counter() - begin
    return forward


@contextlib.contextmanager
def interruptible():
    """Ctrl-C and SIGTERM set the event that this yields, so that a step is finished first; a second one ends at once."""
    event = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, _frame) -> None:
        event.set()
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def anneal(state: State) -> None:
    target = state.model.config.num_selected
    state.model.set_num_selected(state.config.num_selected_at(state.step, target))


def train_step(state: State, forward: Callable, corpus: Corpus) -> Tensor:
    for group in state.optimizer.param_groups:
        group["lr"] = state.config.learning_rate_at(state.step)
    loss = loss_of_batch(state, forward, corpus)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), state.config.clip_norm)
    state.optimizer.step()
    return loss.detach()


def loss_of_batch(state: State, forward: Callable, corpus: Corpus) -> Tensor:
    """Of the batch that belongs to the step."""
    config = state.config
    batch = corpus.train_batch(state.step, config.seed, config.batch_size, config.seq_len)
    return losses_of(forward, batch, config).mean()


def losses_of(forward: Callable, batch: Tensor, config: TrainConfig) -> Tensor:
    """Cross entropy of each position, ``[B, S]``."""
    with autocast(config):
        logits = forward(batch[:, :-1])
    targets = batch[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def autocast(config: TrainConfig) -> contextlib.AbstractContextManager:
    if config.dtype == "float32":
        return contextlib.nullcontext()
    device_type = torch.device(config.device).type
    return torch.autocast(device_type, dtype=getattr(torch, config.dtype))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# ---- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(state: State, corpus: Corpus) -> Evaluation:
    config = state.config
    batches = corpus.valid_batches(config.eval_batches, config.batch_size, config.seq_len)
    total = torch.zeros(config.seq_len, dtype=torch.float64)
    with GateSupport(state.model) as support:
        for batch in batches:
            losses = losses_of(state.model, batch, config)
            total += losses.double().mean(dim=0).cpu()
    by_position = total / config.eval_batches
    buckets = by_position.tensor_split(NUM_POSITION_BUCKETS)
    return Evaluation(
        loss=float(by_position.mean()),
        loss_late=float(by_position[-(config.seq_len // 4) :].mean()),
        loss_by_position=[float(bucket.mean()) for bucket in buckets],
        gate_support=support.mean_by_layer(),
    )


class GateSupport:
    """Observes, in each forward, how many keys of the last pool have a positive gate, as a multiple of num_selected.

    Far above 2, the scores of that layer have too small a spread.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.layers = model.sparse_layers()
        self.observed: list[list[float]] = [[] for _ in self.layers]

    def __enter__(self) -> GateSupport:
        self.hooks = [
            layer.scorer.register_forward_hook(partial(self._observe, index))
            for index, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *_exception) -> None:
        for hook in self.hooks:
            hook.remove()

    def mean_by_layer(self) -> list[float] | None:
        if not any(self.observed):
            return None
        return [sum(values) / len(values) for values in self.observed]

    def _observe(self, index: int, _scorer, _inputs, scores: Tensor) -> None:
        layer = self.layers[index]
        last_chunk = (scores.shape[2] - 1) // layer.chunk_size
        pool_size = last_chunk * layer.chunk_size - layer.window
        if not 0 < layer.num_selected < pool_size:
            return
        selection = select(
            scores,
            num_selected=layer.num_selected,
            window=layer.window,
            chunk_size=layer.chunk_size,
            num_candidates=layer.num_candidates,
        )
        is_open = scores[:, :, :pool_size] > selection.threshold[:, :, -1:]
        self.observed[index].append(float(is_open.sum(dim=-1).float().mean()) / layer.num_selected)


def record(state: State, corpus: Corpus, train_loss: float) -> None:
    """Evaluates and appends to the log."""
    config = state.config
    layers = state.model.sparse_layers()
    tokens = state.step * config.batch_size * config.seq_len
    state.log.append(
        {
            "step": state.step,
            "tokens": tokens,
            "seconds": state.seconds,
            "tokens_per_second": tokens / state.seconds if state.seconds else None,
            "train_loss": None if math.isnan(train_loss) else train_loss,
            "num_selected": layers[0].num_selected if layers else None,
            **asdict(evaluate(state, corpus)),
        }
    )


def peak_memory_mib(device: str) -> float:
    """The device's allocations at their peak; on the CPU the whole process, libraries and text included."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.no_grad()
def save_scores(path: Path, state: State, corpus: Corpus) -> None:
    """Writes what the scorers say about the first validation batch: ``scores``, float32 [layers, B, Hkv, S]."""
    config, layers = state.config, state.model.sparse_layers()
    batch = next(corpus.valid_batches(config.eval_batches, config.batch_size, config.seq_len))
    observed: list[Tensor] = []
    hooks = [
        layer.scorer.register_forward_hook(lambda _module, _inputs, out: observed.append(out))
        for layer in layers
    ]
    try:
        losses_of(state.model, batch, config)
    finally:
        for hook in hooks:
            hook.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"scores": torch.stack(observed).cpu(), "step": state.step}, path)


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: State, corpus: Corpus) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "model_config": asdict(state.model.config),
        "train_config": asdict(state.config),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "compile_seconds": state.compile_seconds,
        "log": state.log,
        "corpus": corpus.description,
    }
    # A run that is killed while it writes leaves the previous checkpoint whole.
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(checkpoint, unfinished)
    unfinished.replace(path)


def read_checkpoint(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def resume(checkpoint: dict, corpus: Corpus) -> State:
    """The state that was saved. Going on gives what the uninterrupted run would have given."""
    saved = checkpoint["corpus"]
    if corpus.description["sha256"] != saved["sha256"]:
        raise ValueError(
            f"text: expected the one of the checkpoint ({saved['source']}, {saved['train_bytes']} bytes for "
            f"training), got another ({corpus.description['source']}, {corpus.description['train_bytes']} bytes)"
        )
    config = TrainConfig(**checkpoint["train_config"])
    state = make_state(ModelConfig(**checkpoint["model_config"]), config)
    state.model.load_state_dict(checkpoint["model"])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.step, state.seconds = checkpoint["step"], checkpoint["seconds"]
    state.compile_seconds = checkpoint["compile_seconds"]
    state.log = checkpoint["log"]
    return state


def start_from_dense(checkpoint: dict, model_config: ModelConfig, config: TrainConfig) -> State:
    """A SparseK model with a dense model's weights: the same function while num_selected >= seq_len."""
    attention = checkpoint["model_config"]["attention"]
    if attention != "dense" or model_config.attention != "sparsek":
        raise ValueError(
            "--from-dense: expected a checkpoint with dense attention and --attention sparsek, got "
            f"{attention} and {model_config.attention}"
        )
    state = make_state(model_config, config)
    load_dense(state.model, checkpoint["model"])
    return state
