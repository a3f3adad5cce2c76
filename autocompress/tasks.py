"""What a user hands in: a Python file or module with `model()`, `calibration()` and whatever else it can offer.

    model()                  -> a trained nn.Module
    calibration()            -> batches, without labels or with; or calibration(seed), where the seed picks the sample
    evaluate(model)          -> float, higher is better; it reports, and no choice ever depends on it
    score(model)             -> float, higher is better, on validation data; choices may use it
    loss(model, batch)       -> scalar tensor
    training()               -> labelled batches; or training(seed)
    example_input()          -> one batch
    embedding(output, batch) -> tensor, one row per sample, where the model's output is not scores of classes: what the
                                model puts out for a batch as plans are judged by it, by squared distance

The last six are optional. `load_task` finds them and turns everything that can go wrong inside them into one line that
names the function and the task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autocompress.errors import AutocompressError, CalibrationError, TaskError

if TYPE_CHECKING:
    import torch

__all__ = ["BUILTIN_TASKS", "Task", "load_evaluate", "load_task"]

BUILTIN_TASKS = {"digits": "autocompress.digits"}
_REQUIRED = ("model", "calibration")
_OPTIONAL = ("evaluate", "score", "loss", "training", "example_input", "embedding")


@dataclass(frozen=True)
class Task:
    """The functions of one task, None where it does not define one. Whatever they raise arrives as a TaskError.

    `name` is for people and folders, `source` says where it is from. `folder` is where a task file finds its
    neighbours. `recipe` makes the task again, in another process too: it can be pickled.
    """

    name: str
    source: str
    folder: Path | None
    model: Callable[[], torch.nn.Module]
    calibration: Callable[..., Iterable[Any]]
    evaluate: Callable[[torch.nn.Module], float] | None = None
    score: Callable[[torch.nn.Module], float] | None = None
    loss: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None
    training: Callable[..., Iterable[Any]] | None = None
    example_input: Callable[[], Any] | None = None
    embedding: Callable[[Any, Any], torch.Tensor] | None = None
    recipe: Callable[[], Task] | None = None

    def evaluated_by(self, path: str | Path) -> Task:
        """This task with the evaluate(model) of a Python file for its own. Raises TaskError as `load_evaluate` does."""
        recipe = None if self.recipe is None else functools.partial(_evaluated_by, self.recipe, path)
        return dataclasses.replace(self, evaluate=load_evaluate(path), recipe=recipe)

    def build_model(self) -> torch.nn.Module:
        """A fresh `model()` in eval mode. Raises TaskError if that is not an nn.Module."""
        import torch

        model = self.model()
        if not isinstance(model, torch.nn.Module):
            raise TaskError(f"task {self.name}: model() returned {_kind(model)}; needed a torch.nn.Module")
        return model.eval()

    def calibration_batches(self, seed: int = 0) -> list[Any]:
        """All batches of `calibration(seed)`, or of `calibration()` where it takes no seed.

        Raises TaskError if it fails or returns something else than batches, CalibrationError if there are none.
        """
        batches = list(self._batches("calibration", self.calibration, seed))
        if not batches:
            raise CalibrationError(f"task {self.name}: calibration() yielded no batch; needed at least one")
        return batches

    def training_batches(self, seed: int = 0) -> Iterator[Any]:
        """The batches of `training(seed)` or `training()`, one by one. Raises TaskError if there are none."""
        if self.training is None:
            raise TaskError(f"task {self.name} does not define training(); this needs labelled batches")
        return self._batches("training", self.training, seed)

    def labelled_batches(self, seed: int = 0) -> Iterable[Any] | None:
        """The same, from the first one again whenever they are iterated; None where the task has none."""
        return None if self.training is None else _Labelled(self, seed)

    def _batches(self, what: str, function: Callable[..., Iterable[Any]], seed: int) -> Iterator[Any]:
        batches = _call_with_seed(function, seed)
        # A tensor or a dict can be iterated too, into rows or keys, which would go wrong much later.
        wrong = isinstance(batches, str | bytes | Mapping) or hasattr(batches, "shape")
        try:
            iterator = iter(() if wrong else batches)
        except TypeError:
            wrong, iterator = True, iter(())
        if wrong:
            raise TaskError(
                f"task {self.name}: {what}() returned {_kind(batches)}; needed an iterable of batches, as in [batch]"
            )
        advance = _guarded(functools.partial(next, iterator, _END), what, self.name, self.folder)
        while (batch := advance()) is not _END:
            yield batch


def _evaluated_by(recipe: Callable[[], Task], path: str | Path) -> Task:
    return recipe().evaluated_by(path)


_END = object()


class _Labelled:
    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def __iter__(self) -> Iterator[Any]:
        return self.task.training_batches(self.seed)


def load_task(spec: str | Path) -> Task:
    """The task of a Python file, an importable module, or a built-in name (`digits`).

    A file may import modules that lie beside it. Raises TaskError, in one line, if there is no such task, if importing
    it fails (with the line), or if it does not define `model()` and `calibration()`.
    """
    source = str(spec)
    if source in BUILTIN_TASKS:
        name, folder, module = source, None, importlib.import_module(BUILTIN_TASKS[source])
    elif source.endswith(".py") or (source and Path(source).exists()):
        path = Path(source)
        name, folder, module = path.stem, path.resolve().parent, _import_file(path)
    else:
        name, folder, module = source, None, _import_module(source)

    functions: dict[str, Any] = {}
    for what in _REQUIRED + _OPTIONAL:
        function = getattr(module, what, None)
        if function is None and what in _REQUIRED:
            raise TaskError(f"task {source} does not define {what}(); needed at least model() and calibration()")
        if function is not None and (not callable(function) or _is_instance_of_module(function)):
            raise TaskError(f"task {source}: {what} is {_kind(function)}; needed a function {what}() that returns it")
        functions[what] = None if function is None else _guarded(function, what, name, folder)
    for what in ("evaluate", "score"):
        if functions[what] is not None:
            functions[what] = _returning_float(functions[what], what, name)
    return Task(name=name, source=source, folder=folder, recipe=functools.partial(load_task, source), **functions)


def load_evaluate(path: str | Path) -> Callable[[torch.nn.Module], float]:
    """The function evaluate(model) of a Python file, which needs nothing else. Raises TaskError as `load_task` does."""
    file = Path(path)
    function = getattr(_import_file(file), "evaluate", None)
    if not callable(function):
        raise TaskError(f"{path} does not define evaluate(model); needed a function that returns one number")
    guarded = _guarded(function, "evaluate", file.stem, file.resolve().parent)
    return _returning_float(guarded, "evaluate", file.stem)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise TaskError(f"task file {path} {found}; needed a Python file that defines model() and calibration()")
    location = str(path.resolve())
    name = f"autocompress_task_{path.stem}_{hashlib.sha256(location.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, location)
    if spec is None:
        raise TaskError(f"task file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    _forget_strangers(path.resolve().parent)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        with _importable(path.resolve().parent):
            # Compiled here and not by the loader, whose byte-code cache misses an edit within the same second.
            exec(compile(path.read_bytes(), location, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # a user's file may raise anything while it is imported
        del sys.modules[name]
        raise _import_failure(str(path), location, error) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        # Only "No module named <name>, or a package above it" means that the task is not there.
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name is not None
            and f"{name}.".startswith(f"{error.name}.")
        ):
            known = ", ".join(BUILTIN_TASKS)
            raise TaskError(
                f"no task {name!r}: not a file, not an importable module, not built in ({known})"
            ) from error
        raise _import_failure(name, None, error) from error


def _import_failure(source: str, location: str | None, error: BaseException) -> TaskError:
    """One line for an import that failed, with the last line of the task's own file that was running."""
    if isinstance(error, AutocompressError):
        return TaskError(f"task {source}: {_one_line(error)}")
    if isinstance(error, SyntaxError) and error.filename is not None:
        where = source if error.filename == location else error.filename
        return TaskError(f"task {source}: syntax error in {where}, line {error.lineno}: {error.msg}")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == location]
    where = f", line {lines[-1]}" if lines else ""
    return TaskError(f"task {source} cannot be imported{where}: {type(error).__name__}: {_one_line(error)}")


def _guarded(function: Callable[..., Any], what: str, name: str, folder: Path | None) -> Callable[..., Any]:
    """The function, with whatever it raises as a TaskError, and able to import what lies in `folder`."""

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with _importable(folder):
                return function(*args, **kwargs)
        except AutocompressError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise TaskError(f"task {name}: {what}() failed: {type(error).__name__}: {_one_line(error)}") from error

    return call


def _returning_float(function: Callable[..., Any], what: str, name: str) -> Callable[..., float]:
    @functools.wraps(function)
    def call(model: Any) -> float:
        value = function(model)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TaskError(f"task {name}: {what}(model) returned {_kind(value)}; needed one number") from error

    return call


@contextlib.contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """Within the block, modules that lie in `folder` can be imported by their plain names, before any others."""
    if folder is None:
        yield
        return
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _forget_strangers(folder: Path) -> None:
    """Forget modules that another task imported from beside itself and that have the name of one in `folder`."""
    for path in folder.glob("*.py"):
        file = getattr(sys.modules.get(path.stem), "__file__", None)
        if file is not None and Path(file).parent != folder and str(Path(file).parent) not in sys.path:
            del sys.modules[path.stem]


def _call_with_seed(function: Callable[..., Any], seed: int) -> Any:
    """`function(seed)` if it has a parameter of that name, or a first one without a default; else `function()`."""
    parameters = inspect.signature(function).parameters
    if "seed" in parameters:
        return function(seed=seed)
    first = next(iter(parameters.values()), None)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if first is not None and first.kind in positional and first.default is inspect.Parameter.empty:
        return function(seed)
    return function()


def _is_instance_of_module(value: object) -> bool:
    # An nn.Module is callable, and `model = Net()` an easy slip; a class `model` is fine: calling it makes the network.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _kind(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= limit else text[: limit - 1] + "…"
