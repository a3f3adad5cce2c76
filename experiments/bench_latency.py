"""Is the table of times right? Plans of two networks, predicted by `timing` and run as they would be exported.

    AUTOCOMPRESS_DATA=... python experiments/bench_latency.py      # on an idle machine; about three minutes
    python experiments/bench_latency.py --only transformer         # one network, which needs no data
    python experiments/bench_latency.py --table                    # only print the results that are there

For each network and exporter a table is measured anew, `--repeats` times. The plans are not those of a budget but such
as find a wrong table out: every layer in one form, and forms drawn at random for each layer. A plan's milliseconds
(`run_ms`) are those of one sample on one thread, in processor time and in turns with the dense model, whose time both
sides share: what is compared is what the plan changes, not how busy the machine was in between. `wall_ms` is the
fastest of 50 runs by the clock on the wall. `error` is predicted over run, less one; it counts as right within 15%.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_exports import network
from common import RESULTS, environment, keep_row

from autocompress.exporting import Held, Onnx
from autocompress.timing import DENSE_FORM, Runtime, Timer, form_name, in_turns

KEYS = ("network", "exporter", "repeat", "plan")
CELLS = ("network", "exporter", "shape", "form")
EXPORTERS = {"onnx": Onnx(), "onnx --matmul-nbits": Onnx(matmul_nbits=True)}
WIDTHS = {"dense": (32, "none"), "fp16": (16, "none"), "w4": (4, "row"), "w8": (8, "row")}
WIDTHS |= {"4-bit rd": (4, "tensor"), "8-bit rd": (8, "tensor")}
MIXED = 6


def plans(timer: Timer) -> dict[str, dict[str, Held]]:
    """Weights to be run by name of the plan: each form everywhere, and mixtures."""
    made = {label: {n: timer.held(n, *form) for n in timer.layers} for label, form in WIDTHS.items()}
    found = {f"all {label}": held for label, held in made.items()}
    generator, labels = np.random.default_rng(0), list(WIDTHS)
    for i in range(MIXED):
        picks = generator.integers(len(labels), size=len(timer.layers))
        found[f"mixed {i}"] = {n: made[labels[p]][n] for n, p in zip(timer.layers, picks, strict=True)}
    return found


def predicted(dense_ms: float, extra: Mapping[tuple[str, str], float], held: Mapping[str, Held]) -> float:
    """Milliseconds of a plan by the table."""
    return dense_ms + sum(extra[n, form_name(h)] for n, h in held.items() if form_name(h) != DENSE_FORM)


def fastest_ms(run: Callable[[], Any], runs: int = 50) -> float:
    """Milliseconds of the fastest run by the clock on the wall."""
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return 1e3 * min(times)


def measure(name: str, exporter: str, repeats: int, turns: int, out: Path) -> None:
    """Make the table and run the plans, and keep a row for each."""
    model, sample = network(name)
    timer = Timer(model, sample, Runtime(exporter=EXPORTERS[exporter], turns=turns))
    asked = plans(timer)
    forms: dict[str, dict[str, Held]] = {n: {} for n in timer.layers}
    for held in asked.values():
        for n, h in held.items():
            forms[n].setdefault(form_name(h), h)
    facts = environment()
    facts["versions"] += f" onnxruntime={version('onnxruntime')} onnx={version('onnx')}"
    facts["turns"], facts["load"] = str(turns), f"{os.getloadavg()[0]:.1f}"  # about one where nothing else runs
    shares: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as scratch:  # never the cache: every repetition measures its own table
            dense_ms, cells = timer.table(forms, Path(scratch))
        extra = {(n, cell.form): cell.extra_ms for cell in cells for n in cell.layers}
        for cell in cells:
            shares.setdefault((f"{len(cell.layers)} {cell.shape}", cell.form), []).append(cell.extra_ms)
        for plan, held in asked.items():
            runner = timer.runner(held)
            base, run = in_turns([timer.dense, runner], timer.runtime)
            run_ms, guess = dense_ms * run / base, predicted(dense_ms, extra, held)
            row = {"network": name, "exporter": exporter, "repeat": repeat, "plan": plan}
            row |= {"dense_ms": f"{dense_ms:.4f}", "run_ms": f"{run_ms:.4f}", "predicted_ms": f"{guess:.4f}"}
            row |= {"wall_ms": f"{fastest_ms(runner):.4f}"}
            row |= {"error": f"{guess / run_ms - 1:+.4f}"}
            sys.stdout.write(f"{name} {exporter} {repeat} {plan}: {run_ms:.3f} ms, {guess:.3f} predicted\n")
            sys.stdout.flush()
            keep_row(out, row | facts, KEYS)
    for (shape, form), times in shares.items():
        row = {"network": name, "exporter": exporter, "shape": shape, "form": form}
        row |= {"extra_us": f"{1e3 * statistics.median(times):.2f}"}
        row |= {"spread_us": f"{1e3 * (max(times) - min(times)):.2f}", "tables": len(times)}
        keep_row(out.with_name(f"{out.stem}_table.csv"), row | facts, CELLS)


def table(path: Path) -> str:
    """The results as Markdown: errors of each plan, then what each form adds."""

    def read(place: Path) -> list[dict[str, str]]:
        with place.open(newline="") as file:
            return list(csv.DictReader(file))

    lines = [
        "| network | exporter | plan | ms, run | by the wall | predicted | error, each table | within 15% |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in read(path):
        groups.setdefault((row["network"], row["exporter"], row["plan"]), []).append(row)
    for key, rows in groups.items():
        times = (statistics.median(float(r[k]) for r in rows) for k in ("run_ms", "wall_ms", "predicted_ms"))
        errors = [float(r["error"]) for r in rows]
        cells = [*key, *(f"{ms:.3f}" for ms in times), ", ".join(f"{100 * e:+.1f}%" for e in errors)]
        lines.append(f"| {' | '.join([*cells, 'yes' if max(map(abs, errors)) <= 0.15 else '**no**'])} |")
    lines += [
        "",
        "| network | exporter | layers and shape | form | µs more, each | spread |",
        "|---|---|---|---|---:|---:|",
    ]
    for row in read(path.with_name(f"{path.stem}_table.csv")):
        lines.append(f"| {' | '.join([*(row[k] for k in CELLS), row['extra_us'], row['spread_us']])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("resnet20", "transformer"))
    parser.add_argument("--exporter", choices=EXPORTERS, default="onnx")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=Runtime().turns, help="more where the machine is not idle")
    parser.add_argument("--table", action="store_true", help="only print the results that are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_latency.csv")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.table:
        for name in [asked.only] if asked.only else ["resnet20", "transformer"]:
            measure(name, asked.exporter, asked.repeats, asked.turns, asked.out)
    sys.stdout.write(table(asked.out))


if __name__ == "__main__":
    main()
