"""The page: one HTML file that carries its charts, their runtime and its data, and asks no network."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import polars as pl

from simulator.report.figure import Figure
from simulator.results.terminal import format_bytes
from traces.version import package_version
from traces.wording import number, span

_HOME = "simulator.report"


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A headed part of the page.

    Its template, in ``templates/`` of this package or of ``package``, knows ``values`` as ``own``, and the
    figures.
    """

    title: str
    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    package: str = _HOME


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """A page, as HTML, and its charts."""

    text: str
    figures: list[Figure]


def page(title: str, sections: Sequence[Section], origin: str = "", **data: Any) -> Report:
    """Write the page; its last line is ``origin``, and its script is given ``data`` beside all charts."""
    import vl_convert
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    figures = [figure for section in sections for figure in section.figures]
    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    packages = dict.fromkeys([_HOME, *(section.package for section in sections)])
    templates = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": number, "percent": _percent, "span": span, "bytes": format_bytes}
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    text = templates.get_template("page.html").render(
        title=title,
        sections=sections,
        origin=origin,
        data={"figures": {figure.name: figure.specification() for figure in figures}, **data},
        style=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        runtime=Markup(bundle.replace("</script", "<\\/script")),
    )
    return Report(text, figures)


def origin(rows: pl.DataFrame, command: str) -> str:
    """Say what made the page, when, and which code the rows are of."""
    known = "code_version" in rows.columns
    codes = rows["code_version"].drop_nulls().unique().sort().to_list() if known else []
    of_code = f" from rows of code {', '.join(codes)}" if codes else ""
    told = f"Made on {datetime.now(UTC):%Y-%m-%d} by kvbudget {package_version()}{of_code}."
    return f"{told} Command: {command}" if command else told


def this_command() -> str:
    """Give the command line that is running, as a shell reads it."""
    return shlex.join(["sim", *sys.argv[1:]])


def _percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def _resource(name: str) -> str:
    return resources.files(_HOME).joinpath(name).read_text(encoding="utf-8")
