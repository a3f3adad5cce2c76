"""The table and the plot of results/alds_resnet20.csv: docs/alds_resnet20.md and docs/alds_resnet20.png.

    python experiments/alds_resnet20.py --table

Needs matplotlib (the extra `notebooks`).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from common import ROOT

LABELS = {
    "alds": "ALDS",
    "alds_paper": "ALDS, bound with √k",
    "alds_norm": "ALDS, exact norm",
    "svd": "SVD",
    "svd_energy": "SVD-Energy",
    "pca": "PCA",
    "lrank": "L-Rank",
    "ft": "FT",
    "ft_global": "FT, one threshold",
    "pfp": "PFP",
    "alds_minimax": "largest output error",
    "exact": "sum of output errors",
}


def write(results: Path) -> None:
    """Both files, from the rows that are there."""
    rows = pd.read_csv(results)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    text = ["# Low-rank allocation on ResNet-20", "", *INTRODUCTION]
    for axis, (factors, part) in zip(axes, rows.groupby("factors", sort=False), strict=False):
        table = part.pivot(index="keep", columns="strategy", values="top1").sort_index(ascending=False)
        names = [name for name in LABELS if name in table]
        for name in names:
            axis.plot(100 * (1 - table.index), table[name], marker="o", markersize=3, label=LABELS[name])
        axis.set_title(f"{factors} factors")
        axis.set_xlabel("parameters removed, %")
        text += [
            f"## {str(factors).capitalize()} factors, top-1",
            "",
            "| kept | " + " | ".join(LABELS[n] for n in names) + " |",
        ]
        text.append("|" + "---|" * (len(names) + 1))
        for keep, line in table[names].iterrows():
            cells = ["" if pd.isna(value) else f"{value:.2f}" for value in line]
            text.append(f"| {100 * float(str(keep)):.1f} % | " + " | ".join(cells) + " |")
        text.append("")
    axes[0].set_ylabel("top-1 on test images, %")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "alds_resnet20.png", dpi=110)
    (ROOT / "docs" / "alds_resnet20.md").write_text("\n".join(text).rstrip() + "\n")


INTRODUCTION = (
    "![curves](alds_resnet20.png)",
    "",
    "Compress-only: nothing is retrained, statistics of norms are corrected. Every strategy chooses among the same",
    "float32 options within the same bytes; a keep ratio bounds the whole file. `experiments/alds_resnet20.py` says",
    "the rest and makes every figure, of one seed. The dense network has 91.73.",
    "",
)
