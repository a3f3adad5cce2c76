"""What `auto` is made of, on images that nothing saw: how slopes are measured, and whether searching for a plan helps.

    python experiments/auto_trial.py                       # ResNet-20 at 16x, 20x, 24x, 32x, seed 0: about 20 minutes
    python experiments/auto_trial.py --ratios 24 --seeds 1

Part `slopes`: exact plans for error · (1/energy)^(1-m) · slope^m, a layer's slope being the median rise of the KL per
error when it alone is compressed, of the outputs as they are (`plain`) or softened (`soft`, `Context.temperature`).
Part `search`: from the best of the soft ones, 120 evaluations of `solvers.search.evolve`, `nearby` and `spdy`, scored
by `Context.score` on the held-out slice or on a sample of what the Hessians saw; and what each finds. `kl` and
`soft_kl` are on the calibration data (1,024 images), `kl_other`, `soft_kl_other` and `changed_other` (percent whose
first answer is another one) on those of three other draws that are not among them. Nothing is chosen by these here;
they say what would have been right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.batches import evaluating, feed, sample_digests
from autocompress.comparing import task_context
from autocompress.measuring import PASS_SAMPLES, divergence, merit
from autocompress.planning import budget_bytes, within
from autocompress.strategies.auto import Auto
from autocompress.strategies.base import searchable, solved_plan
from autocompress.tasks import load_task
from autocompress.types import Budget
from solvers.search import Found, evolve, nearby, spdy

KEYS = ("task", "ratio", "seed", "part", "what", "mixture")
OTHERS = (1_000, 2_000, 3_000)  # added to a seed, these draw the images that nothing saw
EVALUATIONS = 120
PARTS = ("held", "sample")
SEARCHES: dict[str, Callable[..., Found]] = {
    "evolve": partial(evolve, offspring=8),
    "nearby": nearby,
    "spdy": partial(spdy, initial=EVALUATIONS // 3, patience=EVALUATIONS // 6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="resnet20_cifar10")
    parser.add_argument("--ratios", default="16,20,24,32")
    parser.add_argument("--seeds", default="0")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in map(int, given.seeds.split(",")):
        trial(given.task, seed, given.ratios.split(","))


def trial(name: str, seed: int, ratios: list[str]) -> None:
    task = load_task(ROOT / "experiments" / "tasks" / f"{name}.py")
    context = task_context(task, seed)
    stats = ac.calibrate(context.model, task.calibration_batches(seed), seed=seed)
    whole = ac.profile(context.model, stats, ROOT / "runs" / "auto_trial" / name / f"seed{seed}")
    known = {digest for batch in task.calibration_batches(seed) for digest in sample_digests(batch)}
    others = [b for more in OTHERS for batch in task.calibration_batches(seed + more) for b in _unknown(batch, known)]
    dense = _outputs(context.model, others)
    path = RESULTS / "auto_trial.csv"
    done = done_keys(path, KEYS)

    def keep(profile: ac.Profile, layers: Any, ratio: str, part: str, what: str, mixture: float, **more: Any) -> float:
        """Judge a plan and keep its row; its merit on the calibration data."""
        small = context.build(profile, layers)
        plain, soft = context.judge(small, "all")
        outputs = _outputs(small, others)
        row = {
            **dict(zip(KEYS, (name, ratio, seed, part, what, f"{mixture:g}"), strict=True)),
            "kl": f"{plain:.6f}",
            "soft_kl": f"{soft:.6f}",
            "kl_other": f"{divergence(dense, outputs):.6f}",
            "soft_kl_other": f"{divergence(dense, outputs, context.temperature):.6f}",
            "changed_other": f"{100.0 * float((outputs.argmax(1) != dense.argmax(1)).double().mean()):.3f}",
            "others": len(outputs),
            **more,
            "temperature": context.temperature,
            **environment(),
        }
        keep_row(path, row, KEYS)
        print(*(f"{k} {row[k]}" for k in (*KEYS[1:], "kl", "kl_other", "soft_kl_other", "changed_other")), flush=True)
        return merit(plain, soft)

    for ratio in ratios:
        if all((name, ratio, str(seed), "search", f"{s} on {p}", "0") in done for s in SEARCHES for p in PARTS):
            continue
        budget = Budget.of(f"{ratio}x")
        profile = within(whole, budget_bytes(budget, whole))
        best: tuple[float, Any] | None = None
        for soft in (False, True):
            for m in (0.0, 0.25, 0.5, 0.75, 1.0):
                auto = Auto((m,), soft=soft)
                losses = next(iter(auto.objectives(profile, context).values()))
                plan = solved_plan(profile, budget, losses, "exact")
                value = keep(profile, plan.layers, ratio, "slopes", "soft" if soft else "plain", m)
                if soft and (best is None or value < best[0]):
                    best = value, losses
        assert best is not None
        asked = searchable(profile, budget, best[1])
        for part in PARTS:
            for kind, search in SEARCHES.items():
                found = search(asked.problem, asked.score(context, part), evaluations=EVALUATIONS, seed=seed)
                layers = {n: row.option for n, row in asked.choice(found.choice).items()}
                figures = {"score_first": f"{found.trace[0][1]:.6f}", "score": f"{found.score:.6f}"}
                keep(profile, layers, ratio, "search", f"{kind} on {part}", 0.0, **figures)


def _unknown(batch: torch.Tensor, known: set[str]) -> list[torch.Tensor]:
    """The samples of a batch that are not known, which they are from now on, in pieces for a pass."""
    digests = sample_digests(batch)
    new = [i for i, digest in enumerate(digests) if digest not in known]
    known.update(digests)
    return list(batch[new].split(PASS_SAMPLES)) if new else []


def _outputs(model: torch.nn.Module, pieces: list[Any]) -> torch.Tensor:
    with torch.no_grad(), evaluating(model):
        return torch.cat([feed(model, piece) for piece in pieces])


if __name__ == "__main__":
    main()
