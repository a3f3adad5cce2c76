"""Tasks on a cluster of two nodes, one of which is killed: nothing is lost, nothing finished is computed again."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import OPTIONS, small_profile

from autocompress import engines
from autocompress.calibration import calibrate
from autocompress.engines import WorkerError, run_tasks
from autocompress.profiling import profile

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

# Workers import tasks by module and name, from the folder that the fixture puts on their path.
HERE = Path(__file__).parent
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


def matrix(seed: int, size: int) -> np.ndarray:
    X = np.random.default_rng(seed).standard_normal((size, 8 * size))
    found = np.linalg.inv(X @ X.T)
    found += 0.0  # what cannot be written would raise here
    return found


def noted(folder: str, index: int, seconds: float, payload: np.ndarray) -> tuple[int, np.ndarray]:
    """Say that the task was begun, and on which node; the answer is too large to travel without the object store."""
    from uuid import uuid4

    node = ray.get_runtime_context().get_node_id()
    Path(folder, f"{index}.{node}.{uuid4().hex}").touch()
    time.sleep(seconds)
    return index, payload + index


def fail_at(index: int, bad: int) -> int:
    if index == bad:
        raise ValueError(f"index {index} is bad")
    return index


def die_at(index: int, bad: int) -> int:
    if index == bad:
        os._exit(1)
    return index


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a core each; the driver is on the first."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_worker_niceness", "0")  # of 15 by default: beside other tests its workers hardly run
        found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False}, connect=True)
        try:
            yield found
        finally:
            ray.shutdown()
            found.shutdown()


def test_the_cluster_gives_the_same_bits_as_inline(cluster: Any) -> None:
    tasks = [(seed, size) for seed, size in enumerate([3, 70, 12, 5, 33])]
    inline, there = (dict(run_tasks(matrix, tasks, 1, engine)) for engine in ("inline", "ray"))
    assert {i: a.tobytes() for i, a in inline.items()} == {i: b.tobytes() for i, b in there.items()}
    assert list(run_tasks(matrix, [], 1, "ray")) == []


def test_failures_of_tasks_and_of_workers_are_reported(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "RETRIES", 0)  # each takes a new worker, and so seconds
    with pytest.raises(WorkerError, match=r"(?s)task 1 failed in a worker: index 1 is bad\n.*in fail_at"):
        list(run_tasks(fail_at, [(i, 1) for i in range(3)], 1, "ray"))
    with pytest.raises(WorkerError, match=r"task 0 failed .*ended unexpectedly \(WorkerCrashedError\)"):
        list(run_tasks(die_at, [(0, 0)], 1, "ray"))


def die_once(folder: str, index: int) -> int:
    """The first that gets number 1 is killed."""
    import signal

    with contextlib.suppress(FileExistsError):
        if index == 1:
            Path(folder, "died").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    return index


def test_a_worker_that_is_killed_is_replaced(cluster: Any, tmp_path: Path) -> None:
    tasks = [(str(tmp_path), i) for i in range(3)]
    assert dict(run_tasks(die_once, tasks, 1, "ray")) == {i: i for i in range(3)}
    assert (tmp_path / "died").exists()


def test_a_node_of_other_versions_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = engines._must_agree()
    monkeypatch.setattr(engines, "_must_agree", lambda: {**here, "numba": "0.1"})
    with pytest.raises(WorkerError, match=rf"has numba {here['numba']} \(needed 0.1\); install the same on every node"):
        list(run_tasks(fail_at, [(0, 1)], 1, "ray"))


def test_a_node_is_killed_in_the_middle(cluster: Any, tmp_path: Path) -> None:
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    payload = np.arange(50_000.0)
    tasks = [(str(tmp_path), i, 0.3, payload) for i in range(10)]
    finished: dict[int, Any] = {}
    begun: dict[int, int] = {}
    for index, value in run_tasks(noted, tasks, 1, "ray"):
        finished[index] = value
        on_second = [p for p in tmp_path.iterdir() if p.name.split(".")[1] == second.node_id]
        if not begun and len(finished) >= 3 and any(int(p.name.split(".")[0]) in finished for p in on_second):
            cluster.remove_node(second, allow_graceful=False)
            begun = {i: len(list(tmp_path.glob(f"{i}.*"))) for i in finished}
    assert begun, "the node was never killed"
    assert sorted(finished) == list(range(10))
    for index, (echo, found) in finished.items():
        assert echo == index
        assert (found == payload + index).all()
    assert {i: len(list(tmp_path.glob(f"{i}.*"))) for i in begun} == begun == dict.fromkeys(begun, 1)
    assert sum(1 for _ in tmp_path.iterdir()) <= 12, "only what ran on the dead node is begun again"


def test_a_profile_on_the_cluster_is_the_same_store(cluster: Any, tmp_path: Path) -> None:
    model, data, expected = small_profile()
    stats = calibrate(model, data)
    found = profile(model, stats, tmp_path / "ray", OPTIONS, engine="ray")
    profile(model, stats, tmp_path / "inline", OPTIONS, engine="inline")
    assert found.fingerprint == expected.fingerprint
    assert contents(tmp_path / "ray") == contents(tmp_path / "inline")


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store but clock times."""
    files = [p for p in store.rglob("*") if p.is_file() and p.parent.name != "seconds"]
    return {str(p.relative_to(store)): p.read_bytes() for p in files}
