"""What every experiment shares: where results go, what they were measured on, rows that are kept as they come."""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocompress.files import atomic_path

__all__ = ["RESULTS", "ROOT", "done_keys", "environment", "keep_row"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"


def environment() -> dict[str, str]:
    """What a reader needs to compare figures: commit (a plus: the tree differs from it), processor, cores, versions."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    changed = git("status", "--porcelain", "--", "autocompress", "solvers")
    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "cpu": f"{names[0] if names else 'unknown'} x{cores}",
        "versions": " ".join(f"{p}={importlib.metadata.version(p)}" for p in ("torch", "numpy", "numba", "scipy")),
    }


def done_keys(path: Path, keys: Sequence[str]) -> set[tuple[str, ...]]:
    """The keys of the rows that a results file has already, so that an experiment goes on where it was stopped."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[k] for k in keys) for row in csv.DictReader(file)}


def keep_row(path: Path, row: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Add or replace one row (by its keys) and keep the file sorted by them. Processes may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the file itself is replaced, and a lock with it
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        _keep_row(path, row, keys)
    finally:
        os.close(folder)


def _keep_row(path: Path, row: Mapping[str, Any], keys: Sequence[str]) -> None:
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if any(r[k] != str(row[k]) for k in keys)]
    rows.append({k: str(v) for k, v in row.items()})

    def order(r: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple((0, float(r[k]), "") if r[k].replace(".", "", 1).isdigit() else (1, 0.0, r[k]) for k in keys)

    rows.sort(key=order)
    fields = list(dict.fromkeys(name for r in rows for name in r))
    with atomic_path(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
