"""The embedded default, end to end: the digits task, compressed to a tenth of its size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from autocompress.calibration import CALIBRATION_VERSION
from autocompress.pipeline import Result, check_request, compress
from autocompress.profiling import code_versions
from autocompress.tasks import load_task
from autocompress.types import Budget

__all__ = ["run_demo"]


def run_demo(
    out: str | Path = "runs/demo",
    budget: Budget | str | int = "10x",
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Train the digits network (once, then it is cached) and compress it into `out`.

    The profile is kept in a folder that is named by the versions of the code that made it: seconds make it again.
    """
    say = progress or (lambda stage, done, total: None)
    wanted = check_request(budget)
    task = load_task("digits")
    versions = hashlib.sha256(json.dumps([CALIBRATION_VERSION, code_versions()], sort_keys=True).encode()).hexdigest()
    say("train", 0, 1)
    model = task.build_model()
    say("train", 1, 1)
    return compress(
        model,
        task.calibration_batches(seed),
        wanted,
        evaluate=task.evaluate,
        seed=seed,
        out=out,
        store=Path(out) / f"profile-{versions[:8]}",
        workers=workers,
        loss=task.loss,
        training=task.labelled_batches(seed),
        progress=progress,
        task="digits",
    )
