"""The command line: thin, over the verbs. Results on stdout, progress and errors on stderr.

Exit codes: 0 done; 2 the request, the task, the data or a file is wrong; 3 the budget is infeasible; 1 anything else;
130 interrupted. Every error is one line; `--debug`, anywhere on the line, shows the traceback.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from autocompress.estimating import Network
    from autocompress.profiling import Profile
    from autocompress.tasks import Task
    from autocompress.types import Plan

__all__ = ["app", "main"]

DEBUG = "--debug"


def main() -> None:
    """The console entry point."""
    if DEBUG in sys.argv:  # wherever it stands
        sys.argv[1:] = [DEBUG, *(a for a in sys.argv[1:] if a != DEBUG)]
    app()


class _Command(TyperCommand):
    """A command whose errors are one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted; a profile that was begun is taken up again by the same command", 130)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:  # the boundary: whatever it is, a line and a code
            if ctx.find_root().params.get("debug"):
                import traceback

                traceback.print_exception(error)
            fail(*explained(error))


def explained(error: BaseException) -> tuple[str, int]:
    """The one line and the exit code of an error."""
    from autocompress.errors import AutocompressError
    from autocompress.storage.errors import FormatError

    text = " ".join(str(error).split())
    if isinstance(error, AutocompressError):
        return text, error.exit_code
    if isinstance(error, FormatError):
        return text, 2
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror or text}", 2
    return f"{type(error).__name__}: {text or 'no message'} (unexpected; {DEBUG} shows where)", 1


def fail(message: str, code: int) -> NoReturn:
    """Say why on stderr, in one line, and end with a code."""
    print(f"autocompress: {message}", file=sys.stderr)
    raise typer.Exit(code)


app = typer.Typer(
    name="autocompress",
    help="Compress a trained network into a file that is within a budget, and prove how good the allocation is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
command = app.command

TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="A Python file or module with model() and calibration(), or `digits`; with --text, the folder of a model "
        "that transformers loads.",
    ),
]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `autocompress compress` wrote.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A model.acz.")]
BudgetOption = Annotated[str, typer.Option(help="Bytes (64000), a size (64kB, 64KiB), a ratio (12x), or 3.2bpw.")]
MacsOption = Annotated[
    str | None, typer.Option(metavar="N", help="At most so many MACs per sample, or 60% of the dense model's.")
]
BopsOption = Annotated[
    str | None, typer.Option(metavar="N", help="At most so many BOPs (bits x bits x MACs x density), or a percentage.")
]
LatencyOption = Annotated[
    str | None, typer.Option(metavar="MS", help="At most so many ms per sample in onnxruntime here, or a percentage.")
]
StrategyOption = Annotated[
    str, typer.Option(help="auto, exact, uniform, or another name of `strategies.STRATEGIES`; a wrong one lists them.")
]
EffortOption = Annotated[str, typer.Option(help="fast (one exact solve, nothing tuned), normal or max.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Picks the calibration sample and what of it is held out.")]
SequentialOption = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential",
        help="Compress layers anew on what the compressed ones before them produce (default: unless fast).",
    ),
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes; the result does not depend on it.")]
EngineOption = Annotated[
    str | None, typer.Option(help="inline, processes or ray: where layers are computed; the result is the same.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]
OptionsOption = Annotated[
    str | None,
    typer.Option("--options", help="What a layer may become: names (s75,2:4w8) or families (int8, nm, ..., all)."),
]
ExactLimitOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Layers whose exact pruning order takes more than N multiply-adds, rows x columns^3 / 3, have one order "
        "for all rows (default: 3e13, some six minutes of a core; docs/options.md).",
    ),
]
TextOption = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="For a model folder: the text to calibrate on.")
]
LengthOption = Annotated[
    int | None, typer.Option(min=1, help="For a model folder: tokens of one calibration sample (default: 128).")
]
SamplesOption = Annotated[int, typer.Option(min=2, help="For a model folder: how many calibration samples.")]
StreamOption = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="For a model folder: calibrate and profile one block at a time (default: if its weights fill a quarter of "
        "the memory).",
    ),
]
EvaluateOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A Python file with evaluate(model), instead of the task's own.")
]
TaskOption = Annotated[str | None, typer.Option("--task", metavar="TASK", help="The task, to run its model.")]


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from autocompress import __version__

        print(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        fail("no command; `autocompress --help` lists them", 2)


def _offered(options: str | None, task: str = "") -> list[Any] | None:
    """What --options names; without it, for a model folder, a fifth of the usual ones. Raises OptionError."""
    from autocompress.compressors import named_options

    if options is None and task and Path(task).is_dir():
        options = "lean,fine"
    return None if options is None else list(named_options([options]))


def _task(
    spec: str, text: Path | None = None, length: int | None = None, samples: int = 256, stream: bool | None = False
) -> Task:
    """The task of a file, a module or a model folder, whose model is streamed if that is wanted (None: if it is large).
    Raises TaskError.
    """
    from autocompress.errors import TaskError
    from autocompress.tasks import load_task

    if text is None and not (Path(spec).is_dir() or _looks_like_hub(spec)):
        if stream:
            raise TaskError(f"{spec!r} is no model folder, and only the weights of one can be streamed (--stream)")
        return load_task(spec)
    from autocompress.hf import model_task

    found = model_task(spec, text, length, samples)
    if stream is None or stream:
        from autocompress import streaming

        if stream or streaming.too_large(spec):
            return dataclasses.replace(found, model=lambda: streaming.streamed_model(spec))
    return found


def _warn_if_large(spec: str, instead: str) -> None:
    """Say on stderr that a model folder is one that `compress` and `profile` would stream, where nothing can be."""
    from autocompress import streaming

    if Path(spec).is_dir() and streaming.too_large(spec):
        print(
            f"autocompress: warning: the weights in {spec}, as float32, are more than {streaming.SHARE:.0%} of this "
            f"machine's memory; {instead}",
            file=sys.stderr,
        )


def _looks_like_hub(spec: str) -> bool:
    """Whether a name that is no file may be that of a model on the hub, owner/name."""
    parts = spec.split("/")
    return len(parts) == 2 and all(parts) and not spec.endswith(".py") and not Path(parts[0]).exists()


def _counted(offered: list[Any] | None) -> dict[str, int]:
    """What --options changes in a forecast: how many a layer has, `dense` among them."""
    return {} if offered is None else {"options_per_layer": len({*map(str, offered), "dense"})}


@command(cls=_Command)
def demo(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("runs/demo"),
    budget: BudgetOption = "10x",
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """The embedded default, end to end: a network that reads handwritten digits, at a tenth of its size."""
    from autocompress.demo import run_demo

    with _progress() as progress:
        result = run_demo(out, budget, seed, workers, progress)
    _show_result(result, as_json, "on 400 digits that nothing else ever saw", table=True)


@command(cls=_Command)
def compress(
    task: TaskArgument,
    budget: BudgetOption,
    out: Annotated[Path, typer.Option(help="Where model.acz, plan.json, report.html, metrics.json go.")],
    max_macs: MacsOption = None,
    max_bops: BopsOption = None,
    max_latency_ms: LatencyOption = None,
    store: Annotated[Path | None, typer.Option(help="Where the profile is kept (default: OUT/profile).")] = None,
    strategy: StrategyOption = "auto",
    effort: EffortOption = "normal",
    sequential: SequentialOption = None,
    options: OptionsOption = None,
    text: TextOption = None,
    length: LengthOption = None,
    samples: SamplesOption = 256,
    stream: StreamOption = None,
    evaluate: EvaluateOption = None,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    engine: EngineOption = None,
    exact_limit: ExactLimitOption = None,
    as_json: JsonOption = False,
    dry_run: DryOption = False,
) -> None:
    """Calibrate, profile, plan, apply, and write a file within the budget, with its account."""
    from autocompress import pipeline
    from autocompress.engines import check_engine
    from autocompress.tasks import load_evaluate

    wanted = pipeline.check_request(_limits(budget, max_macs, max_bops, max_latency_ms), strategy, effort)
    check_engine(engine)
    offered = _offered(options, task)
    found = _task(task, text, length, samples, stream)
    metric = found.evaluate if evaluate is None else load_evaluate(evaluate)
    model, data = found.build_model(), found.calibration_batches(seed)
    if dry_run:
        _show_facts(pipeline.forecast(model, data, wanted, out, store, offered or ()) | _counted(offered), as_json)
        return
    with _progress() as progress:
        result = pipeline.compress(
            model,
            data,
            wanted,
            evaluate=metric,
            strategy=strategy,
            effort=effort,
            seed=seed,
            out=out,
            store=store,
            options=offered,
            workers=workers,
            engine=engine,
            loss=found.loss,
            progress=progress,
            task=task,
            sequential=sequential,
            example=None if found.example_input is None else found.example_input(),
            training=found.labelled_batches(seed),
            embedding=found.embedding,
            exact_limit=exact_limit,
        )
    _show_result(result, as_json)


@command(cls=_Command)
def profile(
    task: TaskArgument,
    store: Annotated[Path, typer.Option(help="Where the profile is kept; a begun one is taken up again.")],
    options: OptionsOption = None,
    text: TextOption = None,
    length: LengthOption = None,
    samples: SamplesOption = 256,
    stream: StreamOption = None,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    engine: EngineOption = None,
    exact_limit: ExactLimitOption = None,
    as_json: JsonOption = False,
    dry_run: DryOption = False,
) -> None:
    """Measure error and bytes of every option of every layer, once for all budgets and strategies."""
    from autocompress import pipeline
    from autocompress.engines import check_engine
    from autocompress.planning import size_range

    check_engine(engine)
    offered = _offered(options, task)
    found = _task(task, text, length, samples, stream)
    model, data = found.build_model(), found.calibration_batches(seed)
    if dry_run:
        _show_facts(pipeline.forecast(model, data, None, None, store, offered or ()) | _counted(offered), as_json)
        return
    with _progress() as progress:
        made = pipeline.profiled(model, data, seed, store, offered, workers, progress, engine, exact_limit)
    low, high = size_range(made)
    facts = {
        "layers": len(made.layers),
        "options": sum(len(layer.rows) for layer in made.layers.values()),
        "smallest_bytes": low,
        "dense_bytes": high,
        "original_bytes": made.template.dense_bytes,
        "left_alone": dict(made.skipped),
        "not_reached": [name for name, layer in made.layers.items() if not layer.reached],
        "one_order_for_all_rows": [name for name in made.layers if made.method(name) == "shared"],
        "fingerprint": made.fingerprint,
        "store": str(store),
    }
    _show_facts(facts, as_json)


@command(cls=_Command)
def plan(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A profile store, or a folder that compress wrote.")],
    budget: BudgetOption,
    max_macs: MacsOption = None,
    max_bops: BopsOption = None,
    max_latency_ms: LatencyOption = None,
    strategy: StrategyOption = "exact",
    effort: EffortOption = "normal",
    seed: SeedOption = 0,
    task: TaskOption = None,
    text: TextOption = None,
    length: LengthOption = None,
    samples: SamplesOption = 256,
    out: Annotated[Path | None, typer.Option(help="Write the plan there, as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose one option per layer from a profile. With --task the plan is measured on data the Hessians never saw."""
    from autocompress import pipeline, strategies
    from autocompress.profiling import load_profile

    wanted = pipeline.check_request(_limits(budget, max_macs, max_bops, max_latency_ms), strategy, effort)
    place = folder / "profile" if (folder / "profile" / "profile.json").is_file() else folder
    made = load_profile(place, held=task is not None)  # a plan by itself needs neither Hessians nor traces
    context = None
    if task is not None:
        from autocompress.comparing import task_context

        found = _task(task, text, length, samples)
        context = task_context(found, seed, effort)
        if wanted.latency_ms is not None:
            from autocompress.timing import timed

            example = found.calibration_batches(seed)[0] if found.example_input is None else found.example_input()
            made = timed(made, context.model, example)
    with _progress() as progress:
        progress("plan", 0, 1)
        chosen = strategies.plan(made, wanted, pipeline.strategy_for(strategy, effort), context).replace(seed=seed)
        progress("plan", 1, 1)
    if out is not None:
        from autocompress.saving import write_text

        write_text(out, chosen.to_json())
    if as_json:
        print(chosen.to_json(), end="")
    else:
        _show_plan(chosen, made)
        if out is not None:
            _console().print(f"written to {out}", highlight=False, soft_wrap=True)


@command(cls=_Command)
def compare(
    task: TaskArgument,
    budgets: Annotated[
        list[str],
        typer.Option("--budget", "--budgets", help="A budget, or several joined by commas: 8x,12x,64kB; repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="Where compare.csv, plans.jsonl, compare.html go; rows there are kept.")],
    strategies: Annotated[str | None, typer.Option(help="Strategies, joined by commas (default: all).")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas; each has a profile of its own.")] = "0",
    effort: Annotated[str, typer.Option(help="How often searches may run the model: fast, normal or max.")] = "normal",
    options: OptionsOption = None,
    text: TextOption = None,
    length: LengthOption = None,
    samples: SamplesOption = 256,
    evaluate: EvaluateOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
    dry_run: DryOption = False,
) -> None:
    """Compare strategies at budgets: predicted and measured loss, metric, seconds; every plan is kept."""
    from autocompress import pipeline
    from autocompress.reporting import render_comparison
    from autocompress.saving import write_text
    from autocompress.strategies import STRATEGIES

    names = list(STRATEGIES) if strategies is None else [name.strip() for name in strategies.split(",")]
    limits = [limit for given in budgets for limit in _each_budget(given)]
    wanted = [pipeline.check_request(limit, name, effort) for limit in limits for name in names[:1]]
    for name in names:
        pipeline.check_request(wanted[0], name, effort)
    draws = [_seed(draw) for draw in seeds.split(",")]
    offered = _offered(options, task)
    found = _task(task, text, length, samples)
    if evaluate is not None:
        found = found.evaluated_by(evaluate)
    _warn_if_large(task, "compare does not stream, and each of its --workers holds them and a compressed copy")
    model, data = found.build_model(), found.calibration_batches(draws[0])
    facts = [pipeline.forecast(model, data, budget, out, None, offered or ()) for budget in wanted]
    if dry_run:
        sizes = {str(budget): fact.get("budget_bytes") for budget, fact in zip(wanted, facts, strict=True)}
        rows = {"budgets": sizes, "strategies": names, "seeds": draws, "rows": len(wanted) * len(names) * len(draws)}
        kept = {key: value for key, value in facts[0].items() if key not in ("budget_bytes", "profile")}
        _show_facts(kept | _counted(offered) | rows, as_json)
        return
    with _progress() as progress:
        table = pipeline.compare_seeds(found, wanted, names, draws, effort, out, offered, workers, progress)
    write_text(out / "compare.html", render_comparison(table, task))
    _show_comparison(table, out, as_json)


@command(cls=_Command)
def verify(folder: FolderArgument, task: TaskOption = None, as_json: JsonOption = False) -> None:
    """Check a result: budget, checksums, options, figures. With --task: that it loads and scores the same."""
    from autocompress.reporting.tables import facts_table
    from autocompress.verifying import verify as verified

    found = verified(folder, None if task is None else _task(task, stream=None if Path(task).is_dir() else False))
    if as_json:
        _print_json({"good": found.good, "checks": [vars(c) for c in found.checks]})
    else:
        marks = {f"{'ok  ' if c.good else 'FAIL'} {c.name}": c.found for c in found.checks}
        _console().print(facts_table(marks))
    found.require()


@command(cls=_Command)
def unpack(file: FileArgument, out: Annotated[Path, typer.Option(help="The safetensors file to write.")]) -> None:
    """Write a file's tensors dense, as safetensors that any tool reads."""
    from autocompress.reporting.rows import amount
    from autocompress.saving import unpack as unpacked

    size = unpacked(file, out)
    _console().print(f"{out}: {amount(size)}", highlight=False, soft_wrap=True)


@command(cls=_Command)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compress wrote, or a model.acz.")],
    out: Annotated[Path, typer.Option(help="The file to write; for compressed-tensors, the folder.")],
    format: Annotated[str, typer.Option("--format", help="onnx, compressed-tensors or safetensors.")] = "onnx",
    task: TaskOption = None,
    budget: Annotated[str | None, typer.Option(help="What all written files together may have.")] = None,
    lossless_only: Annotated[
        bool, typer.Option(help="Refuse what the format cannot hold; else map it, naming the layers.")
    ] = True,
    weights: Annotated[str, typer.Option(help="auto (what fits the codes), int4, int8; onnx: or dense.")] = "auto",
    matmul_nbits: Annotated[bool, typer.Option(help="onnx: linear layers as MatMulNBits.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a result in a format that runtimes read: ONNX, compressed-tensors or safetensors."""
    import warnings

    from autocompress.exporting import CompressedTensors, ExportWarning, Onnx, exporter_named
    from autocompress.exporting import export as exported

    found = None if task is None else _task(task)
    exporter = exporter_named(format)
    if isinstance(exporter, Onnx):
        exporter = Onnx(weights=weights, matmul_nbits=matmul_nbits)
    elif isinstance(exporter, CompressedTensors) and weights in ("int4", "int8"):
        exporter = CompressedTensors(bits=int(weights[3:]))
    elif weights != "auto" or matmul_nbits:
        fail(f"--weights {weights} and --matmul-nbits say nothing about {exporter.name}", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)  # said below, in our words
        info = exported(
            folder,
            None if found is None else found.build_model(),
            exporter,
            out,
            example=None if found is None or found.example_input is None else found.example_input(),
            budget=budget,
            lossless_only=lossless_only,
        )
    for note in info.notes:
        print(f"autocompress: warning: {note}", file=sys.stderr)
    facts: dict[str, Any] = {
        "written": ", ".join(map(str, info.files)),
        "bytes": info.bytes,
        **{f"layers as {kind}": names for kind, names in info.by_kind().items()},
        **info.facts,
    }
    _show_facts(facts, as_json)


@command(cls=_Command)
def inspect(file: FileArgument, as_json: JsonOption = False) -> None:
    """Show where every byte of a file goes."""
    from autocompress.reporting.rows import file_parts
    from autocompress.reporting.tables import file_table
    from autocompress.storage import read

    with read(file) as archive:
        parts = file_parts(archive)
    if as_json:
        _print_json({"bytes": sum(part.bytes for part in parts), "parts": [part.to_json() for part in parts]})
    else:
        _console().print(file_table(parts))


@command(cls=_Command)
def report(
    folder: FolderArgument,
    store: Annotated[Path | None, typer.Option(help="The profile's store, where it is not DIR/profile.")] = None,
) -> None:
    """Make report.html again from plan.json, metrics.json, model.acz and the profile."""
    from autocompress.profiling import load_profile
    from autocompress.reporting import render_report
    from autocompress.saving import write_text
    from autocompress.verifying import read_metrics, read_plan

    chosen, metrics = read_plan(folder), read_metrics(folder)
    made = load_profile(store or folder / "profile")
    write_text(folder / "report.html", render_report(chosen, made, metrics, folder / "model.acz"))
    _console().print(f"{folder / 'report.html'} written", highlight=False, soft_wrap=True)


@command(cls=_Command)
def costs(
    task: TaskArgument,
    matmul_nbits: Annotated[bool, typer.Option(help="Linear layers as MatMulNBits.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what layers cost to run: MACs, and milliseconds in onnxruntime here for every form of a weight."""
    from autocompress.exporting import Onnx
    from autocompress.reporting.tables import times_table
    from autocompress.tasks import load_task
    from autocompress.timing import Runtime, Timer, all_forms, require_runtime

    require_runtime()
    found = load_task(task)
    example = found.calibration_batches(0)[0] if found.example_input is None else found.example_input()
    timer = Timer(found.build_model(), example, Runtime(exporter=Onnx(matmul_nbits=matmul_nbits)))
    with _progress() as progress:
        dense_ms, cells = timer.table(all_forms(timer), progress=lambda *at: progress("time layers", *at))
    if as_json:
        _print_json(
            {
                "dense_ms": dense_ms,
                "cells": [vars(c) for c in cells],
                "macs": timer.macs,
                "facts": timer.runtime.facts(),
            }
        )
    else:
        _console().print(times_table(dense_ms, cells, timer.macs, timer.runtime.facts()))


@command(cls=_Command)
def precrop(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(help="Where widths.json and model.safetensors, untrained, go.")],
    params: Annotated[str | None, typer.Option(metavar="N", help="At most so many parameters, or 50%.")] = None,
    macs: MacsOption = None,
    budget: Annotated[str | None, typer.Option(help="Bytes, or a ratio (2x), of the network as float32.")] = None,
    method: Annotated[str, typer.Option(help="programme, synflow or uniform.")] = "programme",
    round_to: Annotated[int, typer.Option(min=1, help="Widths are multiples of so many channels.")] = 1,
    widest: Annotated[float, typer.Option(help="Largest ratio of a width; above 1 layers may grow (PreConfig).")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Draws the weights.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a narrower network to train: widths within a budget, the weights new."""
    from safetensors.torch import save_file

    from autocompress.files import atomic_path
    from autocompress.layers import stored_tensors
    from autocompress.precropping import precrop as precropped
    from autocompress.saving import write_text
    from autocompress.tasks import load_task

    found = precropped(
        load_task(task),
        budget,
        params=params,
        macs=macs,
        method=method,
        round_to=round_to,
        widest=widest,
        seed=seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "model.safetensors") as scratch:
        save_file({name: tensor.contiguous() for name, tensor in stored_tensors(found.model).items()}, scratch)
    write_text(out / "widths.json", found.to_json())
    facts = {
        **{name: f"{getattr(found, name):,} of {dense:,}" for name, dense in found.dense.items()},
        "widths": {name: f"{now} of {given}" for name, (given, now) in found.widths.items()},
        "keep their width": dict(found.kept),
        "value": found.value,
        "found by": found.method,
        "written": f"{out}/: widths.json, model.safetensors",
    }
    if math.isfinite(found.bound):
        facts["no widths are above"] = found.bound
    if as_json:
        print(found.to_json(), end="")
    else:
        _show_facts(facts, False)


@command(cls=_Command)
def doctor(
    estimate: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Minutes, memory and disk of a profile of TASK, a model folder (--text), or a Llama's config.json.",
        ),
    ] = None,
    options: OptionsOption = None,
    text: TextOption = None,
    length: LengthOption = None,
    workers: WorkersOption = None,
    exact_limit: ExactLimitOption = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Calibration samples: of a model folder (256), with a config.json (128).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="With a config.json: tokens of each.")] = 2048,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine offers: versions, cores, caches, the data folder. With --estimate: what a profile takes."""
    from autocompress.doctor import diagnose
    from autocompress.reporting.tables import facts_table

    if estimate is not None:
        network = _described(estimate, text, length, samples, tokens)
        _show_facts(_estimated(network, _offered(options, estimate), workers, exact_limit), as_json)
        return
    found = diagnose()
    if as_json:
        _print_json({name: {"good": good, "found": text} for name, (good, text) in found.items()})
    else:
        _console().print(
            facts_table({f"{'ok  ' if good else 'FAIL'} {name}": text for name, (good, text) in found.items()})
        )
    if bad := [name for name, (good, _) in found.items() if not good]:
        fail(f"{', '.join(bad)}: see above", 1)


def _described(task: str, text: Path | None, length: int | None, samples: int | None, tokens: int) -> Network:
    """What the estimate needs of a task, a model folder or a config.json."""
    from autocompress import estimating

    if task.endswith(".json"):
        return estimating.llama(task, samples or 128, tokens)
    found = _task(task, text, length, samples or 256)
    _warn_if_large(task, "an estimate loads them; that of its config.json, where it is a Llama's, does not")
    return estimating.network_of(found.build_model(), found.calibration_batches(0))


def _estimated(
    network: Network, offered: list[Any] | None, workers: int | None, exact_limit: float | None
) -> dict[str, Any]:
    from autocompress import estimating

    with _progress() as progress:
        progress("measure this machine", 0, 1)
        rates = estimating.measured_rates()
        progress("measure this machine", 1, 1)
    limit = {} if exact_limit is None else {"exact_limit": exact_limit}
    expected = estimating.estimate(network, rates, workers, offered, **limit)
    return {
        "layers": len(network.units),
        "weights": sum(unit.weights for unit in network.units),
        "calibration_samples": network.samples,
        "workers": expected.workers,
        "minutes": round(expected.minutes, 3),
        "minutes_calibrating": round(expected.calibrate_seconds / 60.0, 3),
        "minutes_of_largest_layer": round(expected.tasks[0] / 60.0, 3) if expected.tasks else 0.0,
        "memory_bytes": expected.memory_bytes,
        "memory_bytes_of_each_worker": expected.worker_bytes,
        **({} if expected.streaming_bytes is None else {"memory_bytes_block_by_block": expected.streaming_bytes}),
        "disk_bytes": expected.disk_bytes,
    }


def _limits(budget: str, macs: str | None, bops: str | None, latency_ms: str | None) -> str:
    """All limits as the text of one budget."""
    running = {"macs": macs, "bops": bops, "latency_ms": latency_ms}
    return ",".join([budget, *(f"{name}={value or 0}" for name, value in running.items() if value is not None)])


def _each_budget(text: str) -> list[str]:
    """Budgets joined by commas, of which each may limit running costs too: `8x,bops=5%,12x` are two."""
    found: list[str] = []
    for part in text.split(","):
        if "=" in part and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _seed(text: str) -> int:
    if not text.strip().isdecimal():
        fail(f"--seeds has {text!r}; needed whole numbers from 0, joined by commas", 2)
    return int(text)


def _console() -> Any:
    from rich.console import Console

    # Off a terminal nothing should be cut at 80 columns: a pipe has no width.
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def _progress() -> Any:
    from autocompress.reporting.progress import Stages

    return Stages()


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, allow_nan=False))


def _show_facts(facts: dict[str, Any], as_json: bool) -> None:
    from autocompress.reporting.tables import fact_text, facts_table

    if as_json:
        _print_json(facts)
    else:
        _console().print(facts_table({k.replace("_", " "): fact_text(k, v) for k, v in facts.items()}))


def _show_plan(chosen: Plan, made: Profile) -> None:
    from autocompress.reporting.rows import layer_rows
    from autocompress.reporting.tables import facts_table, plan_facts, plan_table

    console = _console()
    console.print(plan_table(layer_rows(chosen, made), chosen.fixed_bytes))
    console.print(facts_table(plan_facts(chosen, made)))


def _known(value: Any) -> Any:
    """A cell of a table in JSON: null for what is not known, and for a number that is not finite."""
    return value if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)) else None


def _show_comparison(table: Any, out: Path, as_json: bool) -> None:
    from autocompress.comparing import summary
    from autocompress.reporting.tables import comparison_table, facts_table, no_plans

    if as_json:
        rows = table.drop(columns="layers").to_dict("records")
        _print_json({"rows": [{k: _known(v) for k, v in row.items()} for row in rows], "out": str(out)})
    else:
        console = _console()
        console.print(comparison_table(summary(table)))
        for line in no_plans(table):
            console.print(line, highlight=False, markup=False, style="dim")
        console.print(facts_table({"written": f"{out}/: compare.csv, plans.jsonl, compare.html"}))
    if (table["error"] != "").all():
        code = 3 if table["error"].str.startswith("InfeasibleError").all() else 2
        fail(f"no strategy has a plan at any of these budgets; the first says: {table['error'].iloc[0]}", code)


def _show_result(result: Any, as_json: bool, where: str = "", table: bool = False) -> None:
    from autocompress.reporting.rows import layer_rows
    from autocompress.reporting.tables import facts_table, plan_table, result_facts

    if as_json:
        _print_json(result.metrics)
        return
    console = _console()
    if table:
        console.print(plan_table(layer_rows(result.plan, result.profile), result.plan.fixed_bytes))
    facts = result_facts(result.plan, result.metrics, where)
    console.print(facts_table({**facts, "written": f"{result.out}/: model.acz, plan.json, metrics.json, report.html"}))


if __name__ == "__main__":
    main()
