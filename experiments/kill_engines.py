"""A profile killed at random moments: a worker, or the process that drives it, on every engine.

    python experiments/kill_engines.py [--engines inline processes ray] [--moments 10]

Each trial profiles a task with two workers (inline: in one process) in a process of its own, sends SIGKILL to a worker
or to the driver at a random moment between the start of the profile and its usual end (another one, where there was
nothing to kill), runs the same command again, and compares with a profile that nobody disturbed: fingerprint, and every
byte of the store but clock times. `kept`: layers whose file was there after the kill; `again`: how many of those the
second run wrote once more. Rows go to results/kill_engines.csv; finished ones are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, done_keys, environment, keep_row

from autocompress.compressors import default_options
from autocompress.engines import ENGINES

OUT = RESULTS / "kill_engines.csv"
os.environ.setdefault("RAY_worker_niceness", "0")  # of 15 by default: on a busy machine its workers hardly run
KEYS = ("engine", "trial")
ATTEMPTS = 6
RUN = """
import sys
from autocompress import pipeline
from autocompress.tasks import load_task

def say(stage, done, total):
    print(stage, done, flush=True)

task, store, engine, options = sys.argv[1:]
found = load_task(task)
made = pipeline.profiled(found.build_model(), found.calibration_batches(0), 0, store, [options], 2, say, engine)
print("fingerprint", made.fingerprint, flush=True)
"""


@dataclass(frozen=True)
class Run:
    """One profile in a process of its own."""

    task: str
    store: Path
    engine: str
    options: str

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, self.task, str(self.store), self.engine, self.options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def finish(self) -> str:
        """The fingerprint."""
        process = self.start()
        output, _ = process.communicate()
        return _fingerprint(output, process.returncode)

    def layers(self) -> dict[str, tuple[int, int]]:
        """Inode and time of every layer's file: one that was written again has others."""
        found = {}
        for path in sorted((self.store / "layers").glob("*.npz")):
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
        return found

    def contents(self) -> dict[str, bytes]:
        """Every file of the store, but clock times and what a kill in the middle of writing left behind."""
        files = [p for p in self.store.rglob("*") if p.is_file() and p.parent.name != "seconds"]
        return {str(p.relative_to(self.store)): p.read_bytes() for p in files if p.suffix != ".part"}


@dataclass(frozen=True)
class Trial:
    """What became of a profile that was killed."""

    hit: bool
    survived: bool
    kept: int
    again: int
    fingerprint: str


def killed(run: Run, victim: str, moment: float, seed: int) -> Trial:
    """Kill the driver or a worker `moment` seconds after the profile began, and run the same again.

    hit: whether there was something to kill; survived: whether the killed run ended well by itself. A run whose worker
    dies should, one whose driver dies cannot; the second run then has nothing, or something, left to do.
    """
    process = run.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("profile"):
            break
    stop = time.monotonic() + moment
    while time.monotonic() < stop and process.poll() is None:
        time.sleep(0.005)
    family = descendants(process.pid)
    targets = [process.pid] if victim == "driver" else workers_among(family)
    hit = bool(targets) and process.poll() is None
    if hit:
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.Random(seed).choice(targets), signal.SIGKILL)
    output, _ = process.communicate()
    survived = process.returncode == 0
    if not survived and not gone(family, 180.0):
        raise RuntimeError(f"processes outlived their driver: {sorted(filter(alive, family))}")
    before = run.layers()
    found = run.finish()
    after = run.layers()
    if survived and _fingerprint(output, 0) != found:
        raise RuntimeError("the run that survived has another fingerprint than the one after it")
    return Trial(hit, survived, len(before), sum(after[name] != before[name] for name in before), found)


def _fingerprint(output: str, code: int) -> str:
    lines = [line for line in output.splitlines() if line.startswith("fingerprint ")]
    if code != 0 or len(lines) != 1:
        raise RuntimeError(f"a profile ended with exit status {code}: {output[-2000:]!r}")
    return lines[0].split()[1]


def descendants(pid: int) -> set[int]:
    """All processes below one, as the kernel lists them."""
    found: set[int] = set()
    todo = [pid]
    while todo:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{todo.pop()}/task").iterdir():
                children = {int(child) for child in (task / "children").read_text().split()}
                todo += children - found
                found |= children
    return found


def workers_among(pids: set[int]) -> list[int]:
    """Those that compute: our own workers, and Ray's that have a task (`ray::_ray_task`)."""
    found = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            if b"autocompress.engines" in line or line.startswith(b"ray::_ray_task"):
                found.append(pid)
    return found


def alive(pid: int) -> bool:
    """Whether a process is running (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: set[int], seconds: float) -> bool:
    stop = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < stop:
        time.sleep(0.05)
    return not any(map(alive, pids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--every", type=int, default=6, help="take each N-th default option only")
    given = parser.parse_args()
    options = ",".join(str(option) for option in default_options()[:: given.every])
    done = done_keys(OUT, KEYS)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Run(given.task, Path(folder) / "undisturbed", "inline", options)
        expected = undisturbed.finish()
        for engine in given.engines:
            todo = [t for t in range(given.moments) if (engine, str(t)) not in done]
            usual = _usual_seconds(Run(given.task, Path(folder) / f"usual-{engine}", engine, options)) if todo else 0.0
            for trial in todo:
                draw = random.Random(f"{engine} {trial}")
                victim = "driver" if engine == "inline" or trial % 2 == 0 else "worker"
                for attempt in range(ATTEMPTS):  # a moment at which nothing was left, or begun, to kill is drawn again
                    moment = draw.uniform(0.0, usual)
                    run = Run(given.task, Path(folder) / f"{engine}-{trial}-{attempt}", engine, options)
                    found = killed(run, victim, moment, trial)
                    if found.hit:
                        break
                row: dict[str, Any] = {
                    "engine": engine,
                    "trial": trial,
                    "victim": victim,
                    "moment": f"{moment / usual:.2f}",
                    "hit": found.hit,
                    "survived": found.survived,
                    "layers": len(run.layers()),
                    "kept": found.kept,
                    "again": found.again,
                    "same_fingerprint": found.fingerprint == expected,
                    "same_bytes": run.contents() == undisturbed.contents(),
                }
                print(*row.values(), flush=True)
                keep_row(OUT, row | environment(), KEYS)


def _usual_seconds(run: Run) -> float:
    """From the start of the profile to its last layer."""
    process = run.start()
    assert process.stdout is not None
    began = None
    for line in process.stdout:
        if line.startswith("profile"):
            last = time.monotonic()
            began = began or last
    process.wait()
    assert began is not None
    return last - began


if __name__ == "__main__":
    main()
