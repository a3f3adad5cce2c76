"""Tasks inline and in processes: the same answers, and nothing that outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocompress.engines import EngineError, WorkerError, check_engine, run_tasks

# Workers import tasks by module and name; this file is one on their path because the test puts its folder there.


def matrix(seed: int, size: int) -> np.ndarray:
    X = np.random.default_rng(seed).standard_normal((size, 8 * size))
    print("a stray print must not end up among the answers")
    return np.linalg.inv(X @ X.T)


def process_id(_: int) -> int:
    return os.getpid()


def fail_at(index: int, bad: int) -> int:
    if index == bad:
        raise ValueError(f"index {index} is bad")
    return index


def die_at(index: int, bad: int, payload: bytes = b"") -> int:
    if index == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def unpicklable(index: int) -> Any:
    return (lambda: index) if index == 1 else index


def wait(path: str, index: int) -> int:
    """Say that this worker is alive, again and again, for a minute."""
    for _ in range(600):
        Path(path, f"{index}.{os.getpid()}").write_text(str(time.time()))
        time.sleep(0.1)
    return index


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))


def collect(function: Any, tasks: list[tuple[Any, ...]], workers: int, engine: str | None = None) -> list[Any]:
    found = dict(run_tasks(function, tasks, workers, engine))
    assert sorted(found) == list(range(len(tasks)))
    return [found[i] for i in range(len(tasks))]


def alive(pid: int) -> bool:
    """Whether a process is still running (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: set[int], seconds: float) -> bool:
    stop = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < stop:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_processes_give_the_same_bits_as_inline() -> None:
    tasks = [(seed, size) for seed, size in enumerate([3, 70, 12, 5, 33])]
    inline, processes = (collect(matrix, tasks, workers) for workers in (1, 3))
    assert [a.tobytes() for a in inline] == [b.tobytes() for b in processes]


def test_inline_runs_in_this_process_and_workers_in_others() -> None:
    tasks = [(i,) for i in range(4)]
    assert collect(process_id, tasks, 1) == [os.getpid()] * 4
    assert collect(process_id, tasks[:1], 4) == [os.getpid()]
    workers = set(collect(process_id, tasks, 2))
    assert os.getpid() not in workers
    assert len(workers) <= 2
    assert gone(workers, 1.0)
    assert collect(process_id, [], 2) == []


def test_engines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [(i,) for i in range(2)]
    assert [value for _, value in run_tasks(process_id, tasks, 2, "inline")] == [os.getpid()] * 2
    one = {value for _, value in run_tasks(process_id, tasks, 1, "processes")}
    assert len(one) == 1
    assert os.getpid() not in one
    with pytest.raises(EngineError, match="there is no engine 'dask'; there are inline, processes, ray"):
        collect(process_id, [], 1, "dask")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"needs Ray, which is not installed: pip install 'autocompress\[ray\]'"):
        check_engine("ray")


def test_a_task_that_raises_is_reported_with_its_traceback() -> None:
    tasks = [(i, 1) for i in range(4)]
    with pytest.raises(ValueError, match="index 1 is bad"):
        collect(fail_at, tasks, 1)
    with pytest.raises(WorkerError, match=r"(?s)task 1 failed in a worker: index 1 is bad\n.*in fail_at") as caught:
        collect(fail_at, tasks, 2)
    assert caught.value.exit_code == 1


def test_a_worker_that_is_killed_is_reported() -> None:
    with pytest.raises(
        WorkerError, match=r"task 0 failed .*ended unexpectedly \(exit status -9\); was it out of memory"
    ):
        collect(die_at, [(i, 0) for i in range(3)], 2)


def test_a_worker_that_dies_while_it_is_fed_is_replaced() -> None:
    """More bytes than a pipe holds: the rest of the task is still here when the worker is gone."""
    tasks: list[tuple[Any, ...]] = [(i, -1, bytes(1 << 22)) for i in range(6)]

    def murder() -> None:
        for child in children():
            os.kill(child, signal.SIGSTOP)  # it no longer reads, so the task stays half-written
        time.sleep(0.3)
        for child in children():
            os.kill(child, signal.SIGKILL)

    def children() -> set[int]:
        found = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
        return {int(pid) for pid in found}

    answers = run_tasks(die_at, tasks, 2)
    first = next(answers)
    before = children()
    murder()
    assert dict([first, *answers]) == {i: i for i in range(6)}
    assert gone(before, 1.0)


@pytest.mark.timeout(60)
class Made(Sequence[tuple[int]]):
    """Tasks that are made when they are asked for; `most` is how many were in the making at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: Any) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.05)
        self.now -= 1
        return (index,)


def test_one_task_at_a_time_is_in_the_making() -> None:
    tasks = Made()
    assert sorted(run_tasks(abs, tasks, 3, "processes")) == [(i, i) for i in range(6)]
    assert tasks.most == 1


def test_what_cannot_be_pickled_is_reported_and_not_waited_for() -> None:
    with pytest.raises(WorkerError, match=r"(?i)pickle"):
        collect(process_id, [(threading.Lock(),), (1,)], 2)
    with pytest.raises(WorkerError, match="task 1 failed in a worker"):
        collect(unpicklable, [(0,), (1,), (2,)], 2)


def test_leaving_early_ends_the_workers() -> None:
    answers = run_tasks(process_id, [(i,) for i in range(8)], 2)
    pid = next(answers)[1]
    answers.close()  # type: ignore[attr-defined]
    assert gone({pid}, 1.0)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Also: a script needs no `if __name__ == "__main__"`, although it starts processes at its top level."""
    script = tmp_path / "script.py"
    script.write_text(
        "from autocompress.engines import run_tasks\n"
        "import test_engines\n"
        f"list(run_tasks(test_engines.wait, [({str(tmp_path)!r}, i) for i in range(2)], 2))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        stop = time.monotonic() + 60
        while len(list(tmp_path.glob("[01].*"))) < 2 and time.monotonic() < stop and parent.poll() is None:
            time.sleep(0.05)
        workers = {int(path.suffix[1:]) for path in tmp_path.glob("[01].*")}
        assert len(workers) == 2
        assert all(map(alive, workers))
    finally:
        parent.kill()
        parent.wait()
    assert gone(workers, 3.0), "a worker outlived its parent"
    before = {path: path.read_text() for path in tmp_path.glob("[01].*")}
    time.sleep(0.3)
    assert {path: path.read_text() for path in before} == before
