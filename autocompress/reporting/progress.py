"""Progress on stderr: bars on a terminal, one line per finished stage anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Stages"]


class Stages:
    """A context manager that is called with (stage, done, total), as the verbs report it.

    On a terminal every stage is a line with a bar and its seconds; elsewhere a line is printed when a stage is done.
    """

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._bars: dict[str, Any] = {}
        self._told: set[str] = set()
        self._progress: Any = None

    def __enter__(self) -> Stages:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        began = self._began.setdefault(stage, time.perf_counter())
        if self._progress is not None:
            if stage not in self._bars:
                self._bars[stage] = self._progress.add_task(stage, total=total)
            self._progress.update(self._bars[stage], completed=done, total=total)
        elif done >= total and stage not in self._told:
            self._told.add(stage)
            print(f"{stage}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
