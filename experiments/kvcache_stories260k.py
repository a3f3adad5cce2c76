"""Cached bytes per token against perplexity: a Llama of 260,032 parameters whose keys and values are cached as latents.

    python experiments/kvcache_stories260k.py             # every row, three seeds: minutes on two cores
    python experiments/kvcache_stories260k.py --table     # the results as the table of docs/kvcache.md

Calibrated on stories 0 to 39, four fifths of them for statistics and one fifth, drawn by the seed, for `measured`, the
KL per token by which `auto` chooses; perplexity is that of stories 40 to 118, and nothing is chosen by it. `stepwise`,
where it is given, is the same perplexity with one token after the other from transformers' cache. Budgets are bytes per
token in float32 that a uniform rank meets without a rest, 4 of them for the position; the dense model caches 1,280.
Factors `weights` with ranks `progressive` are LoRC's. Rows that are there stay.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from common import RESULTS, ROOT, done_keys, environment, keep_row

from autocompress.hf import perplexity
from autocompress.kvcache import CacheProfile, profile_cache
from autocompress.tasks import load_task

KEYS = ("budget", "heads", "factors", "allocation", "seed")
BUDGETS = tuple(4 + 160 * k for k in range(7, 0, -1))
RULES = ("uniform", "progressive", "outputs", "exact")
METHODS = [
    *(("joint", factors, rule) for factors in ("weights", "inputs", "loss") for rule in RULES),
    ("joint", "loss", "refined"),
    ("joint", "loss", "auto"),
    *(("each", factors, rule) for factors in ("weights", "loss") for rule in ("uniform", "progressive", "exact")),
]
STEPWISE = {("joint", "weights", "progressive", 644), ("joint", "loss", "auto", 644), ("joint", "loss", "auto", 324)}
NAMES = {"weights": "weights, as LoRC", "inputs": "inputs", "loss": "predicted KL"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / "kvcache_stories260k.csv"
    if arguments.table:
        with path.open(newline="") as file:
            print("\n".join(tables(list(csv.DictReader(file)))))
        return
    task = load_task(ROOT / "experiments" / "tasks" / "stories260k.py")
    stories = sys.modules["language"].stories()[40:]
    known = done_keys(path, KEYS)
    for seed in arguments.seeds.split(","):
        profile: CacheProfile | None = None
        for method in [("", "dense", ""), *METHODS]:
            for budget in BUDGETS if method[0] else (1280,):
                key = (str(budget), *method, seed)
                seeded = method[1] in ("inputs", "loss") or method[2] in ("outputs", "exact")
                if key in known or (seed != "0" and not seeded):
                    continue
                profile = profile or profile_cache(task.build_model(), task.calibration_batches(0), int(seed))
                row = row_of(profile, budget, method, stories, stepwise=seed == "0")
                keep_row(path, {**dict(zip(KEYS, key, strict=True)), **row, **environment()}, KEYS)
                print(*key, row["bytes"], row["perplexity"], row["stepwise"], flush=True)


def row_of(
    profile: CacheProfile, budget: int, method: tuple[str, str, str], stories: Sequence[torch.Tensor], stepwise: bool
) -> dict[str, Any]:
    heads, factors, allocation = method
    if not heads:
        model: Any = profile.context.model
        facts: dict[str, Any] = {"bytes": 1280, "bytes_fp16": 640}
    else:
        made = profile.compress(budget, allocation, factors, heads)
        model, plan = made.model, made.plan
        facts = {
            "bytes": plan.bytes_per_token,
            "bytes_fp16": plan.bytes_in(torch.float16),
            "predicted": f"{plan.loss:.5f}",
            "gap": f"{plan.gap:.4f}",
            "measured": f"{plan.measured:.5f}",
            "chosen": plan.allocation,
            "ranks": " ".join("+".join(map(str, ranks)) for ranks in plan.ranks.values()),
        }
    again = stepwise and (not heads or (*method, budget) in STEPWISE)
    found = {"perplexity": f"{perplexity(model, stories):.4f}"}
    return {**facts, **found, "stepwise": f"{stepwise_perplexity(model, stories):.4f}" if again else ""}


def stepwise_perplexity(model: Any, stories: Sequence[torch.Tensor]) -> float:
    """`perplexity`, every token's scores from a cache of those before it; stories end in padding that no token sees."""
    from transformers import DynamicCache

    ids = torch.nn.utils.rnn.pad_sequence(list(stories), batch_first=True, padding_value=-100)
    cache, total = DynamicCache(), 0.0
    with torch.no_grad():
        for i in range(ids.shape[1] - 1):
            step = ids[:, i : i + 1].clamp_min(0)
            scores = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1].double()
            total += float(torch.nn.functional.cross_entropy(scores, ids[:, i + 1], reduction="sum"))  # -100: left out
    return math.exp(total / sum(len(story) - 1 for story in stories))


def tables(rows: list[dict[str, str]]) -> list[str]:
    """Perplexity by method and budget, mean and spread over seeds, as Markdown; methods without any are left out."""
    columns = [f"{b:,} B" for b in BUDGETS]
    found = [
        f"| heads | factors: least error of | ranks | {' | '.join(columns)} |",
        "|---|---|---|" + "---:|" * len(columns),
    ]
    values: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        values.setdefault(tuple(row[key] for key in KEYS[:4]), []).append(float(row["perplexity"]))
    for method in METHODS:
        cells = [spread(values.get((str(budget), *method), [])) for budget in BUDGETS]
        if any(cells):
            found.append(f"| {method[0]} | {NAMES[method[1]]} | {method[2]} | {' | '.join(cells)} |")
    return found


def spread(values: list[float]) -> str:
    noise = f" ± {stdev(values):.3f}" if len(values) > 1 and stdev(values) >= 5e-4 else ""
    return f"{mean(values):.3f}{noise}" if values else ""


if __name__ == "__main__":
    main()
