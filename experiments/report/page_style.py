"""The page's style sheet."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem 1rem 4rem; background: #fff;
  color: #1d2126; font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 .2rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: .7rem;
  border-top: 2px solid #1d2126; }
p { margin: .4rem 0; max-width: 52rem; }
.meta, .note, figcaption, .source { color: #4c545d; font-size: .875rem; }
nav ul { list-style: none; margin: .8rem 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .3rem 1.2rem; }
a { color: #005a9c; }
.item { margin: 1.6rem 0 2.2rem; }
.caption { font-weight: 600; margin: 0 0 .5rem; max-width: none; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  border-top: 2px solid #1d2126; border-bottom: 2px solid #1d2126; }
th { text-align: left; vertical-align: bottom; font-weight: 600; line-height: 1.3;
  border-bottom: 1px solid #1d2126; max-width: 9.5rem; }
th, td { padding: .3rem .7rem .3rem 0; }
th:not(:first-child), td:not(:first-child) { padding-left: .5rem; }
td { vertical-align: top; border-bottom: 1px solid #e4e7ea; white-space: nowrap; }
td.long { white-space: normal; min-width: 22rem; max-width: 34rem; overflow-wrap: break-word; }
.number { text-align: right; }
figure { margin: 0; }
figure img { display: block; width: 100%; min-width: 640px; height: auto; }
figcaption { margin-top: .5rem; max-width: 60rem; }
.note { margin: .4rem 0; max-width: 60rem; overflow-wrap: anywhere; }
.source { margin-top: .5rem; overflow-wrap: anywhere; }
code { font: .85em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; background: #f2f4f6;
  padding: .05rem .3rem; border-radius: 3px; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .5rem; overflow-wrap: anywhere; }
summary:focus-visible, a:focus-visible, .wide:focus-visible { outline: 3px solid #e69f00;
  outline-offset: 2px; }
@media (max-width: 640px) { body { font-size: 15px; padding: .8rem .8rem 3rem; } }
@media print { .wide { overflow: visible; } details > * { display: block; } }
"""
