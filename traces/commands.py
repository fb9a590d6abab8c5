"""The verbs of ``sim trace``: show, check and make traces."""

from __future__ import annotations

import math
import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from traces.errors import TraceError, UserError
from traces.progress import progress

if TYPE_CHECKING:
    from traces.shape import ModelShape
    from traces.trace import Trace

# What the functions below need is imported within them, so that `sim --help` starts without NumPy.
_LINE_WIDTH = 88
_LONGEST_PROMPT = 512  # tokens; of a longer prompt, both ends are shown

TracePath = Annotated[Path, typer.Argument(help="A directory NAME.kvtrace, or 'sample'.", show_default=False)]


class InfoFormat(StrEnum):
    """How ``info`` writes."""

    table = "table"
    json = "json"


def info(
    path: TracePath,
    format: Annotated[InfoFormat, typer.Option(help="How to write it.")] = InfoFormat.table,
) -> None:
    """Show what a trace holds: model, shape, tokens, origin, size."""
    import json

    from traces.store import open_trace

    facts = _facts(open_trace(path))
    if format is InfoFormat.json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {_printable(_one_line(value))}")


def validate(
    paths: Annotated[
        list[str],
        typer.Argument(help="Traces, globs, or directories of traces.", show_default=False),
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Log-sum-exps to recompute in each trace, at random; one of 64 tokens of a layer at least.",
            show_default="all",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses them.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Check every invariant and checksum; one line for each trace.

    All log-sum-exps are recomputed, which costs as much as the attention of a full cache.
    """
    from time import perf_counter

    from traces.check import check_trace
    from traces.store import find_traces, open_trace

    errors = []
    for pattern in paths:
        try:
            found = find_traces([pattern])
        except TraceError as error:
            errors.append(error)
            typer.echo(_printable(f"FAILED {error}"))
            continue
        for path in found:
            try:
                trace, started = open_trace(path), perf_counter()
                with progress(f"checking {trace.path.name}", trace.shape.n_layers, quiet) as on_layer:
                    facts = check_trace(trace, samples, seed, on_layer)
                facts.append(f"{perf_counter() - started:.1f} s")
                typer.echo(_printable(f"ok     {path}: {'; '.join(facts)}"))
            except TraceError as error:
                errors.append(error)
                typer.echo(_printable(f"FAILED {error}"))
    if errors:
        raise errors[0]


def head(
    path: TracePath,
    tokens: Annotated[
        int, typer.Option("-n", "--tokens", min=0, help="How many decoded tokens to show.")
    ] = 128,
) -> None:
    """Show the prompt and the first decoded tokens as text.

    Each line begins with a position.
    """
    from traces.store import open_trace

    trace = open_trace(path)
    prompt, total = trace.prompt_tokens, trace.total_tokens
    typer.echo(f"prompt: {prompt} tokens")
    if prompt <= _LONGEST_PROMPT:
        _print_span(trace, 0, prompt)
    else:
        _print_span(trace, 0, _LONGEST_PROMPT // 2)
        typer.echo(f"{'...':>8}")
        _print_span(trace, prompt - _LONGEST_PROMPT // 2, prompt)
    stop = min(prompt + tokens, total)
    typer.echo(f"\ndecoded: first {stop - prompt} of {total - prompt} tokens")
    _print_span(trace, prompt, stop)


def make(
    out: Annotated[Path, typer.Argument(help="The directory to create, NAME.kvtrace.", show_default=False)],
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
    query_heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="KV heads; divides the query heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Head dimension, at least 8.")] = 64,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    total_tokens: Annotated[int, typer.Option(help="Tokens of prompt and completion.")] = 1024,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trace.")] = 0,
    values: Annotated[bool, typer.Option("--values", help="Add values (noise).")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a trace.")] = False,
) -> None:
    """Make a synthetic trace whose attention is known.

    It has sinks, heavy hitters and a needle.
    """
    from traces.shape import ModelShape
    from traces.synthetic import make_synthetic

    try:
        shape = ModelShape(layers, query_heads, kv_heads, head_dim, dtype)
        _require_room(out, shape, total_tokens)
        trace = make_synthetic(
            out,
            shape=shape,
            prompt_tokens=prompt_tokens,
            total_tokens=total_tokens,
            seed=seed,
            with_values=values,
            overwrite=overwrite,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    typer.echo(f"{trace.path}  {trace.trace_id}")


def _require_room(out: Path, shape: ModelShape, total_tokens: int) -> None:
    """Refuse a trace that its disk cannot hold, before anything is made of it; raises UserError."""
    place = next((folder for folder in out.absolute().parents if folder.is_dir()), None)
    queries_to_keys = 1 + shape.n_query_heads / (2 * shape.n_kv_heads)
    needed = total_tokens * shape.n_layers * shape.n_kv_heads * shape.bytes_per_entry * queries_to_keys
    free = math.inf if place is None else shutil.disk_usage(place).free
    if needed > free:
        raise UserError(f"{out} would take {needed:.3g} bytes; allowed: the {free:.3g} that are free there")


def _facts(trace: Trace) -> dict[str, object]:
    """Return the manifest's fields for reading: the long ones counted, sizes added."""
    from dataclasses import asdict

    facts: dict[str, object] = {"path": str(trace.path)}
    facts |= asdict(trace.manifest)
    del facts["files"], facts["vocabulary"]
    facts["sensitivity"] = {"n_draws": trace.manifest.n_draws} if trace.has_sensitivity else None
    n_bytes = sum(record["size"] for record in trace.manifest.all_files.values())
    facts["vocabulary_size"] = len(trace.manifest.vocabulary)
    facts["decoded_tokens"] = trace.total_tokens - trace.prompt_tokens
    facts["bytes_per_entry"] = trace.shape.bytes_per_entry
    facts["bytes"] = n_bytes
    facts["bytes_per_token"] = round(n_bytes / trace.total_tokens)
    return facts


def _one_line(value: object) -> str:
    """Write a field in one line; what is nested deeper is left to the JSON format."""
    if not isinstance(value, dict):
        return "none" if value is None or value == "" else str(value)
    plain = [f"{name}={inner}" for name, inner in value.items() if not isinstance(inner, dict)]
    return ", ".join(plain) or "none"


def _print_span(trace: Trace, start: int, stop: int) -> None:
    """Print tokens as text in lines of a bounded width, broken between tokens."""
    token_ids = trace.token_ids[start:stop].tolist()
    vocabulary = trace.manifest.vocabulary
    line, line_start = "", start
    for position, token_id in enumerate(token_ids, start):
        piece = vocabulary.get(token_id, f"<{token_id}>") if vocabulary else f"{token_id} "
        shown = _printable(piece)
        if line and len(line) + len(shown) > _LINE_WIDTH:
            typer.echo(f"{line_start:>8}  {line}")
            line, line_start = "", position
        line += shown
        if piece.endswith("\n"):
            typer.echo(f"{line_start:>8}  {line}")
            line, line_start = "", position + 1
    if line:
        typer.echo(f"{line_start:>8}  {line}")


def _printable(text: str) -> str:
    """Escape what would break a line or move the cursor: a trace may hold any text."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
