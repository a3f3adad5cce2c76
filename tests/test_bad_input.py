"""Everything that a user can get wrong: one line that says what, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_tasks import CALIBRATION, MODEL, call, contents, write_task

import autocompress as ac
from autocompress.storage import read


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good result in `out`, its task in task.py."""
    folder = tmp_path_factory.mktemp("done")
    outcome = call("compress", write_task(folder), "--budget", "4x", "--out", folder / "out", "--workers", 1)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("12 parsecs", "'12 parsecs' is not a budget; write bytes"),
        ("0", "budget is '0'; needed a positive, finite number"),
        ("-5", "'-5' is not a budget"),
        ("nan", "'nan' is not a budget"),
        ("inf", "'inf' is not a budget"),
        ("0x", "budget is '0x'; needed a positive"),
        ("", "'' is not a budget"),
        ("4x,4x", "gives ratio twice"),
        ("4x,macs=ten", "budget macs is 'ten'; needed a positive number, or a percentage"),
    ],
)
@pytest.mark.parametrize("verb", ["compress", "plan"])
def test_a_budget_that_is_not_one(tmp_path: Path, done: Path, verb: str, budget: str, words: str) -> None:
    given = (write_task(tmp_path), "--out", tmp_path / "out") if verb == "compress" else (done / "out",)
    assert words in call(verb, *given, "--budget", budget).refused(2)
    assert not (tmp_path / "out").exists()


def test_a_budget_is_looked_at_before_the_task_is_imported(tmp_path: Path) -> None:
    assert "parsecs" in call("compress", "no_such.py", "--budget", "12 parsecs", "--out", tmp_path).refused(2)


@pytest.mark.parametrize(("flag", "words"), [("--strategy", "there is no strategy 'x'"), ("--effort", "effort is 'x'")])
def test_unknown_names(tmp_path: Path, flag: str, words: str) -> None:
    assert words in call("compress", "no_such.py", "--budget", "4x", "--out", tmp_path, flag, "x").refused(2)


def test_an_infeasible_budget_says_the_smallest_that_is_not(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    message = call("compress", task, "--budget", "10 B", "--out", tmp_path / "out").refused(3)
    found = re.search(r"no allocation fits in 10 bytes: the smallest file has ([\d,]+) bytes \(([\d.]+)x\)", message)
    assert found, message
    assert not (tmp_path / "out").exists(), "a hopeless budget is refused before the profile is made"
    smallest = int(found[1].replace(",", ""))
    for budget in (str(smallest), f"{found[2]}x"):
        outcome = call("compress", task, "--budget", budget, "--out", tmp_path / "out")
        assert outcome.code == 0, outcome.err
    store = tmp_path / "out" / "profile"
    full = call("plan", store, "--budget", smallest - 1).refused(3)
    assert f"the smallest file has {found[1]} bytes" in full, "the quick look and the profile name the same size"
    kept = contents(tmp_path / "out")
    again = call("compress", task, "--budget", smallest - 1, "--out", tmp_path / "out").refused(3)
    assert "the smallest file has" in again
    assert contents(tmp_path / "out") == kept
    assert "no single option" in call("plan", store, "--budget", smallest - 1, "--strategy", "uniform").refused(3)


def test_layers_without_data_are_named_as_the_reason(tmp_path: Path) -> None:
    parts = MODEL.replace("self.head =", "self.spare = nn.Linear(40, 40)\n        self.head =")
    message = call(
        "compress", write_task(tmp_path, model=parts), "--budget", "1000", "--out", tmp_path / "out"
    ).refused(3)
    assert "1 layers that calibration never reached have only options that need no data (at least 1," in message


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"model": "import torch"}, "does not define model()"),
        ({"calibration": ""}, "does not define calibration()"),
        ({"model": "def model(): return 3\n"}, "model() returned an int; needed a torch.nn.Module"),
        ({"model": "def model(): raise KeyError('weights')\n"}, "model() failed: KeyError: 'weights'"),
        ({"calibration": "def calibration(): return []\n"}, "calibration() yielded no batch"),
        ({"calibration": "def calibration():\n    if False: yield\n"}, "calibration() yielded no batch"),
        (
            {"calibration": "def calibration(): return [torch.zeros(4, 3, 6, 6)]\n"},
            "the model cannot take a batch of float32 (",
        ),
        ({"calibration": "def calibration(): return [torch.zeros(0, 1, 6, 6)]\n"}, "batch 0 is empty"),
        ({"calibration": "def calibration(): return ['x']\n"}, "batch 0 is str; needed a tensor"),
        (
            {"calibration": "def calibration(): return [torch.full((8, 1, 6, 6), float('nan'))]\n"},
            "layer 'conv' receives values that are NaN",
        ),
        (
            {"model": MODEL.replace("self.head(", "self.head(x.new_tensor(float('inf')) * ")},
            "layer 'head' receives values that are NaN, infinite",
        ),
        (
            {
                "model": MODEL.replace(
                    "return Tiny().eval()", "net = Tiny(); net.wide.weight.data[0] = float('nan')\n        return net"
                )
            },
            "layer 'wide' has weights that are NaN or infinite",
        ),
        (
            {"model": "import torch\ndef model(): return torch.nn.Sequential(torch.nn.ReLU())\n"},
            "the model has nothing to compress (it has no layer with a weight matrix)",
        ),
        ({"evaluate": "def evaluate(model): return 'good'\n"}, "evaluate(model) returned a str; needed one number"),
        ({"evaluate": "def evaluate(model): return float('nan')\n"}, "needed a finite number"),
        (
            {"evaluate": "def evaluate(model): raise OSError('no test set')\n"},
            "evaluate() failed: OSError: no test set",
        ),
        ({"evaluate": "def evaluate(model:\n"}, "syntax error in"),
    ],
)
def test_a_task_that_is_wrong(tmp_path: Path, parts: dict[str, str], words: str) -> None:
    task = write_task(tmp_path, **parts)
    assert words in call("compress", task, "--budget", "4x", "--out", tmp_path / "out" / "deep").refused(2)
    assert not (tmp_path / "out").exists(), "a folder that was made for nothing stays behind"


def test_a_task_that_is_not_there(tmp_path: Path) -> None:
    assert "task file x/none.py does not exist" in call("profile", "x/none.py", "--store", tmp_path).refused(2)
    assert "no task 'nonesuch'" in call("profile", "nonesuch", "--store", tmp_path).refused(2)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"model": MODEL.replace("SEED = 0", "SEED = 7")}, "field 'model': the profile in"),
        ({"calibration": CALIBRATION.replace("DATA_SEED = 1", "DATA_SEED = 2")}, "field 'data': the profile in"),
    ],
)
def test_a_profile_of_something_else(tmp_path: Path, done: Path, parts: dict[str, str], words: str) -> None:
    task, kept = write_task(tmp_path, **parts), contents(done / "out")
    out = tmp_path / "out"
    message = call("compress", task, "--budget", "4x", "--out", out, "--store", done / "out" / "profile").refused(2)
    assert words in message
    assert not out.exists()
    assert words in call("compress", task, "--budget", "4x", "--out", done / "out").refused(2)
    assert words in call("profile", task, "--store", done / "out" / "profile").refused(2)
    assert contents(done / "out") == kept


def test_a_plan_measured_on_another_model(tmp_path: Path, done: Path) -> None:
    task = write_task(tmp_path, model=MODEL.replace("SEED = 0", "SEED = 7"))
    assert "field 'model'" in call("plan", done / "out", "--budget", "4x", "--task", task).refused(2)


def test_a_strategy_that_needs_the_model(done: Path) -> None:
    assert "give a context" in call("plan", done / "out", "--budget", "4x", "--strategy", "kl").refused(2)


def test_a_profile_that_is_not_there_or_not_finished(tmp_path: Path, done: Path) -> None:
    assert "there is no profile in" in call("plan", tmp_path, "--budget", "4x").refused(2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["inspect", "unpack", "verify"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "other", "missing", "folder"])
def test_a_file_that_is_damaged(tmp_path: Path, done: Path, verb: str, damage: str) -> None:
    folder, good = tmp_path / "out", done / "out"
    folder.mkdir()
    data = bytearray((good / "model.acz").read_bytes())
    for name in ("plan.json", "metrics.json"):
        (folder / name).write_bytes((good / name).read_bytes())
    path = folder / "model.acz"
    if damage == "truncated":
        path.write_bytes(data[:-7])
    elif damage == "altered":
        data[-20] ^= 4
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        path.write_text("not one of ours, but long enough to be looked at")
    elif damage == "folder":
        path.mkdir()
    extra = ("--out", tmp_path / "dense.safetensors") if verb == "unpack" else ()
    message = call(verb, folder if verb == "verify" else path, *extra).refused(2)
    words = {
        "truncated": "bytes announced, the file has",
        "altered": "does not match its checksum",
        "empty": "the file is empty",
        "other": "not an autocompress file",
        "missing": "model.acz",
        "folder": "model.acz",
    }[damage]
    assert words in message
    assert not (tmp_path / "dense.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "before", "after", "words"),
    [
        ("plan.json", '"schema": 2', '"schema": 99', "plan schema is 99"),
        ("plan.json", '"layers"', '"leyers"', "this is not a plan"),
        ("plan.json", "{", "", "this is not a plan"),
        ("plan.json", '"conv": "', '"conv": "huge', "plan.json: this is not a plan: 'huge"),
        ("plan.json", '"conv": "', '"conv": "rd(0.5,0.1)s97', "this is not a plan: "),
        ("metrics.json", "{", "", "is not JSON"),
        ("metrics.json", '"bytes"', '"octets"', "lacks bytes"),
        ("metrics.json", '"bytes": ', '"bytes": 1', "metrics: bytes is 1"),
    ],
)
def test_verify_refuses_records_that_were_changed(
    tmp_path: Path, done: Path, name: str, before: str, after: str, words: str
) -> None:
    for path in contents(done / "out"):
        (tmp_path / path).write_bytes((done / "out" / path).read_bytes())
    text = (tmp_path / name).read_text()
    assert before in text
    (tmp_path / name).write_text(text.replace(before, after, 1))
    assert words in call("verify", tmp_path).refused(2)


def test_verify_names_an_option_that_is_not_the_plans(tmp_path: Path, done: Path) -> None:
    for path in contents(done / "out"):
        (tmp_path / path).write_bytes((done / "out" / path).read_bytes())
    plan = ac.Plan.from_json((tmp_path / "plan.json").read_text())
    changed = plan.replace(layers={**plan.layers, "head": ac.Option(bits=3, sparsity=42.0)})
    (tmp_path / "plan.json").write_text(changed.to_json())
    assert "options: head: " in (message := call("verify", tmp_path).refused(2))
    assert "in the file, s42w3 in plan.json" in message


def test_verify_names_a_layer_whose_bytes_are_not_those_that_were_realised(tmp_path: Path, done: Path) -> None:
    for path in contents(done / "out"):
        (tmp_path / path).write_bytes((done / "out" / path).read_bytes())
    plan = ac.Plan.from_json((tmp_path / "plan.json").read_text())
    with read(tmp_path / "model.acz") as archive:
        size = archive["head.weight"].bytes
    for claimed in (size, size + 1):
        changed = plan.replace(realised={"head": {"bytes": claimed, "error": 0.0, "width": 4, "nonzero": 5}})
        (tmp_path / "plan.json").write_text(changed.to_json())
        if claimed == size:
            assert call("verify", tmp_path).code == 0
        else:
            words = f"options: head: {size:,} bytes in the file, {claimed:,} in plan.json"
            assert words in call("verify", tmp_path).refused(2)


def test_a_file_of_another_architecture(tmp_path: Path, done: Path) -> None:
    other = write_task(tmp_path, model=MODEL.replace("nn.Linear(8, 3)", "nn.Linear(8, 4)"))
    message = call("verify", done / "out", "--task", other).refused(2)
    assert "belongs to another architecture than Tiny" in message
    assert "'head.weight' is (3, 8) in the file and (4, 8) in the model" in message
    renamed = write_task(tmp_path, model=MODEL.replace("self.wide", "self.broad"))
    assert "the file lacks 'broad.bias'" in call("verify", done / "out", "--task", renamed).refused(2)


def test_a_metric_that_is_not_the_recorded_one(tmp_path: Path, done: Path) -> None:
    other = write_task(tmp_path, evaluate="def evaluate(model): return 12.5\n")
    assert "metric: 12.5 now" in call("verify", done / "out", "--task", other).refused(2)


@pytest.mark.parametrize("place", ["file/out", "file", "/proc/out"])
def test_an_output_folder_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    out = Path(place) if place.startswith("/") else tmp_path / place
    task = write_task(tmp_path)
    assert f"cannot write in the output folder {out}" in call("compress", task, "--budget", "4x", "--out", out).refused(
        2
    )
    assert "cannot be written" in call("compress", task, "--budget", "4x", "--out", out, "--dry-run").refused(2)
    assert "cannot make the profile store" in call("profile", task, "--store", out).refused(2)
    assert (tmp_path / "file").read_text() == "a file, not a folder"


def test_single_files_that_cannot_be_written(tmp_path: Path, done: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x"
    assert "cannot write" in call("unpack", done / "out" / "model.acz", "--out", place).refused(2)
    assert "cannot write" in call("plan", done / "out", "--budget", "4x", "--out", place).refused(2)


@pytest.mark.parametrize("allowed", range(0, 40, 3))
def test_a_disk_that_fills_up(tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """The disk is full from the n-th file on: results of before stay as they are, and nothing lies around."""
    out, kept = done / "out", contents(done / "out")
    store = tmp_path / "store"
    before = sorted(p.name for p in out.iterdir())
    count, real = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    outcome = call("compress", done / "task.py", "--budget", "5x", "--out", out, "--store", store, "--workers", 1)
    monkeypatch.undo()
    if outcome.code == 0:
        assert count <= allowed
        assert contents(out) != kept
        call("compress", done / "task.py", "--budget", "4x", "--out", out, "--workers", 1)
        return
    message = outcome.refused(2)
    assert "No space left on device" in message
    assert str(out) in message or str(store) in message
    assert contents(out) == kept
    assert sorted(p.name for p in out.iterdir()) == before
    assert not [p for p in store.rglob("*") if p.name.startswith(".")]


def test_a_real_limit_on_files(tmp_path: Path) -> None:
    """The kernel itself refuses to write more than 2,000 bytes to any file."""
    task = write_task(tmp_path)
    command = [sys.executable, "-m", "autocompress.cli", "compress", str(task), "--budget", "4x", "--workers", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("autocompress: ")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "lock"]


def test_what_is_unexpected_is_a_line_and_its_traceback_is_kept_for_debug(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr("autocompress.verifying._size_checks", broken)
    message = call("verify", done / "out").refused(1)
    assert message == "autocompress: ZeroDivisionError: nobody thought of this (unexpected; --debug shows where)"
    outcome = call("--debug", "verify", done / "out")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "in broken" in outcome.err


def test_an_interruption_is_one_line(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autocompress.verifying._size_checks", interrupted)
    assert "interrupted" in call("verify", done / "out").refused(130)


def test_control_c_ends_the_process_with_130(tmp_path: Path) -> None:
    started = tmp_path / "started"
    lines = ["import pathlib, time", f"pathlib.Path({str(started)!r}).touch()", "time.sleep(60)"]
    slow = "def calibration():\n" + "".join(f"    {line}\n" for line in lines)
    command = [sys.executable, "-m", "autocompress.cli", "compress", str(write_task(tmp_path, calibration=slow))]
    running = subprocess.Popen(
        [*command, "--budget", "4x", "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores SIGINT, and what it starts would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if started.exists():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert errors.strip().startswith("autocompress: interrupted")
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
