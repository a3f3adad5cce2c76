"""Engines: rates of the work, estimates against runs, scaling on this machine, a schedule for 7B on many.

    python experiments/bench_engines.py rates       seconds per operation, layers the fit never saw, a worker's start
    python experiments/bench_engines.py estimates   predicted against measured, by network; predicted for 7B and 70B
    python experiments/bench_engines.py scaling     a profile inline, in two processes, on one Ray node, in turns
    python experiments/bench_engines.py schedule    a profile of 7B on 1, 8 and 64 workers, simulated

Rows go to results/engines_*.csv. Times are processor seconds wherever one process computes, so that a busy machine
changes them little; those of `scaling` are seconds on the clock, of which only ratios within a round mean something
where `load` is more than the engine's own. Runs that estimates are held against have one thread (OMP_NUM_THREADS=1):
threads that spin while they wait for each other count as processor time. estimates measures its rates just before, and
keeps none of them; schedule takes its own from engines_rates.csv, if it is there; calibration for shapes is on this
machine's cores. --every N takes each N-th default option only; --options names others for estimates.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from common import RESULTS, ROOT, environment, keep_row

from autocompress.compressors import default_options, named_options, profile_layer
from autocompress.engines import run_tasks
from autocompress.estimating import Network, bench_layer, estimate, llama, measured_rates, network_of
from autocompress.obs import EXACT_LIMIT
from autocompress.tasks import load_task
from autocompress.workloads import counts, schedule, seconds

TASKS = {
    "digits": "digits",
    "resnet20": "experiments/tasks/resnet20_cifar10.py",
    "resnet56": "experiments/tasks/resnet56_cifar10.py",
    "stories260k": "experiments/tasks/stories260k.py",
    "minilm": "experiments/tasks/minilm_stsb.py",
}
UNSEEN = (((1, 32, 288), EXACT_LIMIT), ((1, 64, 576), EXACT_LIMIT), ((1, 128, 1024), 0.0))
SHAPES = sorted((ROOT / "experiments" / "shapes").glob("*.json"))
# What a profile of its own process prints at its end: processor seconds of both stages, peak memory, bytes on disk.
MEASURED = """
import json, resource, sys, time
from pathlib import Path
from autocompress.calibration import calibrate
from autocompress.profiling import profile
from autocompress.tasks import load_task
task, store, options = sys.argv[1:]
found = load_task(task)
model, data = found.build_model(), found.calibration_batches(0)
marks = [time.process_time()]
stats = calibrate(model, data)
marks.append(time.process_time())
profile(model, stats, store, options.split(), engine="inline")
marks.append(time.process_time())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
size = sum(p.stat().st_size for p in Path(store).rglob("*") if p.is_file())
print(json.dumps([marks[1] - marks[0], marks[2] - marks[1], peak, size]))
"""


def rates(given: argparse.Namespace) -> None:
    found = measured_rates()
    for kind, rate in found.items():
        keep("rates", {"what": kind, "seconds": f"{rate:.4g}"}, ("what",))
    for shape, limit in UNSEEN:
        began = time.thread_time()
        profile_layer(bench_layer(shape, limit), default_options())
        spent = time.thread_time() - began
        predicted = seconds(counts(shape, default_options(), exact_limit=limit), found)
        name = f"layer {'x'.join(map(str, shape))}{'' if limit else ' shared'}"
        keep(
            "rates",
            {
                "what": name,
                "seconds": f"{spent:.4g}",
                "predicted": f"{predicted:.4g}",
                "ratio": f"{predicted / spent:.2f}",
            },
            ("what",),
        )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    problems = [(bench_layer((1, 2, 8), EXACT_LIMIT), default_options()[:3])] * 2
    list(run_tasks(profile_layer, problems, 2, "processes"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 2
    keep("rates", {"what": "start of a worker", "seconds": f"{spent:.4g}"}, ("what",))


def kept_rates() -> dict[str, float]:
    path = RESULTS / "engines_rates.csv"
    if not path.exists():
        return measured_rates()
    with path.open(newline="") as file:
        return {row["what"]: float(row["seconds"]) for row in csv.DictReader(file)}


def estimates(given: argparse.Namespace) -> None:
    found = measured_rates()
    options = [str(option) for option in named_options([given.options or "default"])[:: given.every]]
    for name in given.networks:
        task = load_task(TASKS[name])
        network = network_of(task.build_model(), task.calibration_batches(0))
        predicted = facts(network, found, options, 1)
        with tempfile.TemporaryDirectory() as store:
            command = [sys.executable, "-c", MEASURED, TASKS[name], store, " ".join(options)]
            alone = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=alone)
        measured = dict(
            zip(("calibrate", "profile", "memory", "disk"), json.loads(done.stdout.splitlines()[-1]), strict=True)
        )
        row = {
            "cpu_s": predicted["profile_s"] + predicted["calibrate_cpu_s"],
            "measured_cpu_s": measured["calibrate"] + measured["profile"],
            "calibrate_cpu_s": predicted["calibrate_cpu_s"],
            "measured_calibrate_cpu_s": measured["calibrate"],
            "memory_gib": predicted["memory_gib"],
            "measured_memory_gib": measured["memory"] / 2**30,
            "disk_gib": predicted["disk_gib"],
            "measured_disk_gib": measured["disk"] / 2**30,
        }
        ratios = {
            f"ratio_{kind}": row[kind] / row[f"measured_{kind}"]
            for kind in ("cpu_s", "calibrate_cpu_s", "memory_gib", "disk_gib")
        }
        keep(
            "estimates",
            {"network": name, "options": len(options), "workers": 1} | figures(row | ratios),
            ("network", "options", "workers"),
        )
    for path in SHAPES if given.shapes else ():
        for workers in (1, 8, 64):
            row = facts(llama(path), found, options, workers)
            head = {"network": path.stem, "options": len(options), "workers": workers}
            keep("estimates", head | figures(row), ("network", "options", "workers"))


def facts(network: Network, found: Mapping[str, float], options: list[str], workers: int) -> dict[str, float]:
    got = estimate(network, found, workers, options)
    facts = {
        "calibrate_s": got.calibrate_seconds,
        "calibrate_cpu_s": got.calibrate_cpu_seconds,
        "profile_s": got.profile_seconds,
        "memory_gib": got.memory_bytes / 2**30,
        "worker_gib": got.worker_bytes / 2**30,
        "disk_gib": got.disk_bytes / 2**30,
    }
    return facts | ({} if got.streaming_bytes is None else {"block_gib": got.streaming_bytes / 2**30})


def figures(row: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in row.items()}


def scaling(given: argparse.Namespace) -> None:
    from autocompress.calibration import calibrate
    from autocompress.profiling import profile

    os.environ.setdefault("RAY_worker_niceness", "0")  # of 15 by default: on a busy machine its workers hardly run
    options: list[Any] = default_options()[:: given.every]
    for name in given.networks:
        task = load_task(TASKS[name])
        model, data = task.build_model(), task.calibration_batches(0)
        stats = calibrate(model, data)
        ways = [("inline", 1), ("processes", 1), ("processes", 2), ("ray", 1), ("ray", 2)]
        times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
        prints = set()
        for turn in range(given.rounds):
            for engine, workers in ways:
                load = os.getloadavg()[0]
                began = time.perf_counter()
                prints.add(profile(model, stats, None, options, workers, engine=engine).fingerprint)
                spent = time.perf_counter() - began
                times[engine, workers].append(spent)
                head = {"network": name, "engine": engine, "workers": workers, "round": turn, "options": len(options)}
                row = {"seconds": f"{spent:.2f}", "of_inline": f"{spent / times['inline', 1][turn]:.3f}", "load": load}
                keep("scaling", head | row, tuple(head))
        print("fingerprints that differ:", len(prints) - 1)
        for way, spent_each in times.items():
            ratios = [a / b for a, b in zip(spent_each, times["inline", 1], strict=True)]
            print(*way, f"median of inline's time {statistics.median(ratios):.3f}")


def plan_schedule(given: argparse.Namespace) -> None:
    found = kept_rates()
    for path in SHAPES[-1:]:
        network = llama(path)
        sent = sum(8 * (u.weights + (0 if u.table else u.shape[0] * u.shape[2] ** 2)) for u in network.units)
        for workers in (1, 8, 64):
            got = estimate(network, found, workers)
            limits = {
                "all the work, over the workers": math.fsum(got.tasks) / workers,
                "the largest layer, which is one task": got.tasks[0],
                "one process sends every layer": sent / (given.gigabytes * 1e9),
            }
            hours = schedule(got.tasks, workers) / 3600
            row = {
                "network": path.stem,
                "workers": workers,
                "tasks": len(got.tasks),
                "hours": f"{hours:.3f}",
                "work_hours": f"{math.fsum(got.tasks) / 3600:.2f}",
                "largest_task_hours": f"{got.tasks[0] / 3600:.3f}",
                "efficiency": f"{math.fsum(got.tasks) / 3600 / workers / hours:.3f}",
                "sent_gb": f"{sent / 1e9:.1f}",
                "send_hours": f"{limits['one process sends every layer'] / 3600:.3f}",
                "calibrate_hours": f"{got.calibrate_seconds / 3600:.3f}",
                "worker_gib": f"{got.worker_bytes / 2**30:.2f}",
                "limited_by": max(limits, key=lambda name: limits[name]),
            }
            keep("schedule", row, ("network", "workers"))


def keep(table: str, row: dict[str, Any], keys: tuple[str, ...]) -> None:
    print(*row.values(), flush=True)
    keep_row(RESULTS / f"engines_{table}.csv", row | environment(), keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"rates": rates, "estimates": estimates, "scaling": scaling, "schedule": plan_schedule}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--networks", nargs="*", default=None, choices=[*TASKS], help="without a name: none of them")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--options", default="", help="of estimates: names or families, as of `autocompress profile`")
    parser.add_argument("--shapes", action=argparse.BooleanOptionalAction, default=True, help="7B and 70B too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="per second, that the calling process can send")
    given = parser.parse_args()
    if given.networks is None:
        given.networks = ["resnet56"] if given.part == "scaling" else list(TASKS)
    parts[given.part](given)


if __name__ == "__main__":
    main()
