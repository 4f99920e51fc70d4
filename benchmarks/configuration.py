"""What one benchmark run measures: shapes, selection, dtype, device, and the tier configuration."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Configuration:
    """One forward: q [batch, heads, seq_len_q, head_dim], k and v [batch, kv_heads, seq_len, head_dim]."""

    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    seq_len_q: int
    head_dim: int
    num_selected: int
    window: int
    chunk_size: int
    num_candidates: int | None
    gate: str
    dtype: str
    device: str

    def __post_init__(self):
        if self.heads % self.kv_heads != 0:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if not 1 <= self.seq_len_q <= self.seq_len:
            raise ValueError(f"seq_len_q must lie in 1 ... seq_len, got {self.seq_len_q}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def us_per_head(self, us_per_iter: float) -> float:
        """Microseconds per (batch, head) pair: one iteration's time over B * H."""
        return us_per_iter / (self.batch * self.heads)

    def selection(self) -> dict:
        """The keyword arguments that choose the selection in blackwell_sparsek."""
        return {
            "num_selected": self.num_selected,
            "window": self.window,
            "chunk_size": self.chunk_size,
            "num_candidates": self.num_candidates,
        }

    def is_tier_configuration(self) -> bool:
        """Whether the tiers are defined for this configuration: it is TIER, on a GPU."""
        return self.is_cuda and replace(self, device=TIER.device) == TIER

    def describe(self, without: tuple[str, ...] = ()) -> str:
        """One line; `without` leaves fields out, e.g. the one that a sweep varies."""
        parts = {
            "batch": f"B={self.batch}",
            "heads": f"H={self.heads}",
            "seq_len": f"S={self.seq_len}",
            "head_dim": f"D={self.head_dim}",
            "dtype": self.dtype,
            "num_selected": f"k={self.num_selected}",
            "window": f"w={self.window}",
            "chunk_size": f"C={self.chunk_size}",
            "num_candidates": f"M={'4k' if self.num_candidates is None else self.num_candidates}",
            "gate": f"gate={self.gate}",
        }
        if self.heads != self.kv_heads:
            parts["heads"] = f"Hq={self.heads} Hkv={self.kv_heads}"
        if self.seq_len_q != self.seq_len:
            parts["seq_len"] += f" Sq={self.seq_len_q}"
        return " ".join(text for name, text in parts.items() if name not in without)

    def to_dict(self) -> dict:
        return asdict(self)


# The configuration that the tiers are judged at.
TIER = Configuration(
    batch=16,
    heads=96,
    kv_heads=96,
    seq_len=4096,
    seq_len_q=4096,
    head_dim=128,
    num_selected=256,
    window=128,
    chunk_size=128,
    num_candidates=None,
    gate="softmax",
    dtype="float16",
    device="cuda",
)

# Without a GPU: small enough for a laptop, long enough that attention dominates.
CPU_DEFAULT = replace(TIER, batch=1, heads=8, kv_heads=8, dtype="float32", device="cpu")
CPU_DTYPES = ("float32", "bfloat16")

_FIELDS_WITH_A_FLAG = (
    "batch",
    "heads",
    "seq_len",
    "head_dim",
    "num_selected",
    "window",
    "chunk_size",
    "num_candidates",
    "gate",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every number of a configuration."""
    shape = parser.add_argument_group("configuration (defaults: this machine's, see above)")
    shape.add_argument("--batch", type=int)
    shape.add_argument("--heads", type=int, help="query heads")
    shape.add_argument("--kv-heads", type=int, help="KV heads (default: as many as query heads)")
    shape.add_argument("--seq-len", type=int, help="keys per sequence")
    shape.add_argument("--seq-len-q", type=int, help="queries, the last ones (default: all)")
    shape.add_argument("--head-dim", type=int)
    shape.add_argument("--num-selected", type=int, help="k")
    shape.add_argument("--window", type=int, help="w")
    shape.add_argument("--chunk-size", type=int, help="C")
    shape.add_argument("--num-candidates", type=int, help="M (default: 4k)")
    shape.add_argument("--gate", choices=("none", "value", "softmax"))
    shape.add_argument("--dtype", choices=tuple(DTYPES), nargs="+")
    shape.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def from_arguments(
    arguments: argparse.Namespace,
    *,
    has_gpu: bool,
    gpu_default: Configuration,
    cpu_default: Configuration,
    cpu_dtypes: tuple[str, ...],
) -> list[Configuration]:
    """The device's default with the flags applied, one configuration per dtype."""
    device = arguments.device or ("cuda" if has_gpu else "cpu")
    is_cuda = device.startswith("cuda")
    base = gpu_default if is_cuda else cpu_default
    dtypes = arguments.dtype or ((base.dtype,) if is_cuda else cpu_dtypes)
    given = {
        name: getattr(arguments, name)
        for name in _FIELDS_WITH_A_FLAG
        if getattr(arguments, name) is not None
    }
    heads = given.get("heads", base.heads)
    given["kv_heads"] = arguments.kv_heads if arguments.kv_heads is not None else heads
    given["seq_len_q"] = arguments.seq_len_q or given.get("seq_len", base.seq_len)
    return [replace(base, device=device, dtype=dtype, **given) for dtype in dtypes]


@dataclass(frozen=True)
class Inputs:
    """Random tensors of one configuration; scores take the place of a trained scorer's."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor


def make_inputs(configuration: Configuration, seed: int) -> Inputs:
    """Standard-normal q, k, v in the configuration's dtype and standard-normal float32 scores."""
    c = configuration
    generator = torch.Generator(device=c.device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=c.device, dtype=dtype)

    return Inputs(
        q=normal(c.batch, c.heads, c.seq_len_q, c.head_dim, dtype=c.torch_dtype),
        k=normal(c.batch, c.kv_heads, c.seq_len, c.head_dim, dtype=c.torch_dtype),
        v=normal(c.batch, c.kv_heads, c.seq_len, c.head_dim, dtype=c.torch_dtype),
        scores=normal(c.batch, c.kv_heads, c.seq_len, dtype=torch.float32),
    )
