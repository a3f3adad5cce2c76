"""The page's style sheet: light and dark by the reader's preference, one column on a phone, nothing from a network."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
:root {
  color-scheme: light dark;
  --ground: #fafaf8; --panel: #ffffff; --ink: #1c2326; --soft: #566066; --line: #dde1e3; --track: #e9ecee;
  --a: #2563a8; --b: #b4561b; --c: #7b838b; --d: #2f7d55; --e: #8a5a9c;
  --trellis: #2563a8; --rd: #2f7d55; --pruned: #c06a10; --widths: #8a4bab; --structured: #b23a5e; --floats: #7b838b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181a; --panel: #1b2023; --ink: #e6eaec; --soft: #a3adb3; --line: #323a3f; --track: #2a3135;
    --a: #6ea8e6; --b: #e59a63; --c: #8b949e; --d: #74b891; --e: #c39ad3;
    --trellis: #6ea8e6; --rd: #74b891; --pruned: #e8a75a; --widths: #c08fe0; --structured: #ec87a3; --floats: #8b949e;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header, footer { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.25rem; }
footer { padding-top: 2rem; padding-bottom: 3rem; color: var(--soft); font-size: .875rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .5rem; letter-spacing: -.005em; }
h3 { font-size: .875rem; margin: 0; overflow-wrap: anywhere; }
section { margin-top: 2.75rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
p, main ul { margin: .5rem 0; max-width: 46rem; }
a { color: var(--a); }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--panel); padding: .5rem 1rem; }
:focus-visible { outline: 3px solid var(--a); outline-offset: 2px; border-radius: .25rem; }
:target { background: color-mix(in srgb, var(--a) 14%, transparent); }
.soft { color: var(--soft); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: 1.25rem 0 0;
  font-size: .9375rem; }
nav a { display: inline-block; padding: .2rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .75rem; padding: 0;
  margin: 1.25rem 0 0; max-width: none; list-style: none; }
.cards li { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.cards .name { color: var(--soft); font-size: .875rem; display: block; }
.cards .value { font-size: 1.5rem; line-height: 1.35; font-weight: 650; display: block;
  font-variant-numeric: tabular-nums; }
.cards .more { color: var(--soft); font-size: .875rem; display: block; }
.sizes { display: grid; grid-template-columns: auto 1fr auto; gap: .4rem .9rem; align-items: center; margin: 1rem 0;
  font-variant-numeric: tabular-nums; }
.sizes .track { height: 1rem; } .sizes i { display: block; height: 100%; min-width: 2px; border-radius: .15rem; }
.sizes .n { text-align: right; }
.sizes .a { background: var(--a); } .sizes .b { background: var(--b); } .sizes .c { background: var(--c); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background: var(--panel); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: .875rem; margin: 1.25rem 0 .4rem; }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: middle; border-top: 1px solid var(--line); }
thead th, thead td { border-top: 0; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 9rem; }
tfoot td, tfoot th { font-weight: 600; }
tbody a { text-decoration-color: var(--line); text-underline-offset: .2em; }
.pair tbody th { min-width: 0; } .pair .bar { min-width: 3rem; }
.pair th, .pair td { padding: .35rem .55rem; } .pair .note { margin-top: 0; }
tr > :first-child { position: sticky; left: 0; background: var(--panel); }
.tall { max-height: 44rem; overflow-y: auto; }
.tall thead > tr > * { position: sticky; top: 0; background: var(--panel); z-index: 2; }
.tall thead > tr > :first-child { z-index: 3; }
.tall tfoot > tr > * { position: sticky; bottom: 0; background: var(--panel); z-index: 1; }
tr.this > :nth-child(n) { background: color-mix(in srgb, var(--b) 12%, var(--panel)); font-weight: 600; }
td.heat { background: color-mix(in srgb, var(--a) var(--heat), var(--panel)); } td.best { font-weight: 700; }
td small { display: block; color: var(--soft); font-weight: 400; }
td.n, th.n { text-align: right; white-space: nowrap; }
td code { white-space: nowrap; }
code { font: .875em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem;
  margin: .5rem 0; overflow-x: auto; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--a); padding: .35rem 0; }
details > .scroll, details > ul { margin-top: .5rem; }
.wide { min-width: 52rem; padding: .75rem .75rem .25rem .25rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.25rem;
  align-items: start; margin-top: .75rem; }
.pair > * { min-width: 0; margin: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13.5rem), 1fr)); gap: .75rem;
  padding: 0; margin: .75rem 0; max-width: none; list-style: none; }
.panels li { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .7rem; }
.panels li:target { outline: 3px solid var(--a); }
.panels p { margin: .25rem 0 0; font-size: .8125rem; line-height: 1.45; color: var(--soft); }
.bar { display: block; margin-top: .2rem; height: .45rem; min-width: 5rem; background: var(--track);
  border-radius: .25rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--a); }
.bar.b i { background: var(--b); } .bar.d i { background: var(--d); }
.spot { display: block; position: relative; height: .8rem; min-width: 6rem; margin-right: .8rem; }
.spot::before { content: ""; position: absolute; left: 0; right: -.7rem; top: 50%; border-top: 1px solid var(--line); }
.spot i { position: absolute; top: .05rem; width: .7rem; height: .7rem; border-radius: 50%; background: var(--c); }
.this .spot i { background: var(--panel); border: .18rem solid var(--b); }
figure { margin: .75rem 0; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .4rem; }
.pair figure svg { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; }
svg { display: block; width: 100%; height: auto; }
svg.strip { height: 2rem; shape-rendering: crispEdges; border-radius: .25rem; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg text.strong { fill: var(--ink); font-weight: 600; }
.frame { stroke: var(--line); fill: none; } .gap { stroke: var(--panel); stroke-width: 1; }
.a { fill: var(--a); } .b { fill: var(--b); } .c { fill: var(--c); } .d { fill: var(--d); } .e { fill: var(--e); }
.trellis { --own: var(--trellis); } .rd { --own: var(--rd); } .pruned { --own: var(--pruned); }
.widths { --own: var(--widths); } .structured { --own: var(--structured); } .floats { --own: var(--floats); }
.chosen { --own: var(--b); } .hull { --own: var(--a); } .known { --own: var(--a); } .other { --own: var(--c); }
.single { --own: var(--c); } .pale { --own: color-mix(in srgb, var(--c) 55%, transparent); }
rect.trellis, rect.rd, rect.pruned, rect.widths, rect.structured, rect.floats { fill: var(--own); }
.line { fill: none; stroke: var(--own); stroke-width: 1.5; stroke-linejoin: round; }
.dots { fill: none; stroke: var(--own); stroke-width: 4; stroke-linecap: round; }
.dots.rd, .dots.widths, .dots.floats { stroke-linecap: square; }
.line.rd { stroke-dasharray: 5 2; } .line.pruned { stroke-dasharray: 1.5 2.5; }
.line.structured { stroke-dasharray: 7 3; }
.line.whisker { stroke-dasharray: none; }
.line.level { stroke-width: 4; stroke-dasharray: none; } .line.hull { stroke-width: 2; }
circle.chosen { fill: var(--panel); stroke: var(--own); stroke-width: 3; }
circle.known, circle.other { fill: var(--own); }
circle.single { fill: var(--panel); stroke: var(--own); stroke-width: 1.5; }
.faint { stroke: var(--c); stroke-width: 1; opacity: .6; } .gapbar { stroke: var(--a); stroke-width: 1.5; }
.strongbar { stroke: var(--b); stroke-width: 2; } .cut { fill: var(--b); }
.mean { stroke: var(--b); stroke-dasharray: 4 3; fill: none; }
.legend { display: inline-flex; flex-wrap: wrap; gap: .15rem 1rem; }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin-right: .35rem;
  vertical-align: -.05rem; background: var(--own); }
.key.a { background: var(--a); } .key.b { background: var(--b); } .key.c { background: var(--c); }
.key.d { background: var(--d); } .key.e { background: var(--e); }
.key.chosen, .key.single { background: var(--panel); border: .2rem solid var(--own); border-radius: 50%; }
.key.single { border-width: .1rem; } .key.known, .key.other { border-radius: 50%; }
dl { display: grid; grid-template-columns: minmax(8rem, auto) 1fr; gap: .3rem 1.25rem; margin: .75rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; max-width: 50rem; }
@media (max-width: 40rem) {
  main, header, footer { padding-left: 1rem; padding-right: 1rem; }
  header { padding-top: 1.25rem; } section { margin-top: 2rem; padding-top: 1.25rem; }
  tbody th { min-width: 7rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  .cards { gap: .5rem; grid-template-columns: 1fr 1fr; } .cards .value { font-size: 1.25rem; }
  .cards li { padding: .5rem .75rem; } .sizes { gap: .3rem .5rem; font-size: .875rem; }
  .panels { grid-template-columns: 1fr 1fr; gap: .5rem; } .panels li { padding: .45rem .5rem; }
  .panels svg text { font-size: 15px; } .pair figure svg text { font-size: 14px; }
  th, td { padding: .35rem .5rem; } }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  body { background: none; } .scroll { overflow: visible; max-height: none; } nav, .skip { display: none; }
  section, figure, .panels li, tr { break-inside: avoid; } section { break-inside: auto; }
  details::details-content { content-visibility: visible; display: block; } summary { display: none; } }
"""
