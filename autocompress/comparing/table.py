"""The table of a comparison, and the store that keeps its rows.

Store:  rows/<key>.json      one file per finished row, named by the digest of all that the row depends on
        extra/<name>.json    what strategies measured on the model; extra/<name>.runs.json how often that ran it
        compare.csv          the table of the last call, up to date after every row
        plans.jsonl          its plans, a line per row: {strategy, budget, seed, layers: {layer: [option, bytes]}, plan}
Every file is renamed into its place, and a row's name says what is in it, so several processes may fill one store.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from autocompress.errors import AutocompressError, StoreError
from autocompress.files import atomic_path

__all__ = ["COLUMNS", "KEYS", "Book", "Row", "load_comparison", "spending", "summary", "write_comparison"]

COLUMNS = (
    "strategy",
    "budget",
    "seed",
    "budget_bytes",
    "bytes",
    "paper_bytes",
    "predicted_loss",
    "bound",
    "gap",
    "kl",
    "metric",
    "seconds",
    "evaluations",
    "plan",
    "error",
)
KEYS = ("strategy", "budget", "seed")
log = logging.getLogger(__name__)


def spending(table: pd.DataFrame) -> pd.DataFrame:
    """Who spends the bytes where: one row per (strategy, budget, seed, layer): option, bytes, share (of the file).

    table: what `compare` or `load_comparison` gave, or rows of it; rows without a plan are left out.
    """
    records = [
        {
            **{key: row[key] for key in KEYS},
            "layer": layer,
            "option": option,
            "bytes": size,
            "share": size / row["bytes"],
        }
        for row in table.to_dict("records")
        if row["layers"]
        for layer, (option, size) in json.loads(row["layers"]).items()
    ]
    return pd.DataFrame.from_records(records, columns=[*KEYS, "layer", "option", "bytes", "share"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (budget, strategy), means over the seeds, best first within a budget; strategies without a plan are
    left out.

    Columns: budget, strategy, seeds (how many had a plan), bytes, paper_bytes, gap, kl, kl_std, metric, metric_std,
    evaluations, seconds, and best: whether it is its budget's first. Better is the higher mean metric, then the lower
    mean KL; where nothing was evaluated, the lower KL. A std is that of the seeds, over n - 1; empty for a single one.
    """
    done = table[table["error"] == ""].astype({"bytes": "float64", "paper_bytes": "float64", "evaluations": "float64"})
    figures = ("bytes", "paper_bytes", "gap", "kl", "metric", "evaluations", "seconds")
    named: dict[str, Any] = {"seeds": ("seed", "count"), **{name: (name, "mean") for name in figures}}
    named |= {f"{name}_std": (name, "std") for name in ("kl", "metric")}
    found = done.groupby(["budget", "strategy"], sort=False).agg(**named).reset_index()
    score = -found["metric"] if found["metric"].notna().any() else found["kl"]
    place = {budget: i for i, budget in enumerate(dict.fromkeys(table["budget"]))}
    found = found.assign(score=score, place=found["budget"].map(place))
    found = found.sort_values(["place", "score", "kl"], kind="stable", ignore_index=True)
    found = found.assign(best=~found["budget"].duplicated())
    columns = ["budget", "strategy", "seeds", "bytes", "paper_bytes", "gap", "kl", "kl_std", "metric", "metric_std"]
    return found[[*columns, "evaluations", "seconds", "best"]]


def load_comparison(folder: str | Path) -> pd.DataFrame:
    """The table that `compare` left in its store, or `autocompress compare` in its folder, `layers` included.

    Raises StoreError where there is none.
    """
    path = Path(folder)
    try:
        lines = [json.loads(line) for line in (path / "plans.jsonl").read_text().splitlines()]
        table = pd.read_csv(path / "compare.csv", dtype={"strategy": str, "budget": str, "plan": str, "error": str})
    except FileNotFoundError as error:
        raise StoreError(f"there is no comparison in {path}; run `autocompress compare TASK --out {path}`") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"the comparison in {path} cannot be read: {error}; remove it to make it again") from error
    layers = {tuple(line[key] for key in KEYS): json.dumps(line["layers"]) for line in lines}
    table[["plan", "error"]] = table[["plan", "error"]].fillna("")
    return _typed(table.assign(layers=[layers.get((r.strategy, r.budget, r.seed), "") for r in table.itertuples()]))


def write_comparison(folder: Path, table: pd.DataFrame, plans: Iterable[str]) -> None:
    """compare.csv and plans.jsonl of a table. plans: the lines of the latter."""
    with atomic_path(folder / "compare.csv") as scratch:
        table.drop(columns="layers").to_csv(scratch, index=False, lineterminator="\n")
    with atomic_path(folder / "plans.jsonl") as scratch:
        scratch.write_text("".join(f"{line}\n" for line in plans))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the same types whatever is missing in it."""
    whole = dict.fromkeys(("bytes", "paper_bytes", "evaluations"), "Int64")
    real = dict.fromkeys(("predicted_loss", "bound", "gap", "kl", "metric", "seconds"), "float64")
    return table.astype({"seed": "int64", "budget_bytes": "int64", **whole, **real})


@dataclass(frozen=True)
class Row:
    """One row of the table with its plan, as JSON; `failure`: what is no row, but for whoever asked to raise."""

    values: Mapping[str, Any]
    layers: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    plan: str = ""
    failure: AutocompressError | None = None

    @property
    def at(self) -> tuple[str, str, int]:
        return self.values["strategy"], self.values["budget"], self.values["seed"]

    def record(self) -> dict[str, Any]:
        return {**self.values, "layers": json.dumps(self.layers) if self.layers else ""}

    @functools.cached_property
    def line(self) -> str:
        """The row's line of plans.jsonl."""
        return json.dumps(
            {**dict(zip(KEYS, self.at, strict=True)), "layers": self.layers, "plan": json.loads(self.plan)}
        )

    def to_json(self) -> str:
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.values.items()}
        return json.dumps({"row": values, "layers": self.layers, "plan": self.plan}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Row:
        """Inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        body = json.loads(text)
        values = dict(body["row"])
        for name in ("predicted_loss", "bound", "gap", "kl", "metric", "seconds"):
            values[name] = None if values[name] is None else float(values[name])
        layers = {name: (str(option), int(size)) for name, (option, size) in body["layers"].items()}
        return cls({name: values[name] for name in COLUMNS}, layers, body["plan"])


@dataclass
class Book:
    """The rows of a call, in the order of the table, and the store that they are kept in."""

    place: Path
    keep: bool
    asked: Sequence[tuple[str, str, int]]
    keys: Mapping[tuple[str, str, int], str | None]
    rows: dict[tuple[str, str, int], Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for at, key in self.keys.items():
            path = self._path(key)
            if key is None or not path.is_file():
                continue
            try:
                self.rows[at] = Row.from_json(path.read_text())
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{path} cannot be read: {error}; remove it to make it again") from error
        log.info("%d of %d rows are in the store already", len(self.rows), len(self.asked))
        self._write()

    def _path(self, key: str | None) -> Path:
        return self.place / "rows" / f"{key}.json"

    def missing(self) -> list[tuple[str, str, int]]:
        return [at for at in self.asked if at not in self.rows]

    def add(self, row: Row) -> None:
        key = self.keys[row.at]
        if self.keep and key is not None:
            with atomic_path(self._path(key)) as scratch:
                scratch.write_text(row.to_json())
        self.rows[row.at] = row
        self._write()

    def _write(self) -> None:
        if self.keep:
            rows = [self.rows[at] for at in self.asked if at in self.rows]
            write_comparison(self.place, self.table(), [row.line for row in rows if row.plan])

    def table(self) -> pd.DataFrame:
        known = [self.rows[at].record() for at in self.asked if at in self.rows]
        return _typed(pd.DataFrame.from_records(known, columns=[*COLUMNS, "layers"]))
