"""What one solve over all families gives: docs/joint_cifar10.md, from results/joint_cifar10.csv.

python experiments/table_joint.py
"""

from __future__ import annotations

import pandas as pd
from common import RESULTS, ROOT

TITLES = {"resnet20_cifar10": "ResNet-20 (dense 91.73)", "resnet56_cifar10": "ResNet-56 (dense 93.39)"}
FAMILIES = {
    "joint": "all of it",
    "default": "sparsity and bits",
    "lowrank": "low rank and bits",
    "channels": "channels, sparsity and bits",
}
TEXT = """# Sparsity, bits, ranks and channels in one solve

A budget in bytes and one in MACs at once, on CIFAR-10. `python experiments/joint_cifar10.py` makes every figure:
files written, read back and measured; one seed, nothing retrained. *Error* rows are the exact solve of the sum of
relative errors over that family, with what is proven of it; *auto* rows are what `--strategy auto` hands out of it.
Top-1 is on the 10,000 test images. Sparsity and bits alone cannot keep a limit on MACs below 100 %.
The rows are of an engine that chose codes along one path (docs/options.md, "How codes are chosen").

A joint solve holds every other family's choices, so its error is never larger, and proven within the gap. A smaller
error is not always a better network: what channels and ranks lose does not weigh alike, so `auto` measures plans with
and without narrower layers, and its KL is the figure to compare. Where it left channels alone its gap, which is to
the best of *all* choices by its own objective, is marked *.
"""


def main() -> None:
    rows = pd.read_csv(RESULTS / "joint_cifar10.csv")
    lines = TEXT.splitlines()
    for task, part in rows.groupby("task", sort=False):
        lines += ["", f"## {TITLES[str(task)]}", ""]
        lines += [
            "| budget | family | error: gap | KL | top-1 | split, narrower | auto: gap | KL | top-1 | split, narrower |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        for budget, own in part.groupby("budget", sort=False):
            by_family = own.set_index("family")
            for family, title in FAMILIES.items():
                cells = [str(budget), title]
                for name in (family, f"{family}, auto"):
                    cells += figures(by_family.loc[name]) if name in by_family.index else [""] * 4
                lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *ahead(part)]
    (ROOT / "docs" / "joint_cifar10.md").write_text("\n".join(lines) + "\n")


def ahead(part: pd.DataFrame) -> list[str]:
    """Top-1 of all families together less that of the best one alone, of the exact solve and of auto."""
    found = []
    for kind, suffix in (("exact solve", ""), ("auto", ", auto")):
        words = []
        for budget, own in part.groupby("budget", sort=False):
            top1 = own.set_index("family")["top1"]
            alone = [top1[f + suffix] for f in FAMILIES if f != "joint" and f + suffix in top1.index]
            if f"joint{suffix}" in top1.index and any(map(pd.notna, alone)):
                words.append(f"{top1[f'joint{suffix}'] - max(x for x in alone if pd.notna(x)):+.2f} at {budget}")
        found.append(f"- All of it less the best family alone, {kind}, points of top-1: {'; '.join(words)}.")
    return found


def figures(row: pd.Series) -> list[str]:
    """Gap, KL, top-1 and how many layers are split or narrower; of a family that cannot keep the budget, dashes."""
    if pd.isna(row["bytes"]):
        return ["none fits", "", "", ""]
    starred = "*" if "whole" in str(row["proof"]) else ""
    changed = f"{int(row['split'])}, {int(row['narrower'])}"
    return [f"{100 * row['gap']:.2g} %{starred}", f"{row['kl']:.4f}", f"{row['top1']:.2f}", changed]


if __name__ == "__main__":
    main()
