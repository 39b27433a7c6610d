"""One table of a sweep: in the terminal, as CSV, as a page whose columns sort. A row is a dict, all with equal keys."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from infra.wording import counted
from parallel.pipeline.actions import Schedule

LEAST_TEXT = 20  # columns in which a cell of text is broken between words
Row = dict[str, Any]  # values are text, numbers, or None for what is not known


def shape_of(schedule: Schedule) -> str:
    """As in dualpipe, 8 ranks, 20 microbatches."""
    ranks, microbatches = counted(schedule.num_ranks, "rank"), counted(schedule.num_microbatches, "microbatch")
    return f"{schedule.name}, {ranks}, {microbatches}"


def show_table(console: Console, rows: Sequence[Row], spare: Sequence[str] = ()) -> None:
    """Prints the table without the columns that know nothing, and, where it is wider than the console, without those
    of `spare`, the first first; says which. A pipe and a file are as wide as the table."""
    keys = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    unbounded = console.options.update(max_width=10_000)
    bounded = console.is_terminal or "COLUMNS" in os.environ
    without = list[str]()
    for name in (*(one for one in spare if one in keys), None):
        table = _as_table([{key: row[key] for key in keys if key not in without} for row in rows])
        least, most = console.measure(table, options=unbounded)
        if not bounded or least <= console.width or name is None:
            break
        without.append(name)
    if not bounded:
        table.width = most
    elif least > console.width:
        table.width = least  # what is cut off is lost
    console.print(table, crop=False)
    if without:
        names = ", ".join(name.replace("_", " ") for name in without)
        console.print(f"too wide for here: {names}", style="dim", highlight=False)


def _as_table(rows: Sequence[Row]) -> Table:
    """For the terminal. Numbers with six digits, shares (keys with "fraction") in per cent; only text is wrapped."""
    table, columns = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False), []
    for key in rows[0]:
        numeric = _is_numeric(rows, key)
        header = re.sub("[_.]", lambda sign: sign[0].strip("_") + "\n", key)
        cells = _texts(rows, key)
        columns.append(cells)
        widest = max(map(len, [*header.split("\n"), *cells]))
        table.add_column(
            header, justify="right" if numeric else "left", no_wrap=numeric,
            min_width=widest if numeric else min(widest, LEAST_TEXT),
        )  # fmt: skip
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def _is_numeric(rows: Sequence[Row], key: str) -> bool:
    return any(isinstance(row[key], int | float) for row in rows)


def _texts(rows: Sequence[Row], key: str) -> list[str]:
    """The cells of a column."""
    texts = [_text(key, row[key]) for row in rows]
    return _aligned(texts) if _is_numeric(rows, key) else texts


def _aligned(numbers: list[str]) -> list[str]:
    """With the decimal points, where there are any, below each other."""
    decimals = [len(text.removesuffix(" %").partition(".")[2]) for text in numbers]
    most = max(decimals)
    if not most or not all(re.fullmatch(r"-|-?\d+(\.\d+)?( %)?", text) for text in numbers):
        return numbers
    return [
        text if text == "-" or one == most else f"{float(text):.{most}f}"
        for text, one in zip(numbers, decimals, strict=True)
    ]


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if "fraction" in key else f"{value:.6g}"
    return str(value)


def as_csv(rows: Sequence[Row]) -> str:
    """With a header; numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_html(rows: Sequence[Row], title: str, scatter: tuple[str, str] | None = None) -> str:
    """A self-contained page: a click on a column's head sorts by it, bars compare its numbers.

    scatter: the columns to lay out as x and y, a point a row; pointing at one shows its row.
    """
    texts = {key: _texts(rows, key) for key in rows[0]}
    cells = [[[value, texts[key][number]] for key, value in row.items()] for number, row in enumerate(rows)]
    columns = [
        [key.replace("_", " "), any(isinstance(row[key], float) for row in rows), _is_numeric(rows, key)]
        for key in rows[0]
    ]
    axes = [list(rows[0]).index(key) for key in scatter] if scatter else None
    # a column: its name, whether it has bars, whether it is of numbers
    data = {"title": title, "columns": columns, "rows": cells, "axes": axes}
    return _PAGE.replace("@DATA@", json.dumps(data).replace("<", "\\u003c"))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<style>
  body { margin: 24px; background: #f5f6f8; color: #1f2430; font: 14px/1.45 system-ui, "Liberation Sans", sans-serif; }
  h1 { font-size: 18px; }
  table { border-collapse: collapse; background: #fff; border: 1px solid #e2e5eb; font-variant-numeric: tabular-nums; }
  th { cursor: pointer; user-select: none; text-align: left; background: #eef0f4; white-space: nowrap; }
  th::after { content: " \\2195"; color: #b3b9c6; }
  th.up::after { content: " \\2191"; }
  th.down::after { content: " \\2193"; }
  th, td { padding: 5px 14px; border-bottom: 1px solid #e2e5eb; }
  td { white-space: nowrap; }
  td.number { text-align: right; }
  tr:hover td, tr.chosen td { background-color: #e7eefb; }
  svg { background: #fff; border: 1px solid #e2e5eb; margin-bottom: 18px; display: block; }
  svg[hidden] { display: none; }
  svg text { font-size: 11px; fill: #5a6274; }
  circle { fill: #3b6fc4; fill-opacity: .55; cursor: pointer; }
  circle:hover, circle.chosen { fill: #d2522e; fill-opacity: 1; }
</style>
</head>
<body>
<h1></h1>
<svg width="760" height="320" hidden></svg>
<table><thead><tr></tr></thead><tbody></tbody></table>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const head = document.querySelector("thead tr"), body = document.querySelector("tbody");
document.title = document.querySelector("h1").textContent = data.title;
const largest = data.columns.map((_, k) => Math.max(...data.rows.map(row => row[k][0]).filter(Number.isFinite)));
const svg = document.querySelector("svg"), points = new Map(), lines = new Map();
function draw() {
  const [xs, ys] = data.axes.map(k => data.rows.map(row => row[k][0]).filter(Number.isFinite));
  if (!xs.length || !ys.length) return;
  svg.removeAttribute("hidden");
  const [left, top, width, height] = [70, 14, 660, 250];
  const scale = (values, low, size) => {
    const least = Math.min(...values), span = Math.max(...values) - least || 1;
    return [value => low + size * (value - least) / span, least, least + span];
  };
  const [x, x0, x1] = scale(xs, left, width), [y, y0, y1] = scale(ys, top + height, -height);
  const add = (name, attributes, text) => {
    const node = svg.appendChild(document.createElementNS(svg.namespaceURI, name));
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  for (let k = 0; k <= 4; k++) {
    const a = x0 + (x1 - x0) * k / 4, b = y0 + (y1 - y0) * k / 4;
    add("line", {x1: x(a), x2: x(a), y1: top, y2: top + height, stroke: "#eef0f4"});
    add("line", {y1: y(b), y2: y(b), x1: left, x2: left + width, stroke: "#eef0f4"});
    add("text", {x: x(a), y: top + height + 16, "text-anchor": "middle"}, +a.toPrecision(4));
    add("text", {x: left - 8, y: y(b) + 4, "text-anchor": "end"}, +b.toPrecision(4));
  }
  const names = data.axes.map(k => data.columns[k][0]);
  add("text", {x: left + width / 2, y: top + height + 36, "text-anchor": "middle"}, names[0]);
  const middle = top + height / 2;
  add("text", {x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})`}, names[1]);
  for (const row of data.rows) {
    const [a, b] = data.axes.map(k => row[k][0]);
    if (!Number.isFinite(a) || !Number.isFinite(b)) continue;
    const point = add("circle", {cx: x(a), cy: y(b), r: 5});
    point.appendChild(document.createElementNS(svg.namespaceURI, "title")).textContent =
      row.map(([, text], k) => `${data.columns[k][0]}: ${text}`).join("\\n");
    point.addEventListener("click", () => { choose(row); lines.get(row).scrollIntoView({block: "center"}); });
    points.set(row, point);
  }
}
function choose(row) {
  for (const node of [...points.values(), ...lines.values()]) node.classList.remove("chosen");
  points.get(row)?.classList.add("chosen");
  lines.get(row)?.classList.add("chosen");
}
function fill() {
  body.replaceChildren(...data.rows.map(row => {
    const line = document.createElement("tr");
    lines.set(row, line);
    line.addEventListener("mouseenter", () => choose(row));
    row.forEach(([value, text], k) => {
      const cell = line.insertCell();
      cell.textContent = text;
      if (data.columns[k][2]) cell.className = "number";
      if (!Number.isFinite(value)) return;
      const share = 100 * value / (largest[k] || 1);
      if (data.columns[k][1])
        cell.style.background = `linear-gradient(to right, #cfdef2 ${share}%, transparent ${share}%)`;
    });
    return line;
  }));
}
const before = (a, b) => a === b ? 0 : a === null ? 1 : b === null ? -1 : a < b ? -1 : 1;
data.columns.forEach(([name], k) => {
  const cell = head.appendChild(document.createElement("th"));
  cell.textContent = name;
  cell.addEventListener("click", () => {
    const down = cell.className === "up" ? -1 : 1;
    for (const other of head.children) other.className = "";
    cell.className = down > 0 ? "up" : "down";
    data.rows.sort((a, b) => down * before(a[k][0], b[k][0]));
    fill();
  });
});
fill();
if (data.axes) draw();
</script>
</body>
</html>
"""
