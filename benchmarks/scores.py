"""Scores of a trained model as benchmark input, and how much a selection moves from tile to tile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from configuration import Configuration, Inputs

_TILE = 128  # queries of a tile, the unit in which the kernels work


def load_learned(path: Path, configuration: Configuration) -> torch.Tensor:
    """Scores [B, Hkv, S] from a file of `examples/02_train_lm.py --save-scores`.

    The file's layers and KV heads become heads and its batch rows batch rows, over and over until there are enough.

    Raises:
        ValueError: sequences in the file that are shorter than the configuration's.
    """
    scores = torch.load(path, weights_only=True)["scores"]  # [layers, batch, KV heads, S]
    if scores.shape[-1] < configuration.seq_len:
        raise ValueError(
            f"{path}: expected scores of at least {configuration.seq_len} positions, got {scores.shape[-1]}"
        )
    heads = scores.transpose(0, 1).flatten(1, 2)[..., : configuration.seq_len]
    b = torch.arange(configuration.batch) % heads.shape[0]
    h = torch.arange(configuration.kv_heads) % heads.shape[1]
    return heads[b[:, None], h[None, :]].to(configuration.device)


def with_learned(inputs: Inputs, path: Path, configuration: Configuration) -> Inputs:
    return replace(inputs, scores=load_learned(path, configuration))


def rows_entering(expiry: torch.Tensor, configuration: Configuration) -> dict[str, float]:
    """Of how many selected keys a tile of 128 queries is the first, over all heads and tiles.

    A key is selected from the query on at which it leaves the window, if it is still visible there. Once k keys are selected,
    as many leave as enter: it is the number of rows that a kernel exchanges per tile. Tiles in which the selection was not full
    at the start are left out.

    Args:
        expiry: int32 [B, Hkv, S], of `blackwell_sparsek.select`.

    Returns:
        mean, median and p90 of rows per tile, and mean_share of them in k; nan where no tile starts with a full selection.
    """
    c = configuration
    position = torch.arange(c.seq_len, device=expiry.device)
    # First query that sees the key no longer as one of the window.
    leaves_window = ((position + c.window) // c.chunk_size + 1) * c.chunk_size
    num_tiles = -(-c.seq_len // _TILE)
    enters = (expiry > leaves_window) & (leaves_window < c.seq_len)
    tile = (leaves_window // _TILE).clamp(max=num_tiles - 1).expand(expiry.shape)
    counts = torch.zeros(*expiry.shape[:-1], num_tiles, device=expiry.device)
    counts.scatter_add_(-1, tile, enters.float())
    first_full = -(-(c.num_selected + c.window + c.chunk_size) // _TILE)
    steady = counts[..., first_full:].flatten()
    if steady.numel() == 0 or c.num_selected == 0:
        return dict.fromkeys(("mean", "median", "p90", "mean_share"), float("nan"))
    ordered = steady.sort().values
    return {
        "mean": steady.mean().item(),
        "median": ordered[len(ordered) // 2].item(),
        "p90": ordered[int(0.9 * (len(ordered) - 1))].item(),
        "mean_share": steady.mean().item() / c.num_selected,
    }
