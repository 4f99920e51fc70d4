"""The progress bar that the benchmarks show in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress(console: Console, description: str, steps: int) -> Iterator[Callable[[], None]]:
    """A bar of `steps` steps, gone when it is done; yields what advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=steps)
        yield lambda: bar.advance(task)
