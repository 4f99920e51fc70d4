"""Times packed sequences of different lengths against an even batch of as many tokens, and checks them.

    python benchmarks/bench_varlen.py                         64 sequences of 100 to 16 000 tokens, Hq=32 Hkv=8 (GPU)
    python benchmarks/bench_varlen.py --sequences 8 --longest 1000 --heads 4 --kv-heads 2 --device cpu

Both sides run select and attend. The lengths are spread evenly on a logarithmic scale and shuffled.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import machine as machine_info
import report
import timing
import torch
from configuration import DTYPES

_RESULTS = Path(__file__).parent / "results"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=100)
    parser.add_argument("--longest", type=int, default=16_000)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--iters", type=int, default=timing.MIN_SUSTAINED_LAUNCHES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=_RESULTS / "varlen.json", help="JSON file")
    return parser.parse_args(argv)


def sequence_lengths(a: argparse.Namespace, generator: torch.Generator) -> list[int]:
    steps = max(a.sequences - 1, 1)
    ratio = math.log(a.longest / a.shortest)
    lengths = [round(a.shortest * math.exp(ratio * i / steps)) for i in range(a.sequences)]
    return [lengths[i] for i in torch.randperm(a.sequences, generator=generator).tolist()]


def main(argv: list[str] | None = None) -> dict:
    from blackwell_sparsek import attention_forward, attention_varlen_forward

    a = parse_arguments(argv)
    generator = torch.Generator().manual_seed(a.seed)
    lengths = sequence_lengths(a, generator)
    total = sum(lengths)
    even = total // a.sequences
    dtype, device = DTYPES[a.dtype], torch.device(a.device)

    def tensors(*leading: int):
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=torch.float32)

        q = normal(*leading, a.heads, a.head_dim).to(dtype)
        k, v = (normal(*leading, a.kv_heads, a.head_dim).to(dtype) for _ in range(2))
        return q, k, v, normal(*leading, a.kv_heads)

    torch.manual_seed(a.seed)
    packed = tensors(total)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    # [B, S, H, D] in memory, as a model's projections give it.
    batch = [t.transpose(1, 2) for t in tensors(a.sequences, even)]

    with torch.inference_mode():
        out, lse = attention_varlen_forward(*packed, starts, starts, return_lse=True)
        differing = 0
        for b, length in enumerate(lengths):
            rows = slice(int(starts[b]), int(starts[b]) + length)
            one = [t[rows].transpose(0, 1)[None] for t in packed]
            expected, expected_lse = attention_forward(*one, return_lse=True)
            same = torch.equal(out[rows].transpose(0, 1), expected[0])
            error = (out[rows].transpose(0, 1).float() - expected[0].float()).abs()
            lse_error = (lse[rows].T - expected_lse[0]).abs()
            # A rounding of |out| <= 4 each; NaN is no agreement.
            if not (error.max() <= 8e-3 and lse_error.max() <= 1e-4):
                wrong = (~(error <= 8e-3)).any(-1) | ~(lse_error <= 1e-4)
                raise SystemExit(
                    f"sequence {b} of {length} tokens differs from its own call: out by {error.max():.3g}, "
                    f"lse by {lse_error.max():.3g}; {int(wrong.sum())} of {wrong.numel()} rows of a head, "
                    f"first (head, position) {wrong.nonzero()[0].tolist()}"
                )
            differing += not same
        calls = {
            "packed": lambda: attention_varlen_forward(*packed, starts, starts),
            "even batch": lambda: attention_forward(*batch),
        }
        if device.type == "cuda":
            timings = timing.time_cuda(calls, iters=a.iters)
        else:
            timings = timing.time_cpu(calls, iters=3)

    tokens = {"packed": total, "even batch": a.sequences * even}
    machine = machine_info.describe(a.device)
    print(machine_info.headline(machine))
    print(
        f"{a.sequences} sequences of {min(lengths)} to {max(lengths)} tokens, {total} in all; "
        f"Hq={a.heads} Hkv={a.kv_heads} D={a.head_dim} {a.dtype}"
    )
    document = {"machine": machine, "arguments": {**vars(a), "output": None}, "rows": []}
    for name, result in timings.items():
        ns = result.us_per_iter * 1e3 / tokens[name] / a.heads
        document["rows"].append(
            {"name": name, "tokens": tokens[name], "ns_per_token_head": ns, **result.to_dict()}
        )
        print(f"  {name:11} {result.us_per_iter:10.1f} us   {ns:8.4f} ns per token and query head")
    speed = [row["ns_per_token_head"] for row in document["rows"]]
    document["speed_of_even_batch"] = speed[1] / speed[0]
    document["sequences_equal_bit_for_bit"] = a.sequences - differing
    print(f"  per token, the packed batch has {speed[1] / speed[0]:.3f} of the even batch's speed")
    print(f"  equal to its own call bit for bit: {a.sequences - differing} of {a.sequences}")
    report.write_json(a.output, document)
    return document


if __name__ == "__main__":
    main()
