"""The Markdown table of the README, from results/budgets_cifar10.csv: python experiments/table_budgets.py"""

from __future__ import annotations

import pandas as pd
from common import RESULTS


def main() -> None:
    rows = pd.read_csv(RESULTS / "budgets_cifar10.csv")
    print("| network | effort | budget | bytes, at most | bytes, mean | top-1, dense | top-1, mean | top-1 by seed |")
    print("|---|---|---|---|---|---|---|---|")
    for (task, effort, ratio), group in rows.groupby(["task", "effort", "ratio"]):
        by_seed = ", ".join(f"{x:.2f}" for x in group.sort_values("seed")["top1"])
        line = [task, effort, f"{ratio}x", f"{group['budget_bytes'].iloc[0]:,}", f"{group['bytes'].mean():,.0f}"]
        line += [f"{group['top1_dense'].iloc[0]:.2f}", f"{group['top1'].mean():.2f}", by_seed]
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
