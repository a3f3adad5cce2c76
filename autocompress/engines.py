"""Where tasks run: `inline` in this process, or `processes`, a few workers on this machine. The results are the same
bits.

A worker is a fresh interpreter that reads pickled tasks from its standard input and answers on its standard output. It
never touches a file, never imports the caller's main module (so no `__main__` guard is needed, in scripts or
notebooks), runs BLAS on one thread, and exits as soon as its parent is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from autocompress.errors import AutocompressError

__all__ = ["WorkerError", "run_tasks"]


class WorkerError(AutocompressError):
    """A worker process died, or its task raised."""

    exit_code = 1


def run_tasks(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], workers: int = 1
) -> Iterator[tuple[int, Any]]:
    """Yield (index, function(*tasks[index])) as results come; `function` must be importable by its module and name.

    With one worker everything runs inline, in order. Raises WorkerError, with the task's own traceback, if a task fails
    in a worker.
    """
    if workers <= 1 or len(tasks) <= 1:
        for index, task in enumerate(tasks):
            yield index, function(*task)
        return
    target = f"{function.__module__}:{function.__qualname__}"
    processes = [_start() for _ in range(min(workers, len(tasks)))]
    answers: Any = _answers(processes, target, tasks)
    try:
        yield from answers
    finally:
        answers.close()
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # the rest of a task that a dead worker will never read
                        pipe.close()


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


def _answers(
    processes: list[subprocess.Popen[bytes]], target: str, tasks: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """Feed each worker one task at a time from a shared counter; one thread per worker waits for its answer."""
    import queue

    todo = iter(range(len(tasks)))
    lock = threading.Lock()
    done: queue.Queue[tuple[int, bool, Any]] = queue.Queue()

    def serve(process: subprocess.Popen[bytes]) -> None:
        while True:
            with lock:
                index = next(todo, None)
            if index is None:
                return
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                _send(process.stdin, (target, tasks[index]))
                good, value = _receive(process.stdout)
            except (OSError, EOFError, ValueError):
                why = (
                    f"a worker process ended unexpectedly (exit status {_exit_status(process)}); was it out of memory?"
                )
                done.put((index, False, why))
                return
            except Exception as error:  # what cannot be pickled; unreported, the wait would never end
                done.put((index, False, f"{type(error).__name__}: {error}"))
                return
            done.put((index, good, value))

    for process in processes:
        threading.Thread(target=serve, args=(process,), daemon=True).start()
    for _ in range(len(tasks)):
        index, good, value = done.get()
        if not good:
            raise WorkerError(f"task {index} failed in a worker: {value}")
        yield index, value


def _exit_status(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit status, once its pipe is closed; None if it goes on without one."""
    try:
        return process.wait(timeout=5.0)
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
    import traceback

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
        module, _, name = target.partition(":")
        try:
            answer = (True, getattr(importlib.import_module(module), name)(*arguments))
        except Exception as error:  # whatever a task raises is the parent's to report, and the worker goes on
            answer = (False, f"{error}\n{traceback.format_exc()}")
        _send(answers, answer)


if __name__ == "__main__":
    _work(int(sys.argv[1]))
