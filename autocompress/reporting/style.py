"""The page's style sheet: light and dark by the reader's preference, one column on a phone, nothing from a network."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
:root {
  color-scheme: light dark;
  --ground: #fbfbfa; --panel: #ffffff; --ink: #1c2326; --soft: #566066; --line: #dde1e3; --track: #e9ecee;
  --a: #2563a8; --b: #b4561b; --c: #6b7280; --d: #3f7d58; --good: #2c7a4b; --warn: #9a5b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181a; --panel: #1b2023; --ink: #e6eaec; --soft: #a3adb3; --line: #323a3f; --track: #2a3135;
    --a: #6ea8e6; --b: #e59a63; --c: #8b949e; --d: #74b891; --good: #74c596; --warn: #e0ab54;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
footer { padding-bottom: 3rem; color: var(--soft); font-size: .875rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--a); }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--panel); padding: .5rem 1rem; }
:focus-visible { outline: 3px solid var(--a); outline-offset: 2px; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; padding: 0;
  margin: 1.25rem 0 0; list-style: none; }
.cards li { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.cards .name { color: var(--soft); font-size: .875rem; display: block; }
.cards .value { font-size: 1.45rem; font-weight: 600; display: block; font-variant-numeric: tabular-nums; }
.cards .more { color: var(--soft); font-size: .875rem; display: block; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background: var(--panel); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .75rem; color: var(--soft); }
th, td { padding: .3rem .75rem; text-align: left; vertical-align: middle; border-top: 1px solid var(--line); }
thead th, thead td { border-top: 0; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 11rem; }
tfoot td, tfoot th { font-weight: 600; }
td.n, th.n { text-align: right; white-space: nowrap; }
td code { white-space: nowrap; }
code { font: .875em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem;
  margin: .5rem 0; overflow-x: auto; }
.wide { min-width: 44rem; padding: .75rem .75rem .25rem 0; }
.bar { display: block; margin-top: .2rem; height: .5rem; min-width: 5rem; background: var(--track);
  border-radius: .25rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--a); }
.bar.b i { background: var(--b); }
figure { margin: .75rem 0; }
figcaption { color: var(--soft); font-size: .875rem; }
svg { display: block; max-width: 100%; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.frame { stroke: var(--line); fill: none; } .a { fill: var(--a); } .b { fill: var(--b); } .c { fill: var(--c); }
.d { fill: var(--d); } .gap { stroke: var(--panel); stroke-width: 1; } .curve { fill: none; stroke: var(--c); }
.dot { fill: var(--b); } .mean { stroke: var(--b); stroke-dasharray: 4 3; }
dl { display: grid; grid-template-columns: minmax(9rem, auto) 1fr; gap: .25rem 1rem; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin: 0 .3rem 0 .75rem; }
@media (max-width: 40rem) {
  tbody th { min-width: 7rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; }
  .cards { gap: .5rem; grid-template-columns: 1fr 1fr; } .cards .value { font-size: 1.15rem; }
  .cards li { padding: .5rem .75rem; } }
@media print { body { background: none; } .scroll { overflow: visible; } }
"""
