// SPDX-License-Identifier: Apache-2.0
#pragma once

// The fixed parts of report.html: style and the script that shows numbers under the pointer.

namespace report {

inline constexpr char const* page_style = R"css(
:root {
  color-scheme: light dark;
  --bg: #f6f6f3; --card: #ffffff; --ink: #1d232b; --soft: #5c6673; --line: #dfe3e8; --faint: #f1f3f5;
  --a: #2364aa; --b: #c4561a; --c: #2e8b57; --d: #8e4fa8; --e: #b8860b; --f: #b03060;
  --note: #8a5a00; --note-bg: #fdf6e3; --hole: #c9ced6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #121519; --card: #1a1e24; --ink: #e5e9ee; --soft: #9ba6b3; --line: #303740; --faint: #20252c;
    --a: #6fabe8; --b: #f09a63; --c: #6fcf97; --d: #c79be0; --e: #e6c35c; --f: #ee8fb0;
    --note: #e3b25b; --note-bg: #262116; --hole: #454d58;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
header p { margin: 0; color: var(--soft); }
header .kind { font-size: 13px; letter-spacing: .06em; text-transform: uppercase; }
h1 { font-size: 27px; line-height: 1.25; margin: 4px 0 8px; font-weight: 650; overflow-wrap: anywhere; }
h1 .vs { color: var(--soft); font-weight: 400; }
h2 { font-size: 19px; margin: 0 0 4px; font-weight: 650; }
h3 { font-size: 15px; margin: 0 0 2px; font-weight: 600; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin-top: 18px; }
section > p { margin: 0 0 14px; max-width: 78ch; color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 22px 28px; }
figure { margin: 0; min-width: 0; }
figure + figure.full, .pair + figure, figure.full + .pair, .pair + .pair { margin-top: 24px; }
figcaption { font-size: 13.5px; line-height: 1.45; color: var(--soft); max-width: 88ch; margin-top: 4px; }
figcaption code, .notes code { white-space: nowrap; }
figcaption b { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg .point { cursor: default; }
svg .point use { stroke: none; }
svg .point:hover use { stroke: var(--ink); stroke-width: 1; }
.wide { overflow-x: auto; }
.wide svg { min-width: 760px; }
.strip { max-width: 760px; }
svg.plot image { image-rendering: pixelated; }
svg.heat { overflow: visible; max-width: 520px; touch-action: manipulation; }
svg.heat text { fill: var(--soft); font-size: 13px; }
svg.heat .hole { fill: var(--hole); }
svg.heat .mark { fill: none; stroke: var(--card); stroke-width: .16; paint-order: stroke; pointer-events: none; }
.ramp { display: flex; align-items: center; gap: 8px; font-size: 13px; color: var(--soft); margin: 4px 0 2px; flex-wrap: wrap; }
.ramp i { width: 150px; height: 10px; border-radius: 2px; }
.ramp .hole { width: 12px; height: 10px; border-radius: 2px; background: var(--hole); margin-left: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
tr:last-child > * { border-bottom: 0; }
thead th { font-size: 13px; color: var(--soft); font-weight: 600; overflow-wrap: anywhere; }
tbody th { font-weight: 500; white-space: nowrap; }
td.value { font-weight: 600; }
td.value small { font-weight: 400; color: var(--soft); white-space: nowrap; }
td.what { color: var(--soft); font-size: 13.5px; min-width: 220px; }
.facts th { color: var(--soft); font-weight: 400; width: 170px; }
.facts td { overflow-wrap: anywhere; }
.none { color: var(--note); font-weight: 400; font-style: italic; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.swatch.a { background: var(--a); } .swatch.b { background: var(--b); } .swatch.c { background: var(--c); }
.swatch.d { background: var(--d); } .swatch.e { background: var(--e); } .swatch.f { background: var(--f); }
.notes { border-color: var(--note); background: var(--note-bg); }
.notes h2 { font-size: 16px; color: var(--note); }
.notes ul { margin: 4px 0 0; padding-left: 20px; }
.notes li { margin: 3px 0; overflow-wrap: anywhere; }
.switch { position: absolute; opacity: 0; pointer-events: none; }
.switch + label { display: inline-block; padding: 4px 14px; border: 1px solid var(--line); cursor: pointer; font-size: 14px; color: var(--soft); }
.switch + label:first-of-type { border-radius: 7px 0 0 7px; } .switch + label:last-of-type { border-radius: 0 7px 7px 0; margin-left: -1px; }
.switch:checked + label { background: var(--ink); color: var(--card); border-color: var(--ink); }
.switch:focus-visible + label { outline: 2px solid var(--a); outline-offset: 2px; }
.grids { margin-top: 16px; }
#show-debiased:checked ~ .grids .biased, #show-biased:checked ~ .grids .debiased { display: none; }
code { font: 13.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
a { color: var(--a); }
footer { color: var(--soft); font-size: 13.5px; margin-top: 22px; }
#tip {
  position: fixed; z-index: 2; display: none; pointer-events: none; max-width: 300px; padding: 7px 11px; border-radius: 7px;
  background: var(--ink); color: var(--card); font-size: 13px; line-height: 1.4; font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
@media (max-width: 760px) {
  main { padding: 18px 10px 40px; }
  section { padding: 16px 14px; border-radius: 8px; }
  .pair { grid-template-columns: minmax(0, 1fr); }
  h1 { font-size: 22px; }
  td.what { display: none; }
  tbody th { white-space: normal; }
}
@media print { body { background: none; } section { break-inside: avoid; border-color: #bbb; } .switch + label { display: none; } }
)css";

// Reads the numbers from the JSON in the page; without it every figure still shows, only the numbers
// under the pointer do not.
inline constexpr char const* page_script = R"js(
(() => {
  const tables = JSON.parse(document.getElementById('cka-data').textContent);
  const tip = document.getElementById('tip');
  const text = (x) => x === null ? null : String(x).replace('-', '−');
  const hide = (svg) => { tip.style.display = 'none'; svg.querySelector('.mark').setAttribute('display', 'none'); };
  document.querySelectorAll('svg.heat').forEach((svg) => {
    const t = tables[svg.dataset.table], g = svg.querySelector('.cells'), mark = svg.querySelector('.mark');
    const index = (at, count, gap) => {
      if (gap && at >= count - 1 + gap) at -= gap; else if (gap && at >= count - 1) return -1;
      const i = Math.floor(at);
      return i >= 0 && i < count ? i : -1;
    };
    const show = (event) => {
      const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(g.getScreenCTM().inverse());
      const j = index(p.x, t.cols.length, t.col_gap), i = index(p.y, t.rows.length, t.row_gap);
      if (i < 0 || j < 0) return hide(svg);
      const lines = [t.rows[i] + '  ×  ' + t.cols[j]];
      for (const [name, table] of [['debiased', t.debiased], ['biased', t.biased]]) {
        const value = text(table.value[i][j]);
        lines.push(name + ' CKA: ' + (value === null ? 'none (' + table.status[i + ',' + j] + ')'
                                       : value + ', chance ' + text(table.chance[i][j])));
      }
      if (t.p) lines.push('p over shuffled tokens: ' + text(t.p[i * t.cols.length + j]));
      if (t.shift_p) lines.push('p over shifted tokens: ' + t.shift_p[i * t.cols.length + j]);
      if (t.sigma) lines.push('σ of ' + t.rows[i] + ': ' + (text(t.sigma[i]) ?? 'none'));
      tip.replaceChildren(...lines.flatMap((l, k) => k ? [document.createElement('br'), l] : [l]));
      tip.style.display = 'block';
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 6)) + 'px';
      tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18) + 'px';
      mark.setAttribute('x', j + (j === t.cols.length - 1 ? t.col_gap : 0));
      mark.setAttribute('y', i + (i === t.rows.length - 1 ? t.row_gap : 0));
      mark.removeAttribute('display');
    };
    svg.addEventListener('pointermove', show);
    svg.addEventListener('pointerdown', show);
    svg.addEventListener('pointerleave', () => hide(svg));
  });
})();
)js";

}  // namespace report
