"""Narrower networks: what losing channels costs by each score, and how much faster ResNet-56 runs at half the MACs.

    python experiments/bench_channels.py scores      # results/bench_channels.csv
    python experiments/bench_channels.py time        # results/bench_channels_time.csv

scores: every prunable group (the inner channels of each residual block; shortcuts that pad with zeros keep the stages)
keeps 75 or 50 % of its channels, chosen by each score; weights stay float32, the layers that read the channels are
refitted, statistics are corrected on 512 calibration images. `plain` is the choice of `obs` without refit and without
correction: rows and columns are only dropped. `kl` is on the held-out fifth of 1,024 training images, `top1_score` on
2,000 other training images; `top1` on the 10,000 test images is for reporting only. Calibration is seed 0.

time: medians over `rounds` of one forward pass, dense and narrower taking turns in one process and on one thread, in
PyTorch (channels_last) and in onnxruntime, in processor time; all groups at 50 %. `ratio` is the median of the rounds'
own ratios: on a machine that does other things too, it is the figure to look at.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, ROOT, done_keys, environment, keep_row
from torch import nn

import autocompress as ac
from autocompress.applying import CORRECTION_SAMPLES
from autocompress.batches import batch_samples
from autocompress.channels import narrow
from autocompress.planning import dense_cost, running_cost
from autocompress.profiling import Profile
from autocompress.salience import widths
from autocompress.tasks import load_task

LEVELS = (75.0, 50.0)
OPTIONS: list[Any] = [f"n{a}/{b}" for level in (75, 50) for a, b in ((level, 100), (100, level), (level, level))]
SCORE_KEYS = ("network", "score", "level")
TIME_KEYS = ("runtime", "batch")


def scores() -> None:
    path = RESULTS / "bench_channels.csv"
    done = done_keys(path, SCORE_KEYS)
    for network in ("resnet20", "resnet56"):
        task = load_task(str(ROOT / "experiments" / "tasks" / f"{network}_cifar10.py"))
        assert task.score is not None
        assert task.evaluate is not None
        model, data = task.build_model(), task.calibration_batches(0)
        context = ac.Context(model, data, seed=0)
        stats = ac.calibrate(model, data, seed=0)
        labelled = []
        for batch in task.training_batches(0):
            labelled.append(batch)
            if sum(map(batch_samples, labelled)) >= 2 * CORRECTION_SAMPLES:
                break
        for score in ("obs", "l1", "taylor", "cka"):
            names = [score, "plain"] if score == "obs" else [score]
            if all((network, name, f"{level:g}") in done for name in names for level in LEVELS):
                continue
            kept = widths(
                model, data[0], stats, score, LEVELS, batches=labelled if score == "taylor" else data, loss=task.loss
            )
            found = ac.profile(model, stats, options=OPTIONS, channels=kept, workers=1)
            for level in LEVELS:
                structure = dict.fromkeys(kept.kept, level)
                plan = ac.plan(found.at(structure), 10**9)
                for name in names:
                    if name == "plain":
                        small = narrow(model, kept.units(structure), kept.groups).eval()
                    else:
                        small = ac.apply(model, plan, found, data)
                    row = {
                        "network": network,
                        "score": name,
                        "level": f"{level:g}",
                        "macs": round(running_cost(found, "macs", plan.layers) / dense_cost(found, "macs"), 4),
                        "loss": "" if name == "plain" else f"{error_of(found, plan):.5g}",
                        "kl": f"{context.divergence_of(small):.5g}",
                        "top1_score": task.score(small),
                        "top1": round(task.evaluate(small), 2),
                        **environment(),
                    }
                    keep_row(path, row, SCORE_KEYS)


def error_of(found: Profile, plan: ac.Plan) -> float:
    """The sum of relative errors of a plan."""
    return sum(found.layers[n].row(o).error / found.layers[n].energy for n, o in plan.layers.items())


def measured(rounds: int) -> None:
    task = load_task(str(ROOT / "experiments" / "tasks" / "resnet56_cifar10.py"))
    model, data = task.build_model(), task.calibration_batches(0)
    stats = ac.calibrate(model, data[:2], seed=0)
    kept = widths(model, data[0], stats, "l1", (50.0,))
    small = narrow(model, kept.units(dict.fromkeys(kept.kept, 50.0)), kept.groups).eval()
    torch.set_num_threads(1)
    for batch in (1, 64):
        x = torch.cat(data[:1])[:batch].contiguous(memory_format=torch.channels_last)
        for runtime, runner in (("torch", in_torch), ("onnxruntime", in_onnxruntime)):
            runs = [runner(m, x) for m in (model, small)]
            times: list[list[float]] = [[], []]
            for run in runs * 3:
                run()
            count = rounds * (20 if batch == 1 else 1)
            for _ in range(count):
                for each, run in zip(times, runs, strict=True):
                    begun = time.process_time()
                    run()
                    each.append(1e3 * (time.process_time() - begun))
            ratios = [a / b for a, b in zip(*times, strict=True)]
            row = {
                "runtime": runtime,
                "batch": batch,
                "rounds": count,
                "dense_ms": round(statistics.median(times[0]), 3),
                "narrow_ms": round(statistics.median(times[1]), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_quartiles": "-".join(f"{q:.3f}" for q in np.quantile(ratios, (0.25, 0.75))),
                "macs": round(macs_of(small, x[:1]) / macs_of(model, x[:1]), 4),
                **environment(),
            }
            keep_row(RESULTS / "bench_channels_time.csv", row, TIME_KEYS)


def macs_of(model: nn.Module, x: torch.Tensor) -> int:
    """Multiplications of convolutions and linear layers in one forward pass, counted by hooks."""
    total = 0

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * output.numel() // module.weight.shape[0]

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


def in_torch(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    whole: Any = model.eval()
    whole.to(memory_format=torch.channels_last)

    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def in_onnxruntime(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x.contiguous(),), str(path), dynamo=False)
        graph = path.read_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scores", "time"))
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.part == "scores":
        scores()
    else:
        measured(arguments.rounds)


if __name__ == "__main__":
    main()
