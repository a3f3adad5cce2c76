"""Two transformers against their budgets: a sentence encoder (Spearman on STS-B dev) and a small Llama (perplexity).

    python experiments/transformers_runs.py                                      # every row, hours on two cores
    python experiments/transformers_runs.py --task stories260k --ratios 6
    python experiments/transformers_runs.py --task minilm_stsb --ratios 8 --strategies exact

Strategies: uniform, greedy and exact are planned on the relative errors alone, not measured, applied with statistics
correction and saved; `exact+sequential` is the plan of `exact`, compressed anew layer by layer, each on what the
compressed ones before it produce, within the same bytes (`apply_sequentially`). auto is `compress` at the effort given,
with all that this measures, searches and tunes. All rows of a task and seed share one profile of --options. Each row
is a process of its own: `cpu_seconds` is what it and its workers took of processors, `peak_mb` the largest resident set
of one of its processes; `profiled` says whether the profile is in them. `metric` is of the network read back from the
file: 100 times the rank correlation on the 1,500 dev pairs, or minus the perplexity on stories 40 to 118; no choice
looks at it. `distance`: of the outputs from the dense model's on the windows that the Hessians never saw, by which
variants may be compared. Rows that are there stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, done_keys, environment, keep_row

KEYS = ("task", "options", "ratio", "strategy", "effort", "seed")
RATIOS = {"minilm_stsb": "8,12,16", "stories260k": "6,8,4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="")
    parser.add_argument("--ratios", default="")
    parser.add_argument("--strategies", default="exact,uniform,greedy,auto")
    parser.add_argument("--options", default="lean")
    parser.add_argument("--effort", default="fast", help="of auto; fast is one exact solve with the never-worse rule")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--out", default=str(ROOT / "runs" / "transformers"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        task, ratio, strategy, seed = arguments.row.split(":")
        print(json.dumps(row_of(task, ratio, strategy, seed, arguments)))
        return
    path = RESULTS / "transformers_runs.csv"
    known = done_keys(path, KEYS)
    for task in [arguments.task] if arguments.task else list(RATIOS):
        for seed in arguments.seeds.split(","):
            for ratio in (arguments.ratios or RATIOS[task]).split(","):
                for strategy in arguments.strategies.split(","):
                    effort = arguments.effort if strategy == "auto" else ""
                    key = (task, arguments.options, ratio, strategy, effort, seed)
                    if key not in known:
                        keep_row(path, measured(key, sys.argv[1:]), KEYS)


def measured(key: tuple[str, ...], given: list[str]) -> dict[str, Any]:
    """One row in a process of its own, with what that took."""
    task, _, ratio, strategy, _, seed = key
    command = [sys.executable, __file__, *given, "--row", f"{task}:{ratio}:{strategy}:{seed}"]
    began = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    row = {
        **dict(zip(KEYS, key, strict=True)),
        **json.loads(said),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1000),
        **environment(),
    }
    print(task, f"{ratio}x", strategy, row["bytes"], "bytes,", row["metric"], "of", row["dense_metric"], flush=True)
    return row


def row_of(task_name: str, ratio: str, strategy: str, seed: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import autocompress as ac
    from autocompress.applying import encoded_of
    from autocompress.batches import materialise
    from autocompress.pipeline import compress, profiled
    from autocompress.profiling import load_profile
    from autocompress.sequential import apply_sequentially

    task = ac.load_task(ROOT / "experiments" / "tasks" / f"{task_name}.py")
    folder = Path(arguments.out) / task_name / f"seed{seed}"
    store = folder / arguments.options / "profile"
    model, data = task.build_model(), materialise(task.calibration_batches(int(seed)))
    assert task.evaluate is not None
    dense = dense_metric(folder / "dense.json", task, model)
    fresh = not (store / "done").exists()
    budget, out = f"{ratio}x", folder / arguments.options / f"{ratio}x-{strategy}"
    context = ac.Context(model, data, seed=int(seed), embedding=task.embedding)
    extra: dict[str, Any] = {}
    if strategy == "auto":
        result = compress(
            model,
            data,
            budget,
            task.evaluate,
            effort=arguments.effort,
            seed=int(seed),
            out=out,
            store=store,
            options=[arguments.options],
            workers=arguments.workers,
            embedding=task.embedding,
        )
        metric, plan, distance = result.metrics["metric"], result.plan, result.metrics["measured"]["kl"]
        extra = {"chosen": plan.strategy, "notes": " | ".join(plan.notes)}
    else:
        found = (
            profiled(model, data, int(seed), store, [arguments.options], arguments.workers)
            if fresh
            else load_profile(store)
        )
        name, _, mode = strategy.partition("+")
        chosen = ac.plan(found, budget, name)
        if mode == "sequential":
            small = apply_sequentially(model, chosen, found, data, seed=int(seed))
        else:
            small = ac.apply(model, chosen, found, data, seed=int(seed))
        plan = encoded_of(small).plan
        out.mkdir(parents=True, exist_ok=True)
        ac.save(small, plan, out / "model.acz")
        (out / "plan.json").write_text(plan.to_json())
        restored = ac.load(out / "model.acz", copy.deepcopy(model))
        metric, distance = task.evaluate(restored), context.divergence_of(restored)
    (store / "done").touch()
    return {
        "budget_bytes": plan.budget_bytes,
        "bytes": (out / "model.acz").stat().st_size,
        "metric": f"{metric:.4f}",
        "dense_metric": f"{dense:.4f}",
        "distance": f"{distance:.6f}",
        "gap": f"{plan.gap:.6f}",
        **extra,
        "profiled": int(fresh),
    }


def dense_metric(path: Path, task: Any, model: Any) -> float:
    """What evaluate says of the dense model, computed once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task.evaluate(model)))
    return float(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
