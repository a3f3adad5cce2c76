"""Task files: what is found in them, and one clear line for everything that can be wrong with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress.errors import CalibrationError, TaskError
from autocompress.tasks import load_task

GOOD = """
import torch
from torch import nn

def model():
    return nn.Linear(3, 2).train()

def calibration():
    return [torch.ones(4, 3)]
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a task file and returns its path; `beside` are other files in its folder."""

    def write(text: str, name: str = "mytask.py", **beside: str) -> Path:
        (tmp_path / name).write_text(text)
        for stem, other in beside.items():
            (tmp_path / f"{stem}.py").write_text(other)
        return tmp_path / name

    return write


def refused(spec: str | Path) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(spec)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_task_file_gives_a_model_in_eval_mode_and_batches(write: Write) -> None:
    path = write(GOOD)
    task = load_task(str(path))
    assert task.name == "mytask"
    assert load_task(task.source).name == task.name
    model = task.build_model()
    assert isinstance(model, nn.Linear)
    assert not model.training
    assert [batch.shape for batch in task.calibration_batches(seed=3)] == [(4, 3)]
    assert (task.evaluate, task.score, task.loss, task.training, task.example_input) == (None,) * 5


@pytest.mark.parametrize(
    ("signature", "expected"),
    [("seed", 7), ("seed=0", 7), ("*, seed=0", 7), ("sample", 7), ("n=5", 5), ("*args", ()), ("**rest", {})],
)
def test_the_seed_reaches_a_calibration_that_asks_for_one(write: Write, signature: str, expected: object) -> None:
    name = signature.split("=")[0].replace("*, ", "").strip("*")
    task = load_task(write(f"def model(): ...\ndef calibration({signature}): return [{name}]\n"))
    assert task.calibration_batches(seed=7) == [expected]


@pytest.mark.parametrize(
    "body", ["yield 1; yield 2", "return iter((1, 2))", "return DataLoader([1, 2], batch_size=None)"]
)
def test_batches_may_come_from_any_iterable(write: Write, body: str) -> None:
    task = load_task(write(f"from torch.utils.data import DataLoader\ndef model(): ...\ndef calibration(): {body}\n"))
    assert task.calibration_batches() == [1, 2]


def test_the_optional_functions(write: Write) -> None:
    text = """
def evaluate(model): return torch.tensor(91.5)
def score(model): return 3
def loss(model, batch): return model(batch[0]).sum()
def training(seed): yield [torch.full((1, 3), float(seed)), 0]
def example_input(): return torch.zeros(1, 3)
"""
    task = load_task(write(GOOD + text))
    model = task.build_model()
    assert task.evaluate is not None
    assert task.score is not None
    assert task.loss is not None
    assert task.example_input is not None
    assert (task.evaluate(model), type(task.evaluate(model)), task.score(model)) == (91.5, float, 3.0)
    (batch,) = task.training_batches(seed=2)
    assert batch[0].tolist() == [[2.0, 2.0, 2.0]]
    assert task.loss(model, batch).ndim == 0
    assert task.example_input().shape == (1, 3)


def test_a_module_that_can_be_imported_is_a_task(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(GOOD, name="a_task_module.py")
    monkeypatch.chdir(path.parent)
    before = list(sys.path)
    assert isinstance(load_task("a_task_module").build_model(), nn.Linear)
    assert sys.path == before


def test_a_file_may_import_its_neighbours_then_and_later(write: Write) -> None:
    text = """
import neighbour_early
def model(): return neighbour_early.net()
def calibration():
    import neighbour_late
    yield neighbour_late.VALUE
    import neighbour_later
    yield neighbour_later.VALUE
"""
    early = "from torch import nn\ndef net(): return nn.Identity()"
    path = write(text, neighbour_early=early, neighbour_late="VALUE = 5", neighbour_later="VALUE = 6")
    before = list(sys.path)
    task = load_task(path)
    assert sys.path == before
    assert isinstance(task.build_model(), nn.Identity)
    assert task.calibration_batches() == [5, 6]
    assert sys.path == before


def test_neighbours_of_the_same_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "loader_of_both.py").write_text(f"VALUE = {value}\n")
        (tmp_path / folder / "task.py").write_text(
            "import loader_of_both\ndef model(): ...\ndef calibration(): return [loader_of_both.VALUE]\n"
        )
    one, two = load_task(tmp_path / "one" / "task.py"), load_task(tmp_path / "two" / "task.py")
    assert (one.calibration_batches(), two.calibration_batches()) == ([1], [2])


def test_an_edited_file_is_read_again(write: Write) -> None:
    text = "def model(): ...\ndef calibration(): return [{}]\n"
    assert load_task(write(text.format(1))).calibration_batches() == [1]
    assert load_task(write(text.format(2))).calibration_batches() == [2]


def test_dataclasses_work_in_a_task_file(write: Write) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
    )
    assert load_task(write(text + GOOD)).name == "mytask"


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    assert "task file nowhere.py does not exist" in refused("nowhere.py")
    assert "is a folder; needed a Python file" in refused(tmp_path)
    assert "is not a Python file; its name must end in .py" in refused(tmp_path / "text.txt")
    assert refused("no_such_thing").startswith(
        "no task 'no_such_thing': not a file, not an importable module, not built in"
    )
    assert "no task 'json.no_such_thing'" in refused("json.no_such_thing")
    assert "task  cannot be imported: ValueError: Empty module name" in refused("")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ndef model(:\n", "syntax error in {path}, line 2: "),
        ("x = '\0'\n", "null bytes"),
        ("x = 1\n\nimport no_such_module_at_all\n", "cannot be imported, line 3: ModuleNotFoundError: No module named"),
        ("def f():\n    return 1 / 0\nf()\n", "cannot be imported, line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)\n", "cannot be imported, line 2: SystemExit: 3"),
        ("raise ValueError('one\\ntwo')\n", "cannot be imported, line 1: ValueError: one two"),
        ("from autocompress.errors import TaskError\nraise TaskError('no data')\n", "mytask.py: no data"),
        ("def calibration(): ...\n", "does not define model(); needed at least model() and calibration()"),
        ("def model(): ...\n", "does not define calibration(); needed at least model() and calibration()"),
        ("model = 3\ndef calibration(): ...\n", "model is an int; needed a function model()"),
        (
            "from torch import nn\nmodel = nn.ReLU()\ndef calibration(): ...\n",
            "model is a ReLU; needed a function model()",
        ),
        (GOOD + "evaluate = 'yes'\n", "evaluate is a str; needed a function evaluate()"),
        ("import broken_neighbour\n" + GOOD, "syntax error in {folder}/broken_neighbour.py, line 1: "),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(write: Write, text: str, words: str) -> None:
    path = write(text, broken_neighbour="def (")
    before = list(sys.path)
    assert words.format(path=path, folder=path.parent) in refused(path)
    assert sys.path == before


def test_a_model_that_is_not_one(write: Write) -> None:
    task = load_task(write("def model(): pass\ndef calibration(): return [1]\n"))
    with pytest.raises(TaskError, match=r"task mytask: model\(\) returned None; needed a torch.nn.Module"):
        task.build_model()


@pytest.mark.parametrize("body", ["return []", "return iter(())", "yield from ()", "return ()"])
def test_a_calibration_that_yields_nothing(write: Write, body: str) -> None:
    task = load_task(write(f"def model(): ...\ndef calibration(): {body}\n"))
    with pytest.raises(CalibrationError, match=r"task mytask: calibration\(\) yielded no batch; needed at least one"):
        task.calibration_batches()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("return torch.ones(4, 3)", "a Tensor"),
        ("return {'x': 1}", "a dict"),
        ("pass", "None"),
        ("return 'xy'", "a str"),
    ],
)
def test_a_calibration_that_returns_no_batches(write: Write, body: str, kind: str) -> None:
    task = load_task(write(f"import torch\ndef model(): ...\ndef calibration(): {body}\n"))
    with pytest.raises(TaskError, match=rf"calibration\(\) returned {kind}; needed an iterable of batches"):
        task.calibration_batches()


def test_what_the_functions_raise_names_them(write: Write) -> None:
    text = """
from autocompress.errors import TaskError
def model(): raise RuntimeError("first\\n  second")
def calibration():
    yield 1
    raise KeyError("pixels")
def training(): raise TaskError("no data here")
def evaluate(model): return "good"
def score(model): return torch_is_missing
"""
    task = load_task(write(text))
    with pytest.raises(TaskError, match=r"^task mytask: model\(\) failed: RuntimeError: first second$"):
        task.build_model()
    with pytest.raises(TaskError, match=r"^task mytask: calibration\(\) failed: KeyError: 'pixels'$"):
        task.calibration_batches()
    with pytest.raises(TaskError, match=r"^no data here$"):
        list(task.training_batches())
    assert task.evaluate is not None
    assert task.score is not None
    with pytest.raises(TaskError, match=r"^task mytask: evaluate\(model\) returned a str; needed one number$"):
        task.evaluate(nn.Identity())
    with pytest.raises(TaskError, match=r"^task mytask: score\(\) failed: NameError: name 'torch_is_missing'"):
        task.score(nn.Identity())


def test_a_task_without_training_says_so(write: Write) -> None:
    with pytest.raises(TaskError, match=r"task mytask does not define training\(\); this needs labelled batches"):
        next(load_task(write(GOOD)).training_batches())


def test_the_digits_are_built_in() -> None:
    task = load_task("digits")
    assert task.name == task.source == "digits"
    assert task.example_input is not None
    assert isinstance(task.example_input(), torch.Tensor)
