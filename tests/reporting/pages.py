"""What the tests of pages share: a result to look at, and a parser that holds that tags are closed in order."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import torch
from torch import nn

import autocompress as ac

NASTY = "<script>alert('x')</script>&\""


def nasty_result(out: Path) -> ac.Result:
    """A tiny compressed model, one of whose layers has a name that is markup, and one that nothing reaches."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(NASTY, nn.Linear(12, 8))
            self.spare = nn.Linear(3, 3)
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.get_submodule(NASTY)(x)))

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
    batches = [torch.randn(16, 12, generator=generator) for _ in range(6)]
    return ac.compress(model, batches, "2x", lambda m: 0.5, out=out, workers=1, task=NASTY)


class Reader(HTMLParser):
    """Collects tags, texts and attributes, and holds that tags are closed in order."""

    VOID = ("meta", "br", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attributes if k in ("href", "src", "action", "data")]
        self.ids += [v or "" for k, v in attributes if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader
