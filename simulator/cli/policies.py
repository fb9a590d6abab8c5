"""``sim policies``: what there is by name, and what each does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

FormatOption = Annotated[str, typer.Option("--format", help="text or json.")]


def list_policies(format: FormatOption = "text") -> None:
    """List the policies and the parts they are made of."""
    from simulator.policies.catalogue import list_text, listing

    _print(format, lambda: list_text(_width()), listing)


def show_policy(
    name: Annotated[str, typer.Argument(help="A policy, one of its parts, or FILE.py:CLASS.")],
    format: FormatOption = "text",
) -> None:
    """Show parts, parameters, source and needs of a policy.

    Parameters come with defaults and meanings, the source with known deviations.
    """
    from dataclasses import asdict

    from simulator.policies.catalogue import cards, show_text

    _print(format, lambda: show_text(name, _width()), lambda: [asdict(card) for card in cards(name)])


def _print(format: str, text: Callable[[], str], data: Callable[[], Any]) -> None:
    import json

    from traces.errors import UserError

    if format not in ("text", "json"):
        raise UserError(f"--format is '{format}'; allowed: text, json")
    print(text() if format == "text" else json.dumps(data(), indent=1))


def _width() -> int:
    import shutil

    # Lines longer than that are read worse, whatever the terminal holds.
    return max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
