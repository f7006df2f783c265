"""The style of HTML pages: system fonts, light and dark, tables that scroll in a box of their own."""

STYLESHEET = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --faint: #595959; --line: #c4c4c4;
  --head: #eef1f4; --mark: #0b4f8a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #16181b; --faint: #b4b4b4; --line: #4a4d52; --head: #23272c;
    --mark: #8cc4ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 0 1rem; }
main { padding-bottom: 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1.5rem 0 1rem; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.5rem 0 .75rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.75rem 0 .5rem; }
p, ul { margin: .6rem 0; max-width: 46rem; }
a { color: var(--mark); }
nav ul { list-style: none; padding: 0; max-width: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
nav a { display: inline-block; padding: .35rem 0; }
code { font: .9em ui-monospace, "Liberation Mono", Menlo, monospace; }
pre { background: var(--head); border: 1px solid var(--line); padding: .75rem; overflow-x: auto; }
.note { border-left: .3rem solid var(--mark); background: var(--head); padding: .5rem .9rem; }
.faint { color: var(--faint); font-style: italic; }
.scroll { overflow-x: auto; border: 1px solid var(--line); margin: .4rem 0 1.2rem; overflow-wrap: normal;
  width: fit-content; max-width: 100%; }
.scroll:focus-visible, a:focus-visible, summary:focus-visible { outline: 3px solid var(--mark);
  outline-offset: 2px; }
.caption { font-weight: 600; margin-bottom: .2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .5rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
th.left, td.left { text-align: left; }
td.wrap, th.wrap { white-space: normal; min-width: 12rem; max-width: 22rem; }
thead th { background: var(--head); vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 600; background: var(--paper); position: sticky; left: 0; }
@media (max-width: 40rem) { body { font-size: .97rem; } table { width: max-content; }
  tbody th { white-space: normal; max-width: 40vw; } }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; max-width: 52rem; height: auto; background: #fff;
  border: 1px solid var(--line); }
figcaption { margin-top: .4rem; max-width: 46rem; }
details { margin: .25rem 0; }
summary { cursor: pointer; padding: .4rem 0; color: var(--mark); }
@media print { .scroll { overflow: visible; border: 0; } nav { display: none; } }
""".strip()
