"""Where tasks run: `inline` in this process; `processes`, a few workers on this machine; `ray`, the nodes of a cluster.
The results are the same bits.

A worker is a fresh interpreter that reads pickled tasks from its standard input and answers on its standard output. It
never touches a file, never imports the caller's main module (so no `__main__` guard is needed, in scripts or
notebooks), runs BLAS on one thread, and exits as soon as its parent is gone. One that dies is replaced, once for a
task. On Ray the same pickled tasks go to the cluster's own workers, and what a node that dies had not handed over is
computed elsewhere. Whatever the engine, results come back to the one process that called, and only it writes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from autocompress.doctor import environment
from autocompress.errors import AutocompressError

__all__ = ["ENGINES", "EngineError", "WorkerError", "check_engine", "run_tasks"]

ENGINES = ("inline", "processes", "ray")
RETRIES = 3  # of a task on Ray whose worker or node dies: nodes that are lent come and go
ATTEMPTS = 2  # at a task whose worker dies under it: a second time is no accident
MUST_AGREE = ("autocompress", "python", "numpy", "scipy", "numba", "machine")  # on all nodes, for the bits to agree
log = logging.getLogger(__name__)


class WorkerError(AutocompressError):
    """A worker process died, or its task raised."""

    exit_code = 1


class EngineError(AutocompressError):
    """An engine that does not exist, or is not installed."""


def check_engine(engine: str | None) -> str | None:
    """The name, if it is one (None: chosen by the work). Raises EngineError; also for `ray` where it is missing."""
    if engine is not None and engine not in ENGINES:
        raise EngineError(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise EngineError("the engine 'ray' needs Ray, which is not installed: pip install 'autocompress[ray]'")
    return engine


def run_tasks(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], workers: int = 1, engine: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (index, function(*tasks[index])) as results come; `function` must be importable by its module and name.

    engine: one of `ENGINES`; None is `processes` where there are several workers and tasks, else `inline`, which runs
    everything in order. workers: how many tasks may run at a time; on Ray, that many processes are started here unless
    this process is connected to a cluster already, or RAY_ADDRESS names one, whose cores then are the limit. Raises
    WorkerError, with the task's own traceback, if a task fails in a worker, or its workers die one after another;
    EngineError as `check_engine`.
    """
    if check_engine(engine) is None:
        engine = "processes" if workers > 1 and len(tasks) > 1 else "inline"
    if engine == "inline" or not tasks:
        for index in range(len(tasks)):  # a task may be made when it is asked for, and is not to outlive its turn
            yield index, function(*tasks[index])
        return
    target = f"{function.__module__}:{function.__qualname__}"
    answers: Any = (_on_ray if engine == "ray" else _in_processes)(target, tasks, workers)
    try:
        for index, good, value in answers:
            if not good:
                raise WorkerError(f"task {index} failed in a worker: {value}")
            yield index, value
    finally:
        answers.close()


Answer = tuple[int, bool, Any]  # index, whether it is a result, the result or why there is none


def _in_processes(target: str, tasks: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Answer]:
    """One thread per worker feeds it one task at a time, from a shared counter, and waits for its answer."""
    todo = iter(range(len(tasks)))
    lock, sending = threading.Lock(), threading.Lock()  # a task and its pickle are large: one at a time is in memory
    started: list[subprocess.Popen[bytes]] = []
    closed = False
    done: queue.Queue[Answer] = queue.Queue()

    def fresh() -> subprocess.Popen[bytes] | None:
        """A new worker; none once nobody waits for answers."""
        with lock:
            if closed:
                return None
            started.append(_start())
            return started[-1]

    def serve() -> None:
        process, attempt = None, 0
        with lock:
            index = next(todo, None)
        while index is not None:
            try:
                process = process or fresh()
                if process is None:
                    return
                assert process.stdin is not None
                assert process.stdout is not None
                with sending:
                    _send(process.stdin, (target, tasks[index]))
                answer = _receive(process.stdout)
            except (EOFError, OSError, ValueError):
                if closed:
                    return
                attempt += 1
                why = (
                    f"a worker process ended unexpectedly (exit status {_exit_status(process)}); was it out of memory?"
                )
                if attempt == ATTEMPTS:
                    done.put((index, False, f"{why} Another one did so before it"))
                    return
                log.warning("task %d: %s It is tried again", index, why)
                process = None
                continue
            except Exception as error:  # what cannot be pickled; unreported, the wait would never end
                done.put((index, False, f"{type(error).__name__}: {error}"))
                return
            done.put((index, *answer))
            with lock:
                index, attempt = next(todo, None), 0

    for _ in range(min(workers, len(tasks))):
        threading.Thread(target=serve, daemon=True).start()
    try:
        for _ in range(len(tasks)):
            yield done.get()
    finally:
        with lock:
            closed = True
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # the rest of a task that a dead worker will never read
                        pipe.close()


def _on_ray(target: str, tasks: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Answer]:
    """Tasks as pickled bytes: what Ray unpickles itself are arrays that cannot be written, which kernels refuse.

    Twice as many are handed out as there are cores, so that a worker always has its next one, and the driver's memory
    is not filled with copies of all of them. Ray tries a task again, elsewhere, if its worker or node dies.
    """
    import ray

    own = not ray.is_initialized()
    if own:
        _start_ray(ray, workers)
    try:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_ray_task)
        here = _must_agree()
        todo = iter(range(len(tasks)))
        running: dict[Any, int] = {}
        while True:
            cores = max(1, int(ray.cluster_resources().get("CPU", 0)))  # nodes come and go
            for _ in range(2 * cores - len(running)):
                if (index := next(todo, None)) is None:
                    break
                running[remote.remote(pickle.dumps((target, tasks[index], here), pickle.HIGHEST_PROTOCOL))] = index
            if not running:
                return
            for ready in ray.wait(list(running), num_returns=1)[0]:
                index = running.pop(ready)
                try:
                    answer = pickle.loads(ray.get(ready))
                except ray.exceptions.RayError as error:
                    answer = False, f"a worker of the cluster ended unexpectedly ({type(error).__name__}): {error}"
                yield index, *answer
    finally:
        if own:
            ray.shutdown()


def _start_ray(ray: Any, workers: int) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start one of `workers` cores that ends with this process."""
    given: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody who profiles a network asked for a report home
        given |= {"address": "local", "num_cpus": workers, "include_dashboard": False}
    ray.init(**given)


def _ray_task(payload: bytes) -> bytes:
    """In a worker of the cluster: (whether it is a result, the result or why there is none), pickled."""
    target, arguments, there = pickle.loads(payload)
    if (here := _must_agree()) != there:
        other = ", ".join(f"{name} {here[name]} (needed {there[name]})" for name in here if here[name] != there[name])
        answer = (False, f"a node of the cluster has {other}; install the same on every node")
    else:
        answer = _answer(target, arguments)
    return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)


def _must_agree() -> dict[str, str]:
    found = environment()
    return {name: str(found[name]) for name in MUST_AGREE}


def _start() -> subprocess.Popen[bytes]:
    # One thread for every BLAS that a worker may load: two workers with two threads each only get in each other's way.
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([here, *(p for p in [os.environ.get("PYTHONPATH")] if p)])
    return subprocess.Popen(
        [sys.executable, "-m", "autocompress.engines", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **one, "PYTHONPATH": path},
    )


def _exit_status(process: subprocess.Popen[bytes] | None) -> int | None:
    """Its exit status, once its pipe is closed; None if it goes on without one."""
    try:
        return None if process is None else process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        return None


def _send(stream: BinaryIO | Any, value: Any) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    size = struct.unpack("<Q", head)[0]
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def _leave_with(parent: int) -> None:
    """Exit when the parent is gone: a worker whose parent was killed must not go on computing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(parent: int) -> None:
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on, and it ends its workers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not end up among the answers
    tasks = sys.stdin.buffer
    while True:
        try:
            target, arguments = _receive(tasks)
        except EOFError:
            return
        _send(answers, _answer(target, arguments))


def _answer(target: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """(True, what the task returns), or (False, its error with the traceback)."""
    module, _, name = target.partition(":")
    try:
        return True, getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:  # whatever a task raises is the caller's to report, and the worker goes on
        return False, f"{error}\n{traceback.format_exc()}"


if __name__ == "__main__":
    _work(int(sys.argv[1]))
