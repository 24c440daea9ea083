"""Owns the picture of a result: one SVG, a row a case: how many times faster or slower than the reference, log scale.

It needs no plotting package, and reads well on a light page and on a dark one. Called by __main__.py.
"""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.registry import Case
from benchmarks.report import median, number, ratio
from benchmarks.runner import CaseResult

WIDTH = 880
LEFT = 316  # where the scale begins; the titles stand left of it
RIGHT = WIDTH - 84  # dpool's figures stand in a column right of it
ROW = 26
HEADING = 38
TOP = 74

FAMILIES = {
    "pool": "Pool, small tasks",
    "large": "Pool, large values",
    "start": "Starting",
    "executor": "ProcessPoolExecutor",
    "asyncio": "asyncio",
    "joblib": "joblib",
    "store": "Object store",
    "cluster": "Pool on two nodes, encrypted, beside the local stdlib",
}
# Colours that stand out on white and on near-black alike; shapes for those who see the colours alike.
MARKS = {
    "stdlib-spawn": ("#8b949e", "square", "stdlib, spawn"),
    "loky": ("#c08a1e", "triangle", "loky"),
    "mpire": ("#8f63e8", "diamond", "mpire"),
    "ray": ("#d6549b", "square", "Ray"),
    "dask": ("#e0603c", "triangle-down", "Dask"),
    "multiprocessing": ("#8b949e", "diamond", "multiprocessing"),
}
OURS = "#2f81f7"

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2328; }
  .quiet { fill: #59636e; font-size: 12px; }
  .title { font-size: 16px; font-weight: 600; }
  .heading { font-weight: 600; }
  .ours { fill: #0969da; font-weight: 600; }
  .grid { stroke: #d1d9e0; stroke-width: 1; }
  .one { stroke: #59636e; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .quiet { fill: #9198a1; }
    .ours { fill: #58a6ff; }
    .grid { stroke: #30363d; }
    .one { stroke: #9198a1; }
  }
"""


def shape(kind: str, x: float, y: float, colour: str) -> str:
    r = 4.5
    if kind == "square":
        return f'<rect x="{x - r + 0.5:.1f}" y="{y - r + 0.5:.1f}" width="8" height="8" fill="{colour}"/>'
    corners = {
        "triangle": ((0, -r), (r, r - 1), (-r, r - 1)),
        "triangle-down": ((0, r), (r, 1 - r), (-r, 1 - r)),
        "diamond": ((0, -r - 0.5), (r + 0.5, 0), (0, r + 0.5), (-r - 0.5, 0)),
    }[kind]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def row_of(case: Case, result: CaseResult) -> dict[str, float]:
    """Target to how many times faster than the reference it is, by the first metric that has a proportion."""
    metric = next((m for m in case.metrics if m.ratio), None)
    if metric is None or median(next((o for o in result.outcomes if o.target == "dpool"), None), metric.name) is None:
        return {}
    row = {}
    for outcome in result.outcomes:
        times = ratio(result, metric.name, outcome.target, case.reference)
        if outcome.target != case.reference and times:
            row[outcome.target] = 1 / times
    return row if "dpool" in row else {}


def draw(cases: dict[str, Case], results: list[CaseResult], run: dict[str, Any]) -> str:
    """The whole picture. Cases that dpool has no figure for are left out."""
    rows = [(cases[r.case], row_of(cases[r.case], r)) for r in results if r.case in cases]
    rows = [(case, row) for case, row in rows if row]
    everything = [value for _, row in rows for value in row.values()] or [1.0]
    low = min(0.1, 10 ** math.floor(math.log10(min(everything))))
    high = max(10.0, 10 ** math.ceil(math.log10(max(everything))))

    def across(times: float) -> float:
        share = (math.log10(times) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return LEFT + share * (RIGHT - LEFT)

    body: list[str] = []
    y = TOP
    family = ""
    for case, row in rows:
        if case.family != family:
            family = case.family
            y += HEADING
            heading = escape(FAMILIES.get(family, family))
            body.append(
                f'<text x="0" y="{y - 10}" class="heading">{heading}'
                f'<tspan dx="9" class="quiet" font-weight="400">1 = {escape(case.reference)}</tspan></text>'
            )
        middle = y + ROW / 2
        body.append(f'<text x="{LEFT - 14}" y="{middle + 4:.1f}" text-anchor="end">{escape(case.title)}</text>')
        one, ours = across(1), across(row["dpool"])
        body.append(
            f'<line x1="{one:.1f}" y1="{middle:.1f}" x2="{ours:.1f}" y2="{middle:.1f}" '
            f'stroke="{OURS}" stroke-width="5" stroke-linecap="round" opacity="0.45"/>'
        )
        for target, times in row.items():
            if target in MARKS:
                colour, kind, _ = MARKS[target]
                body.append(shape(kind, across(times), middle, colour))
        body.append(f'<circle cx="{ours:.1f}" cy="{middle:.1f}" r="6" fill="{OURS}"/>')
        body.append(
            f'<text x="{WIDTH}" y="{middle + 4.5:.1f}" text-anchor="end" class="ours">{number(row["dpool"])}×</text>'
        )
        y += ROW
    bottom = y + 6

    axis: list[str] = []
    decades = range(round(math.log10(low)), round(math.log10(high)) + 1)
    for decade in decades:
        x = across(10.0**decade)
        kind = "grid" if decade else "one"
        axis.append(f'<line x1="{x:.1f}" y1="{TOP + 6}" x2="{x:.1f}" y2="{bottom}" class="{kind}"/>')
        label = "1" if decade == 0 else f"{10 ** abs(decade):,}× {'faster' if decade > 0 else 'slower'}"
        axis.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" class="quiet">{label}</text>')

    legend = [f'<circle cx="6" cy="47" r="6" fill="{OURS}"/><text x="18" y="51.5" class="ours">dpool</text>']
    x = 76.0
    seen = {target for _, row in rows for target in row}
    for target, (colour, kind, label) in MARKS.items():
        if target in seen:
            legend.append(shape(kind, x, 47, colour) + f'<text x="{x + 10}" y="51.5">{label}</text>')
            x += 34 + 7.2 * len(label)

    about = run["about"]
    note = f"{about['date']}, CPython {about['python']}, {about['cpus']} CPUs, 2 workers; "
    note += f"medians, rounds: {run['rounds']}"
    if run["quick"]:
        note += "; a quick run, not for quoting"
    height = bottom + 52
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {WIDTH + 16} {height}" width="{WIDTH + 16}" '
        f'height="{height}" role="img" aria-label="dpool beside the stdlib and other pools">',
        f"<style>{STYLE}</style>",
        '<text x="0" y="22" class="title">How many times faster than what it replaces</text>',
        *legend,
        *axis,
        *body,
        f'<text x="0" y="{bottom + 44}" class="quiet">{escape(note)}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
