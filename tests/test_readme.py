"""README.md is run: its task file, its commands, its Python, in the order in which they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny_tasks import call

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_everything_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {"print": lambda *_: None}
    commands, programs = 0, 0
    for language, text in BLOCK.findall((ROOT / "README.md").read_text()):
        if language == "sh":
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "autocompress"
                outcome = call(*arguments)
                assert outcome.code == 0, (line, outcome.err)
                commands += 1
        elif text.startswith("# mytask.py\n"):
            Path("mytask.py").write_text(text)
        else:
            exec(compile(text, "README.md", "exec"), names)
            programs += 1
    assert commands >= 5
    assert programs >= 3
    assert not (ROOT / "runs" / "mine").exists(), "the examples must run in a folder of their own"


def test_the_readme_names_every_command_and_the_page_of_strategies() -> None:
    from autocompress.cli import app

    text = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"| `{command.callback.__name__}" in text, command.callback.__name__
    assert "(docs/strategies.md)" in text  # which names every one: see test_strategies.py


def test_what_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target
