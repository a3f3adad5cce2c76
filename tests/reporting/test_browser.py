"""The page in a browser: headless Chromium renders it, its console stays empty, it shows what metrics.json holds."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import nasty_result

import autocompress as ac

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")

# Both a desktop's and a phone's width: what does not fit scrolls by itself, and the page stays where it is.
FRAMES = """<!DOCTYPE html><html><body>
<iframe width="1280" height="800" srcdoc="{page}"></iframe><iframe width="390" height="800" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => document.querySelectorAll("iframe").forEach((frame) => {{
  const root = frame.contentDocument.documentElement;
  root.querySelectorAll("details").forEach((part) => part.open = true);
  frame.dataset.wider = root.scrollWidth - root.clientWidth;
}}))</script></body></html>"""


class Rendered(HTMLParser):
    """Texts of elements with an id, and the attributes of frames."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.frames: list[dict[str, str | None]] = []
        self._inside = ""
        self.feed(dom)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self._inside = found.get("id") or ""
        if tag == "iframe":
            self.frames.append(found)

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts.setdefault(self._inside, data)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ac.Result:
    return nasty_result(tmp_path_factory.mktemp("page"))


def opened(page: Path, profile: Path) -> tuple[Rendered, list[str]]:
    """The document as Chromium has rendered it, and the lines of its console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Rendered(done.stdout), [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_figures_of_the_page_are_those_of_the_metrics(result: ac.Result, tmp_path: Path) -> None:
    rendered, console = opened(result.out / "report.html", tmp_path)
    assert console == []
    metrics = json.loads((result.out / "metrics.json").read_text())
    shown = {name: rendered.texts[f"figure-{name}"] for name in ("bytes", "ratio", "metric", "kl")}
    assert shown["bytes"] == f"{metrics['bytes']:,} B"
    assert float(shown["ratio"].removesuffix("x")) == math.floor(metrics["ratio"] * 10) / 10
    assert float(shown["metric"]) == metrics["metric"]
    assert float(shown["kl"]) == pytest.approx(metrics["measured"]["kl"], rel=5e-3)


def test_the_page_is_no_wider_than_a_screen(result: ac.Result, tmp_path: Path) -> None:
    both = tmp_path / "both.html"
    both.write_text(FRAMES.format(page=escape((result.out / "report.html").read_text())))
    rendered, console = opened(both, tmp_path / "profile")
    assert console == []
    assert [frame["data-wider"] for frame in rendered.frames] == ["0", "0"]


def test_a_page_with_an_error_or_too_wide_would_be_seen(tmp_path: Path) -> None:
    page = '<p style="width: 2000px">x</p><script>throw new Error("boom")</script>'
    both = tmp_path / "both.html"
    both.write_text(FRAMES.format(page=escape(page)))
    rendered, console = opened(both, tmp_path / "profile")
    assert [("boom" in line) for line in console] == [True, True]
    assert all(int(frame["data-wider"] or 0) > 0 for frame in rendered.frames)
