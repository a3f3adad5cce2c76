"""Whole files of this project beside those of published compressors, on the same networks and test images.

    python experiments/plot_budgets.py          # docs/budgets_cifar10.png and docs/budgets_cifar10.md

Ours: results/budgets_cifar10.csv, mean over seeds, bars from the worst to the best seed. The others' points stand in
results/published_cifar10.csv: bytes of the whole file and top-1 in percent on the 10,000 test images of NNCodec 2.1.3
(ISO/IEC 15938-17) and Sony's Model Compression Toolkit 2.6, run with the same published weights before this repository
existed; they are quoted, not measured by a script here. Needs matplotlib (the extra `notebooks`).
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from common import RESULTS, ROOT

TASKS = {"resnet20_cifar10": "ResNet-20", "resnet32_cifar10": "ResNet-32", "resnet56_cifar10": "ResNet-56"}
OURS = "autocompress"
COLOURS = {OURS: "#1f4e9c", f"{OURS}, effort fast": "#7a9cd6"}


def ours() -> pd.DataFrame:
    """One row per (task, effort, budget): mean bytes and top-1, worst and best seed."""
    rows = pd.read_csv(RESULTS / "budgets_cifar10.csv")
    groups = rows.groupby(["task", "effort", "ratio"])
    table = groups.agg(
        bytes=("bytes", "mean"),
        top1=("top1", "mean"),
        worst=("top1", "min"),
        best=("top1", "max"),
        seeds=("seed", "count"),
        dense=("top1_dense", "first"),
    )
    table = table.reset_index()
    return table.assign(tool=[OURS if e == "normal" else f"{OURS}, effort {e}" for e in table["effort"]])


def draw(mine: pd.DataFrame, others: pd.DataFrame) -> None:
    """Top-1 against bytes, one panel per network, on a logarithmic axis of bytes."""
    tasks = [t for t in TASKS if t in set(mine["task"])]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.2), squeeze=False, layout="constrained")
    tools = list(dict.fromkeys(others["tool"]))
    marks = dict(zip(tools, "sDv^xP", strict=False))
    colours = dict(
        zip(tools, ("tab:cyan", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"), strict=False)
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        dense = float(mine[mine["task"] == task]["dense"].iloc[0])
        for (tool, color), style in zip(COLOURS.items(), ("-", "--"), strict=True):
            own = mine[(mine["task"] == task) & (mine["tool"] == tool)].sort_values("bytes")
            spread = [own["top1"] - own["worst"], own["best"] - own["top1"]]
            if len(own):
                axis.errorbar(
                    own["bytes"] / 1e3,
                    own["top1"],
                    spread,
                    marker="o",
                    color=color,
                    capsize=3,
                    label=tool,
                    lw=2,
                    ls=style,
                )
        for tool, rows in others[others["task"] == task].groupby("tool", sort=False):
            rows = rows.sort_values("bytes")
            axis.plot(
                rows["bytes"] / 1e3, rows["top1"], marker=marks[tool], color=colours[tool], label=tool, lw=1, alpha=0.8
            )
        axis.axhline(dense, color="gray", lw=1, ls=":", label="dense, fp32")
        axis.set(
            title=TASKS[task], xlabel="bytes of the whole file, thousands", xscale="log", ylim=(dense - 7, dense + 0.7)
        )
        ticks = [20, 30, 50, 70, 100, 150, 200, 300, 500, 900]
        low, high = axis.get_xlim()
        shown = [t for t in ticks if low <= t <= high]
        axis.set_xticks(shown, [str(t) for t in shown])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("top-1 on the test images, %")
    handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(len(tasks), 2), fontsize=8)
    figure.savefig(ROOT / "docs" / "budgets_cifar10.png", dpi=130)


def write_table(mine: pd.DataFrame, others: pd.DataFrame) -> None:
    """Every point of the plot, largest file first."""
    lines = [
        "# Whole files on CIFAR-10",
        "",
        "Bytes of the whole file and top-1 in percent on the 10,000 test images, post-training. Written by",
        "`experiments/plot_budgets.py`, which says where the numbers come from: *autocompress* rows are means over",
        "seeds, the others are quoted.",
        "",
        "![top-1 against bytes](budgets_cifar10.png)",
    ]
    both = pd.concat([mine, others.assign(seeds=0)], ignore_index=True)
    for task, title in TASKS.items():
        rows = both[both["task"] == task].sort_values("bytes", ascending=False)
        mine_too = rows["tool"].str.startswith(OURS).any()
        if mine_too:
            lines += ["", f"## {title}", "", "| bytes | top-1 | tool |", "|---|---|---|"]
        for row in rows.itertuples() if mine_too else ():
            own = row.tool.startswith(OURS)
            seeds = f", {row.ratio:g}x, {row.seeds} seed{'s' if row.seeds > 1 else ''}" if own else ""
            cells = [f"{row.bytes:,.0f}", f"{row.top1:.2f}", f"{row.tool}{seeds}"]
            lines.append("| " + " | ".join(f"**{c}**" if own else c for c in cells) + " |")
    (ROOT / "docs" / "budgets_cifar10.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    mine, others = ours(), pd.read_csv(RESULTS / "published_cifar10.csv")
    draw(mine, others)
    write_table(mine, others)


if __name__ == "__main__":
    main()
