"""A chart with its words: the page shows the words as text, an exported picture carries them in itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from simulator.charts.style import over_plot, styled
from traces.atomic import write_file, write_text
from traces.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """One chart of the page, under a name that is unique in the page and also an exported file's.

    ``chart`` is one of altair's without a title, with a width in pixels; a page sets its own width. ``note``
    is a sentence that tells how to read it. ``subject`` names what it shows, where the page says so once for
    several charts and a picture has to by itself.
    """

    name: str
    chart: Any
    title: str
    note: str = ""
    subject: str = ""

    def specification(self) -> dict[str, Any]:
        """Return the Vega-Lite specification for the page, which writes title and note itself."""
        # Named, the address of the schema is no use to a page without a network.
        found: dict[str, Any] = styled(self.chart).to_dict()
        found.pop("$schema", None)
        return found

    def export(self, folder: Path) -> list[Path]:
        """Write the chart as SVG and PNG and return the paths; raises UserError if it cannot be written."""
        import vl_convert

        title = f"{self.title}: {self.subject}" if self.subject else self.title
        titled = styled(self.chart.properties(title=over_plot(title, wrap(self.note, 90)))).to_dict()
        svg, png = folder / f"{self.name}.svg", folder / f"{self.name}.png"
        try:
            write_text(svg, vl_convert.vegalite_to_svg(titled))
            write_file(png, lambda to: to.write_bytes(vl_convert.vegalite_to_png(titled, ppi=200)))
        except OSError as error:
            raise UserError(f"--charts {folder}: {error.strerror}") from None
        return [svg, png]
