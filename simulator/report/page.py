"""The page: one HTML file that carries its charts, their runtime and its data, and asks no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from simulator.report.cells import MOST_CELLS, CellPanel, Cells
from simulator.report.figure import Figure

# The browser itself refuses whatever would leave the page. Vega compiles its expressions, hence eval.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'unsafe-inline'; img-src data: blob:"
)
_LEGEND = ((0, "no head"), (0.25, "a quarter"), (0.5, "half"), (0.75, "three quarters"), (1, "all heads"))


@dataclass(frozen=True, slots=True)
class Section:
    """A headed part of the page.

    Attributes
    ----------
    title : str
    figures : list of Figure
    before, after : str
        HTML around the figures.
    narrow : bool
        Whether three figures may stand side by side.
    """

    title: str
    figures: list[Figure]
    before: str = ""
    after: str = ""
    narrow: bool = False


def paragraph(text: str, kind: str = "") -> str:
    """Write plain text as a paragraph."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"


def page(
    title: str,
    sections: Sequence[Section],
    cells: Cells,
    absent: Sequence[str],
    rows_table: str,
    origin: str = "",
) -> str:
    """Write the page.

    Parameters
    ----------
    title : str
    sections : sequence of Section
        Shown before the cells.
    cells : Cells
        Shown one at a time.
    absent : sequence of str
        What the page could show and by which option.
    rows_table : str
        HTML of all means.
    origin : str
        What made the page; its last line.
    """
    figures = [figure for section in sections for figure in section.figures]
    figures += [figure for panel in cells.panels for figure in panel.figures]
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [_section(section) for section in sections]
    body.append(_cells(cells))
    body.append(
        "<h2>All policies and budgets</h2>"
        f"<details><summary>Means over traces</summary>{rows_table}</details>"
    )
    if absent:
        body += ["<h2>Not in this page</h2>", *(paragraph(text, "note") for text in absent)]
    if origin:
        body.append(f"<footer>{paragraph(origin, 'note')}</footer>")
    data = {
        "figures": {figure.name: figure.specification() for figure in figures},
        "kept": {panel.name: panel.kept for panel in cells.panels if panel.kept},
        "texts": cells.texts,
    }
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_resource('page.css')}</style></head><body>",
            *body,
            "<noscript><p>JavaScript, which draws the charts, is off; the tables need none.</p></noscript>",
            f'<script type="application/json" id="report-data">{_embedded(data)}</script>',
            f"<script>{_runtime()}</script>",
            f"<script>{_resource('page.js')}</script>",
            "</body></html>\n",
        ]
    )


def _section(section: Section) -> str:
    grid = f'<div class="grid{" thirds" if section.narrow else ""}">'
    drawn = f"{grid}{''.join(map(_figure, section.figures))}</div>" if section.figures else ""
    return f"<section><h2>{html.escape(section.title)}</h2>{section.before}{drawn}{section.after}</section>"


def _figure(figure: Figure) -> str:
    return (
        f"<figure><figcaption><b>{html.escape(figure.title)}</b>{html.escape(figure.note)}</figcaption>"
        f'<div class="plot" data-figure="{figure.name}"></div></figure>'
    )


def _cells(cells: Cells) -> str:
    if not cells.panels:
        return ""
    options = "".join(
        f'<option value="{panel.name}">{html.escape(panel.title)}</option>' for panel in cells.panels
    )
    left_out = (
        paragraph(
            f"{cells.n_left_out} more cells are left out: a page shows {MOST_CELLS}. "
            "--policy and --budget choose others.",
            "note",
        )
        if cells.n_left_out
        else ""
    )
    return (
        "<section><h2>One policy at a time</h2>"
        '<p class="chooser"><label for="cell">Policy and budget</label> '
        f'<select id="cell">{options}</select></p>'
        f"{left_out}{''.join(map(_cell, cells.panels))}</section>"
    )


def _cell(panel: CellPanel) -> str:
    # The maps of mass and of budgets stand side by side, what goes on over time has all the width.
    maps, over_time = panel.figures[:2], panel.figures[2:]
    parts = [f'<div class="grid">{"".join(map(_figure, maps))}</div>' if maps else ""]
    parts += map(_figure, over_time)
    if panel.kept:
        parts.append(_token_box(panel))
    return f'<div class="cell" id="{panel.name}" hidden>{"".join(parts)}</div>'


def _token_box(panel: CellPanel) -> str:
    samples = "".join(f'<li><span data-share="{share}">token</span> {words}</li>' for share, words in _LEGEND)
    slider = f"slider-{panel.name}"
    return (
        f'<div class="tokenbox" data-cell="{panel.name}"><h3>Which tokens are kept</h3>'
        + paragraph(
            "The text, each token shaded by how many KV heads of all layers still hold it. "
            "The slider goes through the compressions; tokens not decoded yet are hidden.",
            "note",
        )
        + f'<ul class="legend"><li>Held by</li>{samples}</ul>'
        + f'<div class="slider"><label for="{slider}">Time</label>'
        f'<input type="range" id="{slider}" min="0" max="0" step="1"><output class="when"></output>'
        '<output class="which"></output></div>'
        '<div class="kept"><div class="prompt"><span class="part">Prompt</span><span class="tokens">'
        '</span></div><div class="decoded"><span class="part">Decoded</span><span class="tokens"></span>'
        "</div></div></div>"
    )


def _embedded(data: dict[str, Any]) -> str:
    # Text of a model may hold what ends a script; an escaped slash and "<!" are the same to JSON.
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _runtime() -> str:
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return bundle.replace("</script", "<\\/script")


def _resource(name: str) -> str:
    return resources.files("simulator.report").joinpath(name).read_text(encoding="utf-8")
