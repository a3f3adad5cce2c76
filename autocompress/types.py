"""The vocabulary: what may happen to a layer (`Option`), what is allowed (`Budget`), what was decided (`Plan`).

All three are frozen values whose text form is exact: `Option.parse(str(o)) == o`, `Budget.parse(str(b)) == b`,
`Plan.from_json(p.to_json()) == p`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from autocompress.errors import BudgetError, MismatchError, OptionError

__all__ = ["DENSE", "MIXED_WIDTHS", "RUNNING_COSTS", "Budget", "Option", "Plan", "exact", "option_sort_key"]


def _number(value: float) -> str:
    """Shortest text that reads back as the same float: 75, 97.5, 0.031."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


_NUM = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_OPTION = re.compile(
    rf"(?:n(?P<width_in>{_NUM})/(?P<width_out>{_NUM})(?:-(?=\d+:)|(?![\d.e])))?"
    rf"(?:(?P<coder>rd|tcq)\((?P<step>{_NUM}),(?P<lam>{_NUM})\))?"
    rf"(?:s(?P<sparsity>{_NUM})|(?P<n>\d+):(?P<m>\d+)"
    rf"|blk(?:(?P<block_rows>\d+)x)?(?P<block>\d+)@(?P<block_sparsity>{_NUM})"
    rf"|(?:k(?P<groups>\d+)r(?P<group_rank>\d+)|rank(?P<rank>\d+))(?P<plain>p)?"
    rf"|ch(?P<channels>{_NUM})|out(?P<out>{_NUM})"
    rf"|(?:kq|pq(?P<vector>\d+)x)(?P<words>\d+)(?:@(?P<price>{_NUM}))?(?P<plain_words>p)?)?"
    r"(?:w(?P<bits>\d+)(?:(?P<tensor>t)|g(?P<group>\d+))?(?P<asymmetric>a)?(?P<minmax>m)?|fp(?P<float>8|16)"
    rf"|mix(?P<mix>{_NUM}(?:/{_NUM})*))?"
)
MOST_WORDS = 65536
MIXED_WIDTHS = (0, 2, 4, 6, 8)  # bits of the rows of a `mix` option, in the order of its percentages


@dataclass(frozen=True)
class Option:
    """What may happen to one layer: a structure (what is kept) and a representation of the values that are kept.

    Structure, at most one; percentages are of what goes:
      `s75`      `sparsity`: 75% of the layer's weights
      `2:4`      `nm` = (kept, group): of 4 consecutive input channels at one kernel position, at most 2 are kept
      `blk4@50`  `block` weights at a time, along the input channels as above, `sparsity` percent of all weights;
                 `blk2x4@50`: the same for `block_rows` = 2 consecutive outputs at once
      `ch50`     `channels`: whole input channels;  `out50`  `out`: whole output channels
      `rank32`   two thinner layers, `rank` channels between them, of least error on the inputs;  `k4r12`: of `rank`
                 channels for each of `groups` equal runs of input channels;  `rank32p`, `k4r12p`: `plain`, from the
                 singular vectors of the weight alone;  `rank4w6+s75w4`: beside these a third layer, `residual`, of
                 the shape of the whole and with any other option, for what they leave of the weight
      `pq4x64w6`  a codebook: each `vector` = 4 consecutive weights of a row, as they are stored, become one of
                 `words` = 64 vectors, the same for the whole layer, of least error on the inputs; their numbers are on
                 the grid of the bits that follow.  `pq4x64@1w6`: `price` of a bit of their indices, in units of the
                 error that a weight has without one.  `kq64w6`: of the weights of one kernel.  `pq4x64pw6`, `kq64pw6`:
                 `plain`, by distance alone
    Values, at most one:
      `w4`       `bits`: uniform grid of 2^bits levels, symmetric around 0 (codes -8 ... 7; `w1`: -1 and 1), one scale
                 per output row, found by its error. Suffixes, in this order: `t` one scale for the layer, or `g128` one
                 for each `group` = 128 consecutive weights of a row (over input channels and kernel positions, as they
                 are stored); `a` `asymmetric`: the range need not be symmetric, but holds 0 (`w1a`: 0 and one other
                 value); `m` `minmax`: the range of the weights as it is, not searched. `w4g128am` has all.
      `fp16`     `half`: binary16;  `fp8`: e4m3 times a scale per output row
      `rd(0.25,0.1)`  rate-distortion codes, before the structure: `step` in units of the layer's root mean square
                 weight, `lam` the price of a bit in units of the mean error of a step (see `obs.rate_distortion_cells`)
      `tcq(0.34,0.4)`  the same on a `trellis`: each code's parity picks the quantiser of the next one (see
                 `obs.trellis_codes`); goes with no structure
      `mix25/0/25/50/0`  percentages of the output rows at 0, 2, 4, 6 and 8 bits, the least important rows first; a row
                 at 0 bits is pruned, the others have a grid each, as `w4` has; goes with no structure
    Channels, in front of all that, unless a low-rank option or `mix` follows:
      `n75/50` `width`: the layer is really narrower, with 75 % of its input channels, what stays refitted, and 50 % of
                 its outputs (100: all; see `narrowing.Widths`): `n75/50w4` is w4 on what stays, `n75/50` floats;
                 a dash stands before N:M, as in `n75/50-2:4`
    Without any, float32: `s75` is pruned and refitted, `dense` is the layer as it is. Raises OptionError where that
    does not hold.

    >>> str(Option(sparsity=75, bits=4)), Option.parse("rd(0.031,0.2)s60").lam, str(Option.parse("2:4w8g64a").structure)
    ('s75w4', 0.2, '2:4')
    """

    sparsity: float = 0.0
    nm: tuple[int, int] | None = None
    block: int | None = None
    rank: int | None = None
    groups: int | None = None
    channels: float | None = None
    bits: int | None = None
    group: int | None = None
    step: float | None = None
    lam: float | None = None
    trellis: bool = False
    half: bool = False
    block_rows: int = 1
    out: float | None = None
    per_tensor: bool = False
    asymmetric: bool = False
    minmax: bool = False
    fp8: bool = False
    mix: tuple[float, ...] | None = None
    plain: bool = False
    width: tuple[float, float] | None = None
    words: int | None = None
    vector: int | None = None
    price: float = 0.0
    residual: Option | None = None

    def __post_init__(self) -> None:
        self._validate(str(self))

    def __str__(self) -> str:
        coder = "tcq" if self.trellis else "rd"
        text = "" if self.width is None else f"n{_number(self.width[0])}/{_number(self.width[1])}"
        text += f"{coder}({_number(self.step)},{_number(self.lam or 0.0)})" if self.step is not None else ""
        if self.nm is not None:
            text += "-" * (self.width is not None) + f"{self.nm[0]}:{self.nm[1]}"
        elif self.block is not None:
            rows = f"{self.block_rows}x" if self.block_rows != 1 else ""
            text += f"blk{rows}{self.block}@{_number(self.sparsity)}"
        elif self.groups is not None:
            text += f"k{self.groups}r{self.rank}" + "p" * self.plain
        elif self.rank is not None:
            text += f"rank{self.rank}" + "p" * self.plain
        elif self.words is not None:
            text += ("kq" if self.vector is None else f"pq{self.vector}x") + str(self.words)
            text += (f"@{_number(self.price)}" if self.price else "") + "p" * self.plain
        elif self.channels is not None:
            text += f"ch{_number(self.channels)}"
        elif self.out is not None:
            text += f"out{_number(self.out)}"
        elif self.sparsity:
            text += f"s{_number(self.sparsity)}"
        if self.bits is not None:
            text += f"w{self.bits}" + ("t" if self.per_tensor else "" if self.group is None else f"g{self.group}")
            text += "a" * self.asymmetric + "m" * self.minmax
        text += "fp16" * self.half + "fp8" * self.fp8
        if self.mix is not None:
            text += "mix" + "/".join(map(_number, self.mix))
        if self.residual is not None:
            text += f"+{self.residual}"
        return text or "dense"

    @property
    def is_dense(self) -> bool:
        return self == DENSE

    @property
    def inner(self) -> Option:
        """What is done to the layer that stays: the option without its width."""
        return self if self.width is None else dataclasses.replace(self, width=None)

    @property
    def structure(self) -> Option:
        """Which weights are kept, alone: the option without its representation of values, and without its width."""
        return Option(
            sparsity=self.sparsity,
            nm=self.nm,
            block=self.block,
            rank=self.rank,
            groups=self.groups,
            channels=self.channels,
            block_rows=self.block_rows,
            out=self.out,
            plain=self.plain,
            words=self.words,
            vector=self.vector,
            price=self.price,
        )

    @classmethod
    def parse(cls, text: str) -> Option:
        """Inverse of `str`. Raises OptionError, naming the text, if it is not the name of an option."""
        if text == "dense":
            return DENSE
        match = _OPTION.fullmatch(text)
        front, _, behind = text.partition("+")
        if match is None and front and behind:
            return dataclasses.replace(cls.parse(front), residual=cls.parse(behind))
        if not text or match is None:
            raise OptionError(
                f"{text!r} is not an option; known look like dense, fp16, w4, s75w4, 2:4w8, rd(0.25,0.1)s60"
            )
        got = match.groupdict()

        def number(key: str) -> float | None:
            return None if got[key] is None else float(got[key])

        def integer(key: str) -> int | None:
            return None if got[key] is None else int(got[key])

        sparsity = number("sparsity") or number("block_sparsity") or 0.0
        return cls(
            sparsity=sparsity,
            nm=(int(got["n"]), int(got["m"])) if got["n"] else None,
            block=integer("block"),
            rank=integer("rank") if got["rank"] else integer("group_rank"),
            groups=integer("groups"),
            channels=number("channels"),
            bits=integer("bits"),
            group=integer("group"),
            step=number("step"),
            lam=number("lam"),
            half=got["float"] == "16",
            block_rows=int(got["block_rows"] or "1"),
            out=number("out"),
            per_tensor=got["tensor"] is not None,
            asymmetric=got["asymmetric"] is not None,
            minmax=got["minmax"] is not None,
            fp8=got["float"] == "8",
            trellis=got["coder"] == "tcq",
            mix=None if got["mix"] is None else tuple(map(float, got["mix"].split("/"))),
            plain=got["plain"] is not None or got["plain_words"] is not None,
            width=None if got["width_in"] is None else (float(got["width_in"]), float(got["width_out"])),
            words=integer("words"),
            vector=integer("vector"),
            price=number("price") or 0.0,
        )

    def _validate(self, text: str) -> None:
        def need(condition: bool, what: str) -> None:
            if not condition:
                raise OptionError(f"option {text!r}: {what}")

        structures = [
            self.nm,
            self.rank,
            self.channels,
            self.out,
            self.words,
            self.sparsity or None if self.block is None else self.block,
        ]
        need(
            sum(value is not None for value in structures) <= 1,
            "at most one structure: s, N:M, blk, rank, k..r, ch, out, kq or pq",
        )
        rest = self.residual
        need(rest is None or self.rank is not None, "what is left belongs to a low rank, as in rank4w6+s75w4")
        need(
            rest is None
            or not (rest.is_dense or rest.rank is not None or rest.width is not None or rest.mix is not None),
            "what is left takes any option but dense, rank, n and mix",
        )
        values = [self.bits is not None, self.step is not None, self.half, self.fp8, self.mix is not None]
        need(sum(values) <= 1, "at most one representation of the values: w, rd, fp16, fp8 or mix")
        need(self.groups is None or self.rank is not None, "channel groups need a rank, as in k4r12")
        coded = self.words is not None
        need(
            self.rank is not None or coded or not self.plain, "plain needs factors or a codebook, as in rank32p, kq64p"
        )
        need(coded or (self.vector is None and not self.price), "a vector and a price need words, as in pq4x64@1w6")
        grid = self.group is not None or self.per_tensor or self.asymmetric or self.minmax
        need(not (coded and grid), "the numbers of a codebook have one symmetric grid: w6 has no suffix")
        need(self.words is None or 4 <= self.words <= MOST_WORDS, f"{self.words} words, needed 4 to {MOST_WORDS}")
        need(not coded or not any(values[1:]), "the numbers of a codebook are integers, as in kq64w6")
        need(self.vector is None or 2 <= self.vector <= MOST_WORDS, f"a vector of {self.vector}, needed 2 or more")
        need(0 <= self.price < math.inf, f"price is {self.price}, needed a number that is not negative")
        need(not self.plain or not self.price, "plain codebooks know no price of a bit")
        need(self.bits is not None or self.group is None, "a group of scales needs bits, as in w4g128")
        grid = self.per_tensor or self.asymmetric or self.minmax
        need(self.bits is not None or not grid, "per_tensor, asymmetric and minmax need bits, as in w4tam")
        need(self.group is None or not self.per_tensor, "one scale per tensor and one per group exclude each other")
        need(self.block is not None or self.block_rows == 1, "rows of a block need its columns, as in blk2x4@50")
        need((self.step is None) == (self.lam is None), "rate-distortion codes need both numbers, as in rd(0.25,0.1)")
        need(not self.trellis or self.step is not None, "a trellis needs a step and lam, as in tcq(0.34,0.4)")
        need(not self.trellis or not any(v is not None for v in structures), "tcq finds its zeros itself: no structure")
        if self.mix is not None:
            need(not any(v is not None for v in structures), "mix prunes rows itself: no structure")
            widths = "/".join(map(str, MIXED_WIDTHS))
            need(len(self.mix) == len(MIXED_WIDTHS), f"mix needs a percentage for each of {widths} bits")
            total = math.fsum(self.mix)
            need(min(self.mix) >= 0 and abs(total - 100) <= 1e-9, f"percentages sum to {total:g}, needed 100")
        if self.width is not None:
            need(all(0 < w <= 100 for w in self.width), "widths are above 0 and at most 100 percent")
            need(self.width != (100, 100), "a layer of full width has no width, as in w4")
            need(
                self.rank is None and self.mix is None and self.words is None,
                "a narrower layer takes no rank, no mix and no codebook",
            )
        need(0 <= self.sparsity <= 100, f"sparsity is {self.sparsity:g}, needed between 0 and 100 percent")
        need(self.channels is None or 0 <= self.channels < 100, "channels must be at least 0 and below 100 percent")
        need(self.out is None or 0 <= self.out < 100, "out must be at least 0 and below 100 percent")
        need(self.bits is None or 1 <= self.bits <= 8, f"{self.bits} bits, needed 1 to 8")
        need(self.step is None or 0 < self.step < math.inf, f"step is {self.step}, needed a positive number")
        need(self.lam is None or 0 <= self.lam < math.inf, f"lam is {self.lam}, needed a number that is not negative")
        need(self.nm is None or 0 < self.nm[0] < self.nm[1], "N:M needs 0 < N < M")
        for name in ("block", "block_rows", "rank", "groups", "group"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"{name} is {value}, needed at least 1")


DENSE = Option()


def option_sort_key(option: Option) -> tuple[bool, str]:
    """A total order for deterministic tables: dense first, then by name."""
    return (not option.is_dense, str(option))


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_BUDGET = re.compile(rf"\s*(?P<value>{_NUM})\s*(?P<unit>[a-zA-Z]*)\s*")
RUNNING_COSTS = ("macs", "bops", "latency_ms")  # of a forward pass; everything else that a budget limits is bytes


@dataclass(frozen=True)
class Budget:
    """What the result may cost; every limit that is given holds at once.

    `size` in bytes of the whole file; `ratio`: the dense file's bytes divided by it (see `types.Budget.bytes`);
    `bits_per_weight`: bits of the whole file over the number of parameters in it; `macs`, `bops`, `latency_ms` of one
    forward pass of one sample (see `costs`), each a number or a percentage of what the dense model takes (`"60%"`).

    >>> str(Budget.parse("64 kB")), Budget.parse("12x").ratio, Budget.parse("64 KiB").size
    ('64000', 12.0, 65536)
    >>> Budget.parse("12x, bops=5%").limit("bops", dense=1000)
    50.0
    """

    size: int | None = None
    ratio: float | None = None
    bits_per_weight: float | None = None
    macs: float | str | None = None
    bops: float | str | None = None
    latency_ms: float | str | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}
        if not given:
            raise BudgetError('an empty budget; give one, for example size=64_000, or "64 kB", "12x", "3.2bpw"')
        for name, value in given.items():
            if name in RUNNING_COSTS and isinstance(value, str):
                object.__setattr__(self, name, _share(name, value))
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise BudgetError(f"budget {name} is {value!r}; needed a positive, finite number")
        if self.size is not None and self.size != int(self.size):
            raise BudgetError(f"budget size is {self.size!r}; needed a whole number of bytes")

    @classmethod
    def of(cls, value: Budget | str | int | float | Mapping[str, Any]) -> Budget:
        """Whatever a user may write where a budget is wanted. Raises BudgetError."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            known = [f.name for f in dataclasses.fields(cls)]
            if unknown := [key for key in value if key not in known]:
                raise BudgetError(f"{unknown[0]!r} is not a budget; known are {', '.join(known)}")
            return cls(**value)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise BudgetError(f"budget is {value!r}; needed bytes, or text like '64 kB', '12x', '3.2bpw'")
        return cls(size=_whole(value, value)) if isinstance(value, int | float) else cls.parse(value)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Inverse of `str`: `64000`, `64 kB` (1000), `64 KiB` (1024), `12x`, `3.2bpw`, `macs=1e9`, `bops=5%`,
        `latency_ms=3`; several joined by `,`.

        Raises BudgetError.
        """
        fields: dict[str, Any] = {}
        value: Any
        for part in str(text).split(","):
            key, _, rest = part.partition("=")
            name, value = key.strip(), rest.strip()
            if not (rest and name in RUNNING_COSTS):
                name, value = cls._parse_size(part, text)
            if name in fields:
                raise BudgetError(f"budget {text!r} gives {name} twice")
            fields[name] = value
        return cls(**fields)

    @staticmethod
    def _parse_size(part: str, text: str) -> tuple[str, float]:
        match = _BUDGET.fullmatch(part)
        unit = match["unit"].lower() if match else ""
        if match is None or unit not in {"", "x", "bpw", *_UNITS}:
            raise BudgetError(f"{text!r} is not a budget; write bytes (64000), a size (64 kB, 64 KiB), 12x, or 3.2bpw")
        value = float(match["value"])
        if not math.isfinite(value) or value <= 0:
            raise BudgetError(f"budget is {text!r}; needed a positive, finite number")
        if unit == "x":
            return "ratio", value
        if unit == "bpw":
            return "bits_per_weight", value
        # Exact, as 64.1 * 1000 in floats is a little less than 64,100.
        return "size", math.floor(Fraction(match["value"]) * _UNITS.get(unit, 1))

    def __str__(self) -> str:
        parts = []
        if self.size is not None:
            parts.append(str(int(self.size)))
        if self.ratio is not None:
            parts.append(f"{_number(self.ratio)}x")
        if self.bits_per_weight is not None:
            parts.append(f"{_number(self.bits_per_weight)}bpw")
        for name in RUNNING_COSTS:
            if (value := getattr(self, name)) is not None:
                parts.append(f"{name}={value if isinstance(value, str) else _number(value)}")
        return ",".join(parts)

    def limit(self, name: str, dense: float) -> float | None:
        """The limit on `macs`, `bops` or `latency_ms`, of which the dense model takes `dense`; None where there is
        none.
        """
        value = getattr(self, name)
        return None if value is None else amount(name, value, dense)

    def bytes(self, dense_bytes: int, parameters: int) -> int | None:
        """The tightest limit on the file in bytes, rounded down; None if only other costs are limited.

        dense_bytes: the floating-point tensors of the state dict as fp32 in a safetensors file without metadata.
        """
        limits = []
        if self.size is not None:
            limits.append(int(self.size))
        if self.ratio is not None:
            limits.append(math.floor(dense_bytes / exact(self.ratio)))
        if self.bits_per_weight is not None:
            limits.append(math.floor(exact(self.bits_per_weight) * parameters / 8))
        return min(limits) if limits else None


def exact(value: float) -> Fraction:
    """The number as it was written, 2.3 and not 2.29999..., so that rounding down never loses a byte to the float."""
    return Fraction(repr(float(value)))


def _share(name: str, text: str) -> float | str:
    """A limit on a running cost as it is kept: a number, or a percentage as its shortest text."""
    match = re.fullmatch(rf"\s*({_NUM})\s*(%?)\s*", text)
    value = float(match[1]) if match else math.nan
    if match is None or not math.isfinite(value) or value <= 0:
        raise BudgetError(f"budget {name} is {text!r}; needed a positive number, or a percentage such as 60%")
    return f"{_number(value)}%" if match[2] else value


def amount(name: str, value: float | str, dense: float) -> float:
    """A limit as a number: the value itself, or that percentage of what the dense model takes. Raises BudgetError.

    >>> amount("params", "50%", dense=1000), amount("params", 300, dense=1000)
    (500.0, 300.0)
    """
    known = _share(name, value if isinstance(value, str) else repr(value))
    return float(known[:-1]) * dense / 100.0 if isinstance(known, str) else known


def _whole(value: float, text: object) -> int:
    if not math.isfinite(value) or value <= 0:
        raise BudgetError(f"budget is {text!r}; needed a positive, finite number of bytes")
    return math.floor(value)


PLAN_SCHEMA = 2


@dataclass(frozen=True)
class Plan:
    """One option per layer, what it was chosen for, and how good it is.

    `budget_bytes` bounds the whole file; `predicted_bytes` is its length (exact); `fixed_bytes` is the part that no
    choice changes. `predicted_loss` is the objective of `strategy`; `bound` a lower bound on it over all allocations of
    the same profile whose weights fit into what the header of this file leaves, `gap` = (predicted_loss -
    bound)/|bound| (inf where nothing is proven).
    `realised` is empty unless sequential mode compressed the layers anew: {layer: {error, bytes, width, nonzero}} of
    what it made (`row_bits` too, where rows have widths of their own), which `layers` and `predicted_bytes` describe;
    loss, bound and gap stay those of the first plan.
    `measured` holds figures from a slice of calibration data that the Hessians never saw (empty: unmeasured).
    `fingerprint` names the profile. `vector_bits` per value of norms and biases (16: half precision).
    """

    layers: Mapping[str, Option]
    budget: Budget
    budget_bytes: int
    strategy: str
    predicted_loss: float
    predicted_bytes: int
    fixed_bytes: int
    bound: float
    gap: float
    fingerprint: str
    seed: int = 0
    vector_bits: int = 16
    measured: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    realised: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        return bool(self.measured)

    def replace(self, **changes: Any) -> Plan:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Deterministic JSON with a schema version; numbers that are not finite are written as text."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body["layers"] = {name: str(option) for name, option in self.layers.items()}
        body["budget"] = str(self.budget)
        body["measured"] = {k: _finite(v) for k, v in self.measured.items()}
        body["notes"] = list(self.notes)
        for name in ("predicted_loss", "bound", "gap"):
            body[name] = _finite(body[name])
        return json.dumps({"schema": PLAN_SCHEMA, **body}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of `to_json`. Raises MismatchError if the text is not a plan of this schema."""
        try:
            body = json.loads(text)
            if not isinstance(body, dict) or body.get("schema") != PLAN_SCHEMA:
                got = body.get("schema") if isinstance(body, dict) else type(body).__name__
                raise MismatchError(f"plan schema is {got!r}, this version reads {PLAN_SCHEMA}")
            body.pop("schema")
            for name in ("predicted_loss", "bound", "gap"):
                body[name] = float(body[name])
            body["layers"] = {name: Option.parse(option) for name, option in body["layers"].items()}
            body["budget"] = Budget.parse(body["budget"])
            body["measured"] = {k: float(v) for k, v in body["measured"].items()}
            body["notes"] = tuple(body["notes"])
            body["realised"] = {
                name: {
                    "error": float(made["error"]),
                    **{key: int(made[key]) for key in ("bytes", "width", "nonzero")},
                    **({"row_bits": int(made["row_bits"])} if "row_bits" in made else {}),
                }
                for name, made in body.get("realised", {}).items()
            }
            for name in ("budget_bytes", "predicted_bytes", "fixed_bytes", "seed", "vector_bits"):
                if type(body.get(name)) is not int:
                    raise MismatchError(f"this is not a plan: {name} is {body.get(name)!r}, needed a whole number")
            return cls(**body)
        except KeyError as error:
            raise MismatchError(f"this is not a plan: it lacks {error}") from error
        except (TypeError, AttributeError, ValueError) as error:  # of json, Option and Budget too
            raise MismatchError(f"this is not a plan: {error}") from error


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
