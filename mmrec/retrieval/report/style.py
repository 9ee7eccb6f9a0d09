"""The style of every page: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root {
  --paper: #ffffff; --panel: #f5f6f8; --ink: #16181d; --soft: #5b6270; --line: #dfe2e8;
  --accent: #2456c7; --accent-soft: #e8eefb; --muted: #a3abba;
  --right: #12754a; --wrong: #b0362c; --on-sign: #ffffff;
  --r1: #b4540a; --r2: #0f7b76; --r3: #8a2f9e; --r4: #6b7280; --r5: #a3142f; --r6: #4a6b12;
  --r7: #17639b; --r8: #7a5a06;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111317; --panel: #1a1d23; --ink: #e9ebef; --soft: #a0a7b4; --line: #2d323b;
    --accent: #86abff; --accent-soft: #1b2540; --muted: #626b7b;
    --right: #4cc38a; --wrong: #f2877c; --on-sign: #0d0f12;
    --r1: #f2a35e; --r2: #4fd1c5; --r3: #d792ea; --r4: #a0a7b4; --r5: #ff8296; --r6: #a9d05a;
    --r7: #6cc0f2; --r8: #e0c061;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 48px 24px 80px; max-width: 1168px; background: var(--paper);
  color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
h1, h2, h3, h4, p, ul, ol, dl, dd, figure { margin: 0; padding: 0; }
ul, ol { list-style: none; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; text-wrap: balance; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin-bottom: 16px; }
section { margin-top: 56px; scroll-margin-top: 16px; }
small, .note { color: var(--soft); font-size: 13px; }
small { font-weight: 400; }
b, strong { font-weight: 650; }
a { color: var(--accent); text-underline-offset: 3px; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 3px; }
.lead { margin-top: 12px; max-width: 46em; font-size: 18px; color: var(--soft); }
.lead strong { color: var(--ink); }
nav { margin-top: 24px; }
nav ul, .jumps { display: flex; flex-wrap: wrap; gap: 6px 20px; font-size: 14px; }
.jumps { margin-top: 8px; }
.skip { position: absolute; left: -999px; top: 8px; }
.skip:focus { left: 8px; padding: 4px 10px; background: var(--paper); z-index: 1; }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.note { max-width: 58em; margin-top: 12px; }
h2 + .note { margin: -8px 0 12px; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px;
  margin-top: 28px; }
.tiles li { background: var(--panel); border-radius: 10px; padding: 16px 18px; }
.tiles .label { display: block; font-size: 13px; color: var(--soft); }
.tiles b { display: block; margin-bottom: 4px; font-size: 34px; line-height: 1.2;
  letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.tiles small { display: block; line-height: 1.45; }
.range { white-space: nowrap; }

.scroll { overflow-x: auto; border-radius: 4px; }
table { width: 100%; border-collapse: separate; border-spacing: 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child { position: sticky; left: 0; padding-left: 10px; text-align: left;
  background: var(--paper); }
th { font-weight: 400; }
thead th { border-bottom: 1px solid var(--ink); font-size: 13px; color: var(--soft); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 1px solid var(--line); }
.results small { display: block; font-size: 11px; }
.results .group th { padding-top: 18px; background: none; font-weight: 650; }
.results .group small { display: inline; margin-left: 6px; font-size: 13px; }
.results .trained > * { background: var(--accent-soft); }
.results .trained th { color: var(--accent); font-weight: 650; }
caption { padding: 0 0 8px 10px; text-align: left; font-size: 13px; color: var(--soft); }
caption span { display: block; position: sticky; left: 10px; width: fit-content; white-space: normal;
  max-width: min(58em, calc(100vw - 56px)); }
.scroll + .scroll, .note + .scroll { margin-top: 20px; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr));
  gap: 24px 28px; margin-top: 28px; align-items: start; }
.charts.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
h2 + .charts { margin-top: 0; }
.queries th, .queries td { white-space: normal; overflow-wrap: break-word; min-width: 6.5em; }
figcaption { margin-bottom: 6px; font-weight: 650; }
figcaption small { margin-left: 6px; }
.bars { background: var(--panel); border-radius: 10px; padding: 16px 18px; }
.bars h3 { margin-top: 10px; font-size: 13px; font-weight: 400; color: var(--soft); }
.bars li { display: grid; grid-template-columns: 8.6em 1fr 3em; gap: 10px; align-items: center;
  font-size: 13px; font-variant-numeric: tabular-nums; padding: 2px 0; }
.bars .label { overflow-wrap: anywhere; line-height: 1.3; }
.bars li small { display: block; margin: 0; font-size: 11px; }
.track { position: relative; height: 14px; border-left: 1px solid var(--soft); }
.track i { position: absolute; left: 0; top: 0; height: 100%; border-radius: 0 3px 3px 0; }
.track .trained { background: var(--accent); }
.track .baseline { background: var(--muted); }
.track .whisker { top: 6px; height: 2px; background: var(--ink); border-radius: 0;
  box-shadow: 0 0 0 1px var(--panel); }
.track .tick { top: -2px; width: 2px; height: 18px; margin-left: -1px; background: var(--wrong);
  border-radius: 0; box-shadow: 0 0 0 1px var(--panel); }
.differences li { grid-template-columns: 12em 1fr 8.4em; }
.differences .track { border-left: 0; }
.track .zero { left: 50%; top: -3px; width: 1px; height: 20px; background: var(--soft); }
.track .point { top: 2px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%;
  background: var(--accent); }

.recall { margin-top: 32px; }
.drawing { display: grid; grid-template-columns: minmax(0, 640px) minmax(0, 1fr); gap: 12px 32px;
  align-items: center; }
.drawing > svg { display: block; width: 100%; height: auto; overflow: visible; }
.recall text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.recall polyline, .recall .legend line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { font-size: 14px; }
.legend svg { width: 34px; height: 8px; margin-right: 10px; vertical-align: middle; }
.recall .r0 { stroke: var(--accent); stroke-width: 3; }
.recall .r1 { stroke: var(--r1); stroke-dasharray: 7 3; }
.recall .r2 { stroke: var(--r2); stroke-dasharray: 2 2.5; }
.recall .r3 { stroke: var(--r3); stroke-dasharray: 9 3 2 3; }
.recall .r4 { stroke: var(--r4); }
.recall .r5 { stroke: var(--r5); stroke-dasharray: 4 4; }
.recall .r6 { stroke: var(--r6); stroke-dasharray: 12 3; }
.recall .r7 { stroke: var(--r7); stroke-dasharray: 2 4; }
.recall .r8 { stroke: var(--r8); stroke-dasharray: 6 2 2 2 2 2; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
details .scroll { margin-top: 10px; }

.curve svg { display: block; width: 100%; max-width: 480px; height: auto; overflow: visible; }
.curve text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--accent); opacity: 0.18; }
.curve circle { fill: var(--accent); }

.card { display: grid; grid-template-columns: minmax(0, 300px) 28px minmax(0, 1fr); gap: 16px;
  padding: 22px 0; border-top: 1px solid var(--line); break-inside: avoid; }
.part { margin-top: 28px; }
.part > h3 { font-size: 17px; scroll-margin-top: 16px; }
.part > h3 + .note { margin: 2px 0 14px; }
.card h4 { font-size: 16px; line-height: 1.35; font-weight: 650; overflow-wrap: anywhere; }
.card em { color: var(--soft); font-weight: 400; }
.query > p { margin-top: 4px; overflow-wrap: anywhere; }
.tag { display: inline-block; padding: 0 8px; border: 1px solid var(--line); border-radius: 99px;
  color: var(--soft); font-size: 12px; line-height: 18px; }
.frames { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; margin-top: 10px; }
.frames img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px;
  background: var(--panel); }
.query > .verdict { margin-top: 10px; font-size: 14px; font-weight: 650; }
.verdict.right { color: var(--right); }
.verdict.wrong { color: var(--wrong); }
.query > .sought { margin-top: 0; font-size: 14px; }
.arrow { align-self: start; margin-top: 92px; height: 2px; background: var(--muted);
  position: relative; }
.arrow::after { content: ""; position: absolute; right: 0; top: -4px; width: 10px; height: 10px;
  border: solid var(--muted); border-width: 2px 2px 0 0; transform: rotate(45deg); }
.matches { display: grid; gap: 14px 12px;
  grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); }
.photo { position: relative; border: 2px solid var(--line); border-radius: 8px; overflow: hidden;
  background: #ffffff; }
.photo img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
.right .photo { border-color: var(--right); box-shadow: 0 0 0 1px var(--right); }
.badge { position: absolute; left: 0; bottom: 0; padding: 1px 8px 2px; font-size: 12px;
  border-radius: 0 6px 0 0; line-height: 18px; }
.right .badge { background: var(--right); color: var(--on-sign); font-weight: 650; }
.wrong .badge { background: var(--paper); color: var(--wrong); }
.score { display: flex; justify-content: space-between; margin-top: 5px; color: var(--soft);
  font-size: 12px; font-variant-numeric: tabular-nums; }
.name { font-size: 13px; line-height: 1.35; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; line-clamp: 3; }
.attributes { margin-top: 2px; font-size: 12px; line-height: 1.4; color: var(--soft); }
.attributes span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }

.facts div { display: grid; grid-template-columns: 12em minmax(0, 1fr); gap: 4px 16px;
  padding: 9px 0; border-top: 1px solid var(--line); }
.facts dt { color: var(--soft); }
.facts dd { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }

@media screen and (max-width: 760px) {
  body { padding: 28px 16px 56px; }
  h1 { font-size: 26px; }
  .lead { font-size: 16px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tiles li { padding: 12px 14px; }
  .tiles b { font-size: 27px; }
  .card { grid-template-columns: minmax(0, 1fr); }
  .arrow { display: none; }
  .drawing { grid-template-columns: minmax(0, 1fr); }
  .legend { display: flex; flex-wrap: wrap; gap: 4px 18px; }
  .differences li { grid-template-columns: 7.6em 1fr 6.6em; }
  .matches { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .facts div { grid-template-columns: minmax(0, 1fr); }
}
@media print {
  @page { margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 12px; }
  nav, .jumps, .skip, summary { display: none; }
  details::details-content { content-visibility: visible; display: block; }
  .drawing { grid-template-columns: minmax(0, 380px) minmax(0, 1fr); break-inside: avoid; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  section { margin-top: 28px; }
  h2, h3, figcaption, caption { break-after: avoid; }
  figure, tbody, tr, .tiles li { break-inside: avoid; }
  .note { break-after: avoid; }
  .scroll { overflow: visible; }
  th, td { padding: 4px 6px; }
  th:first-child { position: static; }
  .card { grid-template-columns: 200px 20px minmax(0, 1fr); }
  .matches { grid-template-columns: repeat(5, minmax(0, 1fr)); }
}
"""
