"""What wins: the tables and the plot of results/strategies_cifar10.csv.

    python experiments/plot_strategies.py       # docs/strategies_cifar10.md and docs/strategies_cifar10.png

Needs matplotlib (the extra `notebooks`).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from common import RESULTS, ROOT
from strategies_cifar10 import SECTIONS

TITLES = {"resnet20_cifar10": "ResNet-20", "resnet32_cifar10": "ResNet-32", "resnet56_cifar10": "ResNet-56"}
AUTO = "auto"
SECTION_OF = {name: section for section, names in SECTIONS.items() for name in names}
COLOURS = dict(
    zip(SECTIONS, ("tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:purple", "black"), strict=True)
) | {"other": "tab:brown"}
MARKS = "osD^vP*X<>"
# What the papers print, quoted. (network, figure, what is counted as size, source)
PUBLISHED = (
    ("ResNet-20", "91.39 before, 90.92 after, 74.91 % of the parameters removed (4.0x)", "parameters, fp32; retrained",
     "ALDS, arXiv 2107.11442, table 1"),
    ("ResNet-20", "91.39 before, 91.28 after, 49.88 % removed (2.0x)", "parameters, fp32; retrained",
     "PCA, quoted in the same table"),
    ("ResNet-56", "93.43 at 59.5 MFLOPs", "FLOPs; trained from scratch", "ITPruner, arXiv 2108.08532"),
    ("ResNet-50, CIFAR-10", "no loss at 836x", "codes of weights that are not zero, nothing else; trained",
     "Yang et al., arXiv 1910.05897"),
)  # fmt: skip
LIMITS = (
    "Post-training, on 1,024 unlabelled images: no strategy retrains, and the papers' own figures above do.",
    "A rule is run on this project's error curves, options and files, not on its authors' compressor; its rows say how "
    "well it allocates, not what its paper reports.",
    "Rules that set densities (ERK, LAMP, magnitude, uniform sparsity) and widths choose among the options of the "
    "profile, so what they ask for is rounded to those.",
    "Searches run the model as often as effort `normal` grants; more would help some of them.",
    "The seed draws the calibration images, the split and what a search draws, so the spread holds all three; the "
    "networks' weights are the same published ones.",
    "Top-1 on 10,000 test images has a sampling error of about 0.3 points of its own; it is common to all strategies "
    "of a network, and differences between them are steadier than that.",
    "Seconds are those of a machine shared with other work, weights that an earlier row made left out; those of "
    "`loss`, `fisher` and `hawq` are left out where an earlier row had paid for their gradients and runs.",
)


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per (task, ratio, strategy): mean and standard deviation over the seeds that have a plan."""
    done = rows[rows["error"].isna()]
    columns = ("bytes", "top1", "kl", "ratio_stored", "ratio_paper", "evaluations", "seconds")
    named = {"seeds": ("seed", "count"), "top1_std": ("top1", "std"), "kl_std": ("kl", "std")}
    named |= {name: (name, "mean") for name in columns}
    return done.groupby(["task", "ratio", "strategy"]).agg(**named).reset_index()


def verdict(rows: pd.DataFrame) -> str:
    """Of one network and ratio: the three best strategies other than auto, and how far auto is from the first of them,
    beside the standard deviation of that difference over the seeds that both have.
    """
    done = rows[rows["error"].isna()].pivot(index="seed", columns="strategy", values="top1")
    whole = done.dropna(axis="columns")  # a mean over fewer seeds is another one
    singles = whole.drop(columns=AUTO, errors="ignore").mean().sort_values(ascending=False, kind="stable")
    if singles.empty:
        return "no strategy has a plan for every seed"
    text = ", ".join(f"{name} {value:.2f}" for name, value in singles.head(3).items())
    if AUTO not in whole:
        return text
    difference = whole[AUTO] - whole[singles.index[0]]
    noise = f"± {difference.std():.2f}" if len(difference) > 1 else "(one seed: no noise known)"
    return f"{text}; auto {whole[AUTO].mean():.2f}, {difference.mean():+.2f} {noise} to {singles.index[0]}"


def cell(mean: float, std: float, form: str = ".2f") -> str:
    return f"{mean:{form}}" if math.isnan(std) else f"{mean:{form}} ± {std:{form}}"


def ordered(strategies: set[str]) -> list[str]:
    return [n for n in SECTION_OF if n in strategies] + sorted(strategies - set(SECTION_OF))


def network_lines(task: str, rows: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """The section of one network."""
    ratios = sorted(rows["ratio"].unique())
    dense, count = rows["top1_dense"].iloc[0], rows["seed"].nunique()
    at = table.set_index(["strategy", "ratio"])
    whole = table[table["seeds"] == count].groupby("ratio")["top1"].max()  # a mean over fewer seeds is another one
    lines = ["", f"## {TITLES.get(task, task)}", ""]
    lines += [
        f"Dense: {dense:.2f}. Top-1 in percent, mean ± standard deviation of {count} seed{'s' * (count > 1)}.",
        "",
    ]
    lines += ["| strategy | " + " | ".join(f"{r:g}x" for r in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
    section = ""
    for name in ordered(set(rows["strategy"])):
        if (now := SECTION_OF.get(name, "other")) != section:
            section = now
            lines.append(f"| *{section}* |" + " |" * len(ratios))
        cells = []
        for ratio in ratios:
            known = (name, ratio) in at.index
            failed = ((rows["strategy"] == name) & (rows["ratio"] == ratio)).any()
            text = "no plan" if failed else "not run"
            if known:
                text = cell(at.loc[(name, ratio), "top1"], at.loc[(name, ratio), "top1_std"])
            cells.append(f"**{text}**" if known and at.loc[(name, ratio), "top1"] == whole.get(ratio) else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Who wins (three best single strategies; then `auto`, and its difference to the first with its noise):",
        "",
    ]
    lines += [f"- {ratio:g}x: {verdict(rows[rows['ratio'] == ratio])}" for ratio in ratios]
    lines += [
        "",
        "The same files: stored ratio / ratio as papers count, KL to the dense model on held-out images, runs of",
    ]
    lines += ["the model and seconds that a plan took, means over budgets and seeds.", ""]
    lines += ["| strategy | " + " | ".join(f"{r:g}x" for r in ratios) + " | KL | model runs | seconds |"]
    lines += ["|---" * (len(ratios) + 4) + "|"]
    for name in ordered(set(table["strategy"])):
        own = at.loc[name]
        cells = [
            f"{own.loc[r, 'ratio_stored']:.1f} / {own.loc[r, 'ratio_paper']:.1f}" if r in own.index else ""
            for r in ratios
        ]
        cells += [f"{own['kl'].mean():.4f}", f"{own['evaluations'].mean():.0f}", f"{own['seconds'].mean():.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    failed = rows[rows["error"].notna()]
    if len(failed):
        lines += ["", "No plan:", ""]
        for (name, error), group in failed.groupby(["strategy", "error"], sort=False):
            where = ", ".join(f"{r:g}x" for r in sorted(group["ratio"].unique()))
            lines.append(f"- {name} at {where}: {error}")
    return lines


def page(rows: pd.DataFrame, others: pd.DataFrame) -> str:
    table = means(rows)
    lines = [
        "# Strategies on CIFAR-10",
        "",
        "Every allocation strategy on the same error curves, the same bytes and the same networks, post-training.",
        "Written by `experiments/plot_strategies.py` from `experiments/results/strategies_cifar10.csv`; what a row is",
        "says `experiments/strategies_cifar10.py`. Top-1 is on the 10,000 test images, which no choice depends on.",
        'The rows are of an engine that chose codes along one path (docs/options.md, "How codes are chosen").',
        "",
        "![top-1 against bytes](strategies_cifar10.png)",
        "",
        "## Published figures",
        "",
        "The papers' own, quoted and not reproduced. None counts the bytes of a file.",
        "",
        "| network | figure | counted as size | source |",
        "|---|---|---|---|",
        *("| " + " | ".join(cells) + " |" for cells in PUBLISHED),
    ]
    tasks = [t for t in (*TITLES, *sorted(set(rows["task"]) - set(TITLES))) if t in set(rows["task"])]
    near = others[others["task"].isin(tasks)]
    if len(near):
        lines += ["", "Whole files of other tools, quoted (`experiments/results/published_cifar10.csv`):", ""]
        lines += ["| network | tool | bytes | top-1 |", "|---|---|---|---|"]
        lines += [
            f"| {TITLES.get(r.task, r.task)} | {r.tool} | {r.bytes:,} | {r.top1:.2f} |" for r in near.itertuples()
        ]
    for task in tasks:
        lines += network_lines(task, rows[rows["task"] == task], table[table["task"] == task])
    lines += ["", "## Known limitations", "", *(f"- {text}" for text in LIMITS)]
    return "\n".join(lines) + "\n"


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Top-1 against bytes of the file, one panel per network, bars of one standard deviation over the seeds."""
    table = means(rows)
    tasks = [t for t in (*TITLES, *sorted(set(rows["task"]) - set(TITLES))) if t in set(table["task"])]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(max(9.0, 5.2 * len(tasks)), 6.4), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        own = table[table["task"] == task]
        dense = rows[rows["task"] == task]["top1_dense"].iloc[0]
        for name in ordered(set(own["strategy"])):
            points = own[own["strategy"] == name].sort_values("bytes")
            section = SECTION_OF.get(name, "other")
            place = SECTIONS.get(section, ()).index(name) if name in SECTION_OF else 0
            thick = name == AUTO
            axis.errorbar(
                points["bytes"] / 1e3,
                points["top1"],
                points["top1_std"].fillna(0.0),
                color=COLOURS[section],
                marker=MARKS[place % len(MARKS)],
                ms=5,
                lw=2.5 if thick else 1.0,
                alpha=1.0 if thick else 0.7,
                capsize=2,
                zorder=3 if thick else 2,
                label=name,
            )
        axis.axhline(dense, color="gray", lw=1, ls=":", label="dense, fp32")
        axis.set(title=TITLES.get(task, task), xlabel="bytes of the whole file, thousands", xscale="log")
        axis.set_ylim(max(dense - 12, own["top1"].min() - 1), dense + 0.7)
        sizes = sorted({float(f"{size / 1e3:.2g}") for size in own.groupby("ratio")["bytes"].median()})
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("top-1 on the test images, %")
    handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "strategies_cifar10.csv")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    rows = pd.read_csv(given.results)
    rows = rows[rows["effort"] == given.effort]
    given.docs.mkdir(parents=True, exist_ok=True)
    draw(rows, given.docs / "strategies_cifar10.png")
    text = page(rows, pd.read_csv(RESULTS / "published_cifar10.csv"))
    (given.docs / "strategies_cifar10.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
