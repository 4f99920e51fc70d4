"""Text as bytes: files that lie on every machine with Python, or a file of yours."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 0.05
_FILE_END = b"\0"  # occurs in no text


class Corpus:
    """A training and a validation text, uint8 each.

    Attributes:
        description: where it comes from, and its size and digest, for the log.
    """

    def __init__(self, train: bytes, valid: bytes, source: str) -> None:
        self.train, self.valid = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, valid)
        )
        self.description = {
            "source": source,
            "train_bytes": len(train),
            "valid_bytes": len(valid),
            "sha256": hashlib.sha256(train + valid).hexdigest(),
        }

    def to(self, device: torch.device | str) -> Corpus:
        """Keeps the text on a device, so that cutting a batch does not wait for a copy. Returns itself."""
        self.train, self.valid = self.train.to(device), self.valid.to(device)
        return self

    def train_batch(self, step: int, seed: int, batch_size: int, seq_len: int) -> Tensor:
        """``[batch_size, seq_len + 1]`` from random places, a function of step and seed alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        last = self._last_start(self.train, "training", seq_len)
        starts = torch.randint(last + 1, (batch_size,), generator=generator)
        return _cut(self.train, starts, seq_len)

    def valid_batches(self, num_batches: int, batch_size: int, seq_len: int) -> Iterator[Tensor]:
        """Always the same places, evenly spread over the validation text."""
        last = self._last_start(self.valid, "validation", seq_len)
        starts = torch.linspace(0, last, num_batches * batch_size, dtype=torch.float64).long()
        for some in starts.split(batch_size):
            yield _cut(self.valid, some, seq_len)

    @staticmethod
    def _last_start(text: Tensor, name: str, seq_len: int) -> int:
        if len(text) <= seq_len:
            raise ValueError(
                f"text: expected more than seq_len = {seq_len} bytes of {name} text, got {len(text)}"
            )
        return len(text) - seq_len - 1


def _cut(text: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    offsets = torch.arange(seq_len + 1, device=text.device)
    return text[starts.to(text.device)[:, None] + offsets].long()


def load_file(path: Path, max_bytes: int) -> Corpus:
    """A text file; its end is held out for validation."""
    text = path.read_bytes()[:max_bytes]
    border = round(len(text) * (1 - VALIDATION_SHARE))
    return Corpus(text[:border], text[border:], path.name)


def load_python_sources(max_bytes: int) -> Corpus:
    """The standard library's Python files and, if they are not enough, those of installed packages.

    Whole files are held out for validation: the model never saw what it is asked to continue.
    """
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    parts: dict[bool, list[bytes]] = {False: [], True: []}  # by whether it is held out
    num_bytes = 0
    for path in _python_files(folders):
        if num_bytes >= max_bytes:
            break
        text = path.read_bytes()[: max_bytes - num_bytes]
        if not text or _FILE_END in text:
            continue
        num_bytes += len(text)
        parts[_is_held_out(text)].append(text + _FILE_END)
    return Corpus(
        b"".join(parts[False]), b"".join(parts[True]), "Python sources of the interpreter"
    )


def _python_files(folders: list[Path]) -> Iterator[Path]:
    """Folder by folder, in an order that mixes packages and is the same on each run."""
    seen: set[Path] = set()
    for folder in folders:
        paths = sorted(path for path in folder.rglob("*.py") if path.is_file())
        if folder is folders[0]:  # installed packages may lie below the standard library
            paths = [path for path in paths if "site-packages" not in path.parts]
        random.Random(0).shuffle(paths)
        for path in paths:
            if path not in seen:
                seen.add(path)
                yield path


def _is_held_out(text: bytes) -> bool:
    """By content: copies of a file, which packages vendor, all fall on the same side."""
    number = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
    return number < VALIDATION_SHARE * 2**32
