"""How verbs of ``sim`` show their help: many options in groups, the example as it is typed."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from traces.errors import UserError

# What a verb does with few options is seen without groups.
_FEW = 12
_GROUPS = {
    "What is run": (
        *("--trace", "--held-out", "--prompts", "--limit", "--config", "--configs"),
        *("--policy", "--budget", "--buffer", "--wave", "--family", "--simulated"),
    ),
    "Model": ("--model", "--random-weights", "--revision", "--dtype", "--device", "--gpu", "--no-chat"),
    "Decoding": (
        *("--rescore", "--max-new-tokens", "--greedy", "--temperature", "--top-p", "--samples", "--stretch"),
        *("--batch", "--values"),
    ),
    "Search": (
        *("--metric", "--against", "--also", "--scorers", "--layers", "--heads", "--ranges", "--trials"),
        *("--keep", "--minutes"),
    ),
    "Measure only a sample": ("--sample-queries", "--sample-layers", "--sample-heads"),
    "Output": (
        *("--out", "--output", "--format", "--retained", "--trajectory", "--steps"),
        *("--report", "--charts", "--fidelity", "--accuracy", "--json"),
    ),
}
_OTHERS = "Options"
# Of a verb that searches nothing.
_ELSEWHERE = {"report": {"--metric": "Output"}, "bench": {"--minutes": _OTHERS}}


def _group(verb: str | None, option: str) -> str:
    found = next((group for group, options in _GROUPS.items() if option in options), _OTHERS)
    return _ELSEWHERE.get(verb or "", {}).get(option, found)


class _Shown:
    """What commands and groups of them share: sections of options, and an example that is not broken."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options by group."""
        params = self.get_params(ctx)  # type: ignore[attr-defined]
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        sections |= {group: [] for group in (*_GROUPS, _OTHERS)}
        for param in params:
            record = param.get_help_record(ctx)
            if record is None:
                continue
            name = next((own for own in param.opts if own.startswith("--")), "")
            usual = _OTHERS if len(params) <= _FEW else _group(ctx.info_name, name)
            sections["Arguments" if param.param_type_name == "argument" else usual].append(record)
        for group, records in sections.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)
        if isinstance(self, TyperGroup):
            self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example in a line of its own, whatever its length, so that it can be copied."""
        if self.epilog:  # type: ignore[attr-defined]
            formatter.write(f"\nExample:\n  {self.epilog}\n")  # type: ignore[attr-defined]


class Verb(_Shown, TyperCommand):
    """A verb of ``sim``; its epilog is an example of it."""


class Verbs(_Shown, TyperGroup):
    """A verb that has others below it; its epilog is an example of one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse options that stand where a verb has to, and say which there are."""
        first = args[0] if args else ""
        if first.startswith("-") and first not in ctx.help_option_names and not ctx.resilient_parsing:
            verbs = f"{', '.join(self.list_commands(ctx))}, as in {self.epilog}"
            raise UserError(f"{first} stands where a verb of {ctx.command_path} has to; allowed: {verbs}")
        return super().parse_args(ctx, args)
