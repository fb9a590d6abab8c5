"""How tables and charts look in a notebook: small, readable anywhere, and the same every time."""

from __future__ import annotations

from typing import Any

import polars as pl


def use_plain_outputs() -> None:
    """Show charts as pictures and tables without types, in few digits.

    A picture (SVG) takes no script and no data with it, so that a saved notebook stays small and is shown
    wherever notebooks are.
    """
    import altair as alt

    alt.renderers.register("plain-svg", _as_svg)
    alt.renderers.enable("plain-svg")
    pl.Config.set_tbl_formatting("ASCII_MARKDOWN")
    pl.Config.set_tbl_hide_column_data_types(True)
    pl.Config.set_tbl_hide_dataframe_shape(True)
    pl.Config.set_tbl_rows(40)
    pl.Config.set_tbl_cols(20)
    pl.Config.set_tbl_width_chars(-1)
    pl.Config.set_fmt_str_lengths(90)
    pl.Config.set_float_precision(4)
    _show_tables_as_markdown()


def _show_tables_as_markdown() -> None:
    """Show tables as Markdown; as HTML every text would stand in quotes."""
    from IPython import get_ipython

    shell: Any = get_ipython()
    if shell is not None:
        formatters = shell.display_formatter.formatters
        formatters["text/html"].for_type(pl.DataFrame, lambda table: None)
        formatters["text/markdown"].for_type(pl.DataFrame, str)


def _as_svg(specification: dict[str, Any], **_options: Any) -> dict[str, str]:
    """Draw a chart, without descriptions of every mark: they would make it three times as large."""
    import vl_convert

    config = specification.get("config", {}) | {"aria": False}
    return {"image/svg+xml": vl_convert.vegalite_to_svg(specification | {"config": config})}
