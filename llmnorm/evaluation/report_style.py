"""The style sheet of report.html: one column on a phone, two on a screen, light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d2126; --muted: #6a7078; --rule: #e6e6e3; --grid: #efefec;
  --c1: #2563b8; --c2: #c2571a; --c3: #2c8a57; --c4: #8a4fb5; --c5: #b03060; --c6: #7a6a1f; --lost: #c62f2f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --ink: #e4e7ea; --muted: #969da5; --rule: #2c3238; --grid: #262b30;
    --c1: #6aa5f0; --c2: #f09455; --c3: #63c08c; --c4: #bf90e6; --c5: #ec7ba2; --c6: #cdbb66; --lost: #ff7b72;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; font-weight: 650; letter-spacing: -0.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; font-weight: 650; margin: 36px 0 12px; }
header p { margin: 4px 0 0; color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 24px 0; }
.tile, figure, details, table { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { display: flex; flex-direction: column; padding: 14px 16px; min-width: 0; }
.tile .label { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
.tile .value { font-size: 24px; font-weight: 620; font-variant-numeric: tabular-nums;
  letter-spacing: -0.01em; }
.note { color: var(--muted); font-size: 12.5px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 14px 12px 6px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 10px; padding: 0 4px 8px; }
figcaption .title { font-weight: 620; }
.keys { margin-left: auto; display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px;
  color: var(--muted); }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key i { width: 12px; height: 3px; border-radius: 2px; }
svg { display: block; width: 100%; height: auto; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--rule); }
svg .reference { stroke: var(--muted); stroke-dasharray: 4 4; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { opacity: 0.28; stroke-width: 1; }
svg .lost { stroke: var(--lost); stroke-width: 1.5; }
svg .tick { fill: var(--muted); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
.empty { color: var(--muted); padding: 24px 4px; }
details { padding: 10px 16px; } summary { cursor: pointer; color: var(--muted); }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  margin: 10px 0 4px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13.5px; padding: 6px 0; }
th { text-align: left; font-weight: 500; color: var(--muted); width: 180px; }
th, td { padding: 4px 16px; vertical-align: top; overflow-wrap: anywhere; }
.numbers th, .numbers td { width: auto; text-align: right; font-variant-numeric: tabular-nums; }
.numbers th:first-child { text-align: left; }
@media (max-width: 560px) { th { width: 120px; } main { padding: 24px 14px 48px; } }
@media print { body { background: none; } .tile, figure { break-inside: avoid; } }
"""
