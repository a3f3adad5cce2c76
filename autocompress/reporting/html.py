"""Pieces of a page: sections, tables that scroll by themselves, bars. Whatever is given as text is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from autocompress.reporting.style import CSS

__all__ = [
    "anchor",
    "bar",
    "cards",
    "cell",
    "details",
    "document",
    "facts",
    "figure",
    "number",
    "row",
    "scrolling",
    "section",
    "spot",
    "table",
]

NAME_DOTS = re.compile(r"(?<!\d)\.|\.(?!\d)")  # where a long name may break: not within a number
LONG = 24  # rows above which a table has a height of its own


def document(title: str, tab: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page. tab: the title of its tab; lead: HTML below the heading; sections: (title, HTML), each with a link
    at the top.
    """
    links = "".join(f'<li><a href="#{anchor(name)}">{escape(name)}</a></li>' for name, _ in sections)
    body = "".join(section(name, content) for name, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(tab)}</title><style>{CSS}</style></head><body>"
        '<a class="skip" href="#main">Skip to the report</a>'
        f'<header><h1>{escape(title)}</h1>{lead}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="main">{body}</main>'
        "<footer><p>Made by autocompress. This page is one file: nothing is loaded from anywhere.</p></footer>"
        "</body></html>\n"
    )


def anchor(name: str, kind: str = "") -> str:
    """The id of a section, or of something else by kind and name, where no two names are alike: letters, digits and
    dashes.
    """
    if not kind:
        return "".join(c if c.isalnum() else "-" for c in name.lower())
    return kind + "".join(c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in name)


def section(title: str, body: str) -> str:
    name = anchor(title)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{body}</section>'


def cards(items: Iterable[tuple[str, str, str, str]]) -> str:
    """Large figures: (id, name, value, what more there is to say)."""
    return (
        '<ul class="cards">'
        + "".join(
            f'<li><span class="name">{escape(n)}</span><span class="value" id="figure-{i}">{escape(v)}</span>'
            f'<span class="more">{escape(m)}</span></li>'
            for i, n, v, m in items
        )
        + "</ul>"
    )


def facts(found: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in found.items()) + "</dl>"


def figure(picture: str, caption: str) -> str:
    """A picture with its caption, both HTML."""
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def details(summary: str, body: str) -> str:
    """What opens on request, by keyboard too."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def table(head: Sequence[str], body: Sequence[str], foot: str = "", label: str = "", note: str = "") -> str:
    """A table that scrolls by itself, by keyboard too, a long one also downwards; a heading that starts with # is one
    of numbers.
    """
    cells = "".join(
        f'<th scope="col" class="n">{escape(h[1:])}</th>'
        if h.startswith("#")
        else (f'<th scope="col">{escape(h)}</th>' if h else "<td></td>")
        for h in head
    )
    # Beside the table, not a caption in it: one line of it would be as wide as the table, and cut off by a phone.
    above = f'<p class="note">{escape(note)}</p>' if note else ""
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    return above + scrolling(
        f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody>{foot}</table>",
        label,
        "scroll tall" if len(body) > LONG else "scroll",
    )


def scrolling(content: str, label: str, kind: str = "scroll") -> str:
    """Content that may be wider than the page, and is scrolled by itself, with arrow keys too."""
    return f'<div class="{kind}" role="region" aria-label="{escape(label)}" tabindex="0">{content}</div>'


def row(name: str, cells: Sequence[str], link: str = "", name_id: str = "", marked: bool = False) -> str:
    """A row by its heading and the HTML of its cells. link: the id that its name leads to; name_id: its own."""
    words = NAME_DOTS.sub(".<wbr>", escape(name))
    text = f'<a href="#{link}">{words}</a>' if link else words
    kind = (' class="this"' if marked else "") + (f' id="{name_id}"' if name_id else "")
    return f'<tr{kind}><th scope="row">{text}</th>{"".join(cells)}</tr>'


def cell(content: str) -> str:
    return f"<td>{content}</td>"


def number(text: str, more: str = "") -> str:
    """A cell of a number; more: the HTML of a bar below it."""
    return f'<td class="n">{escape(text)}{more}</td>'


def bar(part: float, kind: str = "") -> str:
    """A bar filled to `part` of its width."""
    return f'<span class="bar {kind}" aria-hidden="true"><i style="width: {100 * min(part, 1.0):.1f}%"></i></span>'


def spot(part: float) -> str:
    """A dot on a line, at `part` of its length."""
    return f'<span class="spot" aria-hidden="true"><i style="left: {100 * min(max(part, 0.0), 1.0):.1f}%"></i></span>'
