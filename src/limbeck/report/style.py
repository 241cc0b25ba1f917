"""The page's style sheet: system fonts, two colour schemes, and a form for paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbf9f5; --card: #ffffff; --ink: #211f1c; --soft: #6d675f; --rule: #e4ded4;
  --teacher: #3d6a97; --student: #b5532a; --plain: #776d60; --third: #4b7940; --fourth: #8a5aa0;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --card: #1e2024; --ink: #e9e5dd; --soft: #9d978d; --rule: #34363c;
    --teacher: #7fb0df; --student: #e58a5c; --plain: #968e83; --third: #93c283; --fourth: #c194d6;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
    font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 48px 28px 72px; }
h1, h2 { font-family: var(--serif); font-weight: 600; letter-spacing: -.01em; text-wrap: balance; }
h1 { font-size: 38px; line-height: 1.15; margin: 0 0 10px; }
h2 { font-size: 22px; margin: 52px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 14px; margin: 26px 0 8px; }
.brow { color: var(--student); font-size: 12.5px; letter-spacing: .08em; text-transform: uppercase; margin: 0 0 8px; }
.lead { font: 20px/1.45 var(--serif); max-width: 46em; margin: 0 0 6px; text-wrap: pretty; }
.note, figcaption small { color: var(--soft); font-size: 13px; }
.tiles {
  display: flex; flex-wrap: wrap; gap: 1px; margin: 28px 0 0; overflow: hidden;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 8px;
}
.tile { flex: 1 1 128px; background: var(--card); padding: 13px 12px 12px; }
.tile span { display: block; color: var(--soft); font-size: 12px; line-height: 1.4; }
.tile strong { display: block; font: 600 27px/1.25 var(--serif); font-variant-numeric: lining-nums tabular-nums;
    color: var(--student); }
.strip { display: grid; grid-template-columns: max-content 1fr; gap: 5px 14px; align-items: center; margin: 22px 0 0;
    font-size: 13.5px; }
.strip div { display: flex; flex-wrap: wrap; gap: 3px; }
.strip i, .kinds i { display: inline-block; width: 18px; height: 14px; border-radius: 2px; background: var(--student); }
.strip i.softmax, .kinds i.softmax { background: var(--teacher); }
.kinds { margin: 8px 0 0; color: var(--soft); font-size: 13px; }
.kinds i { width: 11px; height: 11px; margin: 0 5px 0 0; }
.kinds span { margin-right: 16px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums lining-nums; font-size: 14px; }
th, td { text-align: right; padding: 5px 12px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--ink); }
tr.group td { color: var(--soft); font-size: 12.5px; padding-top: 14px; border-bottom-color: var(--soft); }
td.best { font-weight: 700; } td small { font-size: 11.5px; font-weight: 400; color: var(--soft); margin-left: 4px; }
.wide .key { margin-right: 8px; }
.texts-table th, .texts-table td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.texts-table th:first-child, .texts-table td:first-child { overflow-wrap: normal; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 18px; align-items: start; }
.figures.two { grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); }
.figures.one { grid-template-columns: 1fr; }
.ranks td { text-align: center; padding: 4px 6px; background: color-mix(in srgb, var(--student) var(--share, 0%), transparent);
    border: 2px solid var(--paper); }
.ranks td:first-child { background: none; padding-left: 0; text-align: left; white-space: nowrap; }
.ranks th { text-align: center; padding: 4px 6px; } .ranks th:first-child { text-align: left; padding-left: 0; }
.ranks td.kept { outline: 2px solid var(--ink); outline-offset: -3px; font-weight: 700; }
@media (max-width: 480px) { .figures, .figures.two { grid-template-columns: 1fr; } }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 13px 14px 8px;
    break-inside: avoid; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 6px; }
figcaption small { font-weight: 400; margin-left: 6px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); fill: none; } .axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.dot { fill: currentColor; } .hover { fill: transparent; } .hover:hover { fill: currentColor; fill-opacity: .75; }
.legend { margin: 5px 0 3px; font-size: 12.5px; display: flex; flex-wrap: wrap; gap: 2px 14px; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 400; }
.key { display: inline-block; width: 15px; border-top: 2.5px solid currentColor; vertical-align: middle; margin-right: 6px; }
.key.dashed { border-top-style: dashed; }
.sample { break-inside: avoid; margin: 0 0 22px; }
.prompt { font-family: var(--serif); font-size: 16px; border-left: 3px solid var(--rule); padding-left: 12px;
    margin: 0 0 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; }
.text { background: var(--card); border: 1px solid var(--rule); border-top: 3px solid currentColor;
    border-radius: 0 0 8px 8px; padding: 9px 12px 11px; }
.text h4 { margin: 0 0 4px; font-size: 12.5px; font-weight: 600; }
.text p { margin: 0; color: var(--ink); font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
.same { text-decoration: underline; text-decoration-color: var(--teacher); text-decoration-thickness: 1.5px;
    text-underline-offset: 3px; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
    font: 12.5px/1.5 var(--mono); }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.failed { color: var(--student); font-weight: 600; }
.empty { color: var(--soft); }
@media print {
  :root { --paper: #fff; --card: #fff; }
  body { font-size: 11px; } main { max-width: none; padding: 0; } h2 { margin-top: 26px; break-after: avoid; }
  .figures, .figures.two { grid-template-columns: repeat(2, 1fr); } h2 + .note { break-after: avoid; }
  tr { break-inside: avoid; } tr.group { break-after: avoid; } h3 { break-after: avoid; }
  table { font-size: 10.5px; } th, td { padding: 2px 10px; } .tile strong { font-size: 20px; }
  details::details-content { content-visibility: visible; height: auto; } pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
