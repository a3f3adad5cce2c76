"""How many bits norms and biases are worth: the KL of whole files of one size whose norms have 6 to 16 bits.

    python experiments/bench_vectors.py                          # ResNet-20, -32 and -56 at 8x ... 32x, seed 0

Every row is one exact allocation of the relative error to the weights in what the norms leave of the budget, realised
and corrected; its KL to the dense network is measured on the whole calibration set, unaugmented training images. `bits`
is what `autocompress.records.vector_bits` would take where `chosen` is 1. 16 bits are binary16. Rows that stand in the
CSV are not computed again; profiles are kept in runs/bench_vectors.
"""

from __future__ import annotations

import argparse

from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.batches import batch_samples
from autocompress.planning import allocate, budget_bytes, energy_losses
from autocompress.records import vector_bits
from autocompress.tasks import load_task
from autocompress.types import Budget

KEYS = ("task", "ratio", "bits", "seed")
PATH = RESULTS / "bench_vectors.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="resnet20_cifar10,resnet32_cifar10,resnet56_cifar10")
    parser.add_argument("--ratios", default="8,12,16,20,24,32")
    parser.add_argument("--bits", default="16,10,9,8,7,6")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.tasks.split(","):
        known = done_keys(PATH, KEYS)
        cells = [(r, int(b)) for r in arguments.ratios.split(",") for b in arguments.bits.split(",")]
        todo = [(r, b) for r, b in cells if (name, r, str(b), str(arguments.seed)) not in known]
        if todo:
            measure(name, todo, arguments.seed)


def measure(name: str, cells: list[tuple[str, int]], seed: int) -> None:
    """Add the rows of one network."""
    task = load_task(ROOT / "experiments" / "tasks" / f"{name}.py")
    model, data = task.build_model(), task.calibration_batches(seed)
    stats = ac.calibrate(model, data, seed=seed)
    profile = ac.profile(model, stats, store=ROOT / "runs" / "bench_vectors" / f"{name}-seed{seed}")
    context = ac.Context(model, data, seed=seed)
    held, fit = context.held_samples, sum(batch_samples(b) for b in context.fit)
    for ratio, bits in cells:
        limit = budget_bytes(Budget.parse(f"{ratio}x"), profile)
        coarse = profile.with_vectors(bits)
        found = allocate(coarse, limit, energy_losses(coarse))
        small = context.build(coarse, found.options)
        kl = (context.divergence_of(small) * held + context.divergence_of(small, "fit") * fit) / (held + fit)
        row = {
            "task": name,
            "ratio": ratio,
            "bits": bits,
            "seed": seed,
            "chosen": int(bits == vector_bits(limit, profile.template.parameters)),
            "budget_bytes": limit,
            "bytes": found.file_bytes,
            "fixed_bytes": found.fixed_bytes,
            "predicted_loss": f"{found.loss:.6f}",
            "kl": f"{kl:.6g}",
            **environment(),
        }
        keep_row(PATH, row, KEYS)
        print(name, f"{ratio}x", f"{bits} bits:", found.fixed_bytes, "bytes fixed, KL", row["kl"])


if __name__ == "__main__":
    main()
