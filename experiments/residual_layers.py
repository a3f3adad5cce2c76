"""What a low rank beside other options is worth: `rank4w4+w2` and its like, layer by layer and in one solve.

    python experiments/residual_layers.py                  # results/residual_layers.csv
    python experiments/residual_layers.py --solve resnet20          # results/residual_solved.csv

Layers of ResNet-20 (CIFAR-10, Hessians of 819 unaugmented training images) and of the digits network. Relative error is
½ tr(ΔW H ΔWᵀ) / energy; bits per weight are of all payloads of the layer. `alone`: the same option of the third layer,
without factors, and `of_alone` the error over its error. `default_error`: the least error that an option of the family
`default` has in no more bytes; `bytes_ratio_default`: bytes over the fewest of one whose error is no larger; below 1
the low rank is ahead. rounds: how often factors and the rest are made in turns. --solve: as in codebooks_layers.py,
over `default`, and over `default` and `residuals`. Nothing here is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from codebooks_layers import RESNET20, in_one_solve
from common import RESULTS, ROOT, done_keys, environment, keep_row

import autocompress as ac
from autocompress.compressors import LayerProblem, compressor_of, default_options, measure, profile_layer
from autocompress.compressors.residual import LowRankResidual
from autocompress.layers import find_layers
from autocompress.tasks import load_task
from autocompress.types import Option

KEYS = ("network", "layer", "option", "rounds")
NETWORKS: dict[str, tuple[str | Path, tuple[str, ...]]] = {
    "resnet20": (RESNET20, ("layer1.2.conv2", "layer2.2.conv2", "layer3.2.conv1")),
    "digits": ("digits", ()),
}
RANKS = ("rank1w4", "rank2w4", "rank4w4", "rank8w4", "rank2w6", "rank4w6")
REST = ("w2", "w3", "w4", "2:4w4", "s75w4", "s90w4", "rd(0.8,0.1)", "rd(1.13,0.1)", "rd(1.6,0.1)", "tcq(0.96,0.4)")


def of_layers(given: argparse.Namespace) -> None:
    default = default_options()
    options = [Option.parse(f"{rank}+{rest}") for rank in RANKS for rest in REST]
    for network, (spec, names) in NETWORKS.items():
        task = load_task(spec)
        model = task.build_model()
        layers = {layer.name: layer for layer in find_layers(model)}
        stats = ac.calibrate(model, task.calibration_batches(0), seed=0)
        for name in names or layers:
            done = done_keys(given.results, KEYS)
            if all((network, name, str(o), str(rounds)) in done for o in options for rounds in (1, 2)):
                continue
            layer = layers[name]
            weight = layer.matrix(model.get_parameter(layer.key))
            problem = LayerProblem(name, layer.stored_shape, weight, stats.layers[name].hessian)
            others = list(dict.fromkeys([*default, *map(Option.parse, REST)]))
            rest = {row.option: row for row in profile_layer(problem, others)[0]}
            beside = [rest[o] for o in default if o in rest]
            for rounds in (1, 2):
                compressor = LowRankResidual(lambda option: compressor_of(option)[1], rounds)
                for row in measure(compressor, problem, options):
                    assert row.option.residual is not None
                    alone = rest[row.option.residual]
                    fits = [r.error for r in beside if r.bytes <= row.bytes]
                    as_good = [r.bytes for r in beside if r.error <= row.error]
                    figures = {
                        "network": network,
                        "layer": name,
                        "option": str(row.option),
                        "rounds": str(rounds),
                        "alone": str(alone.option),
                        "weights": weight.size,
                        "bytes": row.bytes,
                        "bits_per_weight": f"{8 * row.bytes / weight.size:.3f}",
                        "bits_alone": f"{8 * alone.bytes / weight.size:.3f}",
                        "relative_error": f"{row.error / problem.energy:.5g}",
                        "of_alone": f"{row.error / alone.error:.3f}",
                        "default_error": f"{min(fits) / problem.energy:.5g}" if fits else "",
                        "bytes_ratio_default": f"{row.bytes / min(as_good):.3f}",
                    }
                    keep_row(given.results, figures | environment(), KEYS)
            print(network, name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solve", choices=list(NETWORKS), help="plans of a network in place of layers")
    parser.add_argument("--budgets", default="12x;16x;24x")
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "residuals")
    parser.add_argument("--results", type=Path, default=RESULTS / "residual_layers.csv")
    parser.add_argument("--solved", type=Path, default=RESULTS / "residual_solved.csv")
    given = parser.parse_args()
    if given.solve:
        in_one_solve(given, "residuals", lambda option: option.residual is not None)
    else:
        of_layers(given)


if __name__ == "__main__":
    main()
