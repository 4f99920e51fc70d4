"""SparseK attention from Python: scores, selection, attention, and what it costs.

    python examples/01_forward.py [--device cuda] [--seq-len 4096]

Runs on the CPU or on a GPU. Compares with dense causal attention on the same tensors.
"""

from __future__ import annotations

import argparse
import time

import blackwell_sparsek as bs
import torch
from torch.nn.functional import scaled_dot_product_attention


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--num-kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    return parser.parse_args()


def milliseconds(function, device: str, repetitions: int = 5) -> float:
    """The fastest of a few runs."""
    best = float("inf")
    for _ in range(repetitions):
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 1e3 * best


def main() -> None:
    args = parse_arguments()
    bs.show_config()
    torch.manual_seed(0)
    dtype = torch.float16 if args.device == "cuda" else torch.float32

    def normal(num_heads: int) -> torch.Tensor:
        shape = (1, num_heads, args.seq_len, args.head_dim)
        return torch.randn(shape, dtype=dtype, device=args.device)

    q, k, v = normal(args.num_heads), normal(args.num_kv_heads), normal(args.num_kv_heads)
    # In a model these come from a small learned layer: one importance per token and KV head.
    scores = torch.randn(1, args.num_kv_heads, args.seq_len, device=args.device)

    # 1. Which keys does each query see? The last 128 (and its own chunk), and the best 256 of all before.
    selection = bs.select(scores, num_selected=256, window=128, chunk_size=128)
    alive = (selection.expiry == args.seq_len).sum(dim=-1)
    print(
        f"\nkeys that the last query sees, per KV head: {alive.flatten().tolist()} of {args.seq_len}"
    )

    # 2. Attention over them. Selecting anew inside the call gives the same result.
    out, lse = bs.attention_forward(q, k, v, scores, selection=selection, return_lse=True)
    assert torch.equal(out, bs.attention_forward(q, k, v, scores))
    print(f"out {list(out.shape)} {out.dtype}, lse {list(lse.shape)} {lse.dtype}")

    # 3. With every key selected it is dense causal attention.
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    everything = bs.attention_forward(q, k, v, scores, num_selected=args.seq_len)
    print(f"k = seq_len against SDPA: largest difference {(everything - dense).abs().max():.1e}")

    # 4. Without scores, key norms decide: nothing has to be trained.
    print(f"training-free: out {list(bs.attention_forward(q, k, v).shape)}")

    # 5. What it costs.
    capability = bs.capability(q.shape, k.shape, dtype=dtype, device=args.device)
    sparse_ms = milliseconds(lambda: bs.attention_forward(q, k, v, scores), args.device)
    dense_ms = milliseconds(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), args.device
    )
    print(f"SparseK {sparse_ms:.2f} ms ({capability.kernel}), SDPA {dense_ms:.2f} ms")


if __name__ == "__main__":
    main()
