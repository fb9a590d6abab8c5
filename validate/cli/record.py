"""The ``sim record`` verb: run a model over a file of prompts and write one trace per row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from traces.errors import Interrupted, UserError
from traces.progress import progress, shows_progress
from traces.seeds import require_seed
from traces.wording import counted
from validate.cli import options
from validate.models.shapes import asked_model, meaningless

if TYPE_CHECKING:
    from validate.problems.prompts import Prompt
    from validate.record.rows import Row

# Texts of a large model that are decoded together: one of half a billion parameters then writes several times
# as many tokens a second on two cores as alone.
_BATCH, _MOST_TOGETHER = 16, 4096
_MOST_DRAWS = 64


def record(
    prompts: Annotated[
        Path,
        typer.Option(
            help=f"JSONL with prompt (or problem, question), maybe id, answer; or {options.SHIPPED_PROMPTS}."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the traces, one ID.kvtrace per row.")],
    model: options.Model = None,
    random_weights: options.RandomWeights = None,
    revision: options.Revision = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Take each row's completion instead of decoding.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: options.Device = "auto",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Decode at most this many tokens.", show_default="1024")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the most likely token; the default.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature instead.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this nucleus only.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.", show_default="0")] = None,
    limit: Annotated[int | None, typer.Option(help="Record only the first N rows.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Decode so many rows together, then record each in one pass.",
            show_default="16 for a large model on a CPU, else 1",
        ),
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="Record values as well.")] = False,
    sensitivity: Annotated[
        int | None,
        typer.Option(metavar="DRAWS", help="Record values and how predictions depend on heads."),
    ] = None,
    no_chat: options.NoChat = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Record again what is there already.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress; errors and the table only.")
    ] = False,
) -> None:
    """Decode prompts with the full cache and write traces.

    A trace holds queries, keys and log-sum-exp of attention.

    Started again, it goes on with the rows that have no trace yet.
    """
    for option, given in (("--max-new-tokens", max_new_tokens), ("--batch", batch)):
        if rescore and given is not None:
            raise UserError(f"{option} {given} contradicts --rescore, which decodes nothing")
    if sensitivity is not None and not 1 <= sensitivity <= _MOST_DRAWS:
        raise UserError(f"--sensitivity is {sensitivity}; allowed: 1 to {_MOST_DRAWS} draws")
    if batch is not None and not 1 <= batch <= _MOST_TOGETHER:
        raise UserError(f"--batch is {batch}; allowed: 1 to {_MOST_TOGETHER}")
    _require_sampling(temperature, top_p, seed, "--greedy" if greedy else "--rescore" if rescore else "")
    name = asked_model(model, random_weights, "reference")
    results: list[Row] = []
    try:
        # torch and transformers take seconds to import; only here are they needed.
        from validate.models.load import load_model
        from validate.models.threads import is_small, limit_threads
        from validate.problems.prompts import (
            read_prompts,
            require_completions,
            require_known_words,
            tell_limit,
        )
        from validate.problems.sets import prompts_file
        from validate.record.recorder import observed_shape
        from validate.record.rows import RowSettings, complete_rows, record_row

        settings = RowSettings(
            rescore=rescore,
            max_new_tokens=1024 if max_new_tokens is None else max_new_tokens,
            sampling=options.asked_sampling(temperature, top_p, seed or 0),
            use_chat_template=not no_chat,
            with_values=values or sensitivity is not None,
            n_draws=sensitivity or 0,
            overwrite=overwrite,
        )
        prompts = prompts_file(prompts)
        rows = read_prompts(prompts, limit)
        tell_limit(len(rows), limit, prompts)
        if rescore:
            require_completions(rows, prompts)
        _set_library_messages(quiet)
        loaded = load_model(name, dtype, device, revision)
        # A model that cannot be recorded is refused once, not once per row.
        observed_shape(loaded.model)
        require_known_words(rows, loaded.tokenizer, prompts, rescore)
        limit_threads(loaded.model)
        options.make_folder(out)
        is_alone = rescore or is_small(loaded.model) or loaded.model.device.type != "cpu"
        complete = partial(complete_rows, loaded, out=out, settings=settings)
        record_one = partial(record_row, loaded, out=out, settings=settings)
        _record_all(complete, record_one, rows, batch or (1 if is_alone else _BATCH), results, quiet)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted with {counted(len(results), 'row')} done: the same command again goes on with the "
            "others"
        ) from None
    typer.echo("\n".join([*table_lines(results), *filter(None, [meaningless(name)])]))
    if any(row.status == "failed" for row in results):
        raise typer.Exit(1)


def _require_sampling(temperature: float | None, top_p: float | None, seed: int | None, other: str) -> None:
    """Refuse options of sampling that say nothing, or contradict the ``other`` option, if it is given."""
    require_seed(seed or 0, "--seed")
    if temperature is None:
        if seed is not None:
            raise UserError(f"--seed {seed} is given without --temperature: greedy decoding draws nothing")
        if top_p is not None:
            raise UserError(f"--top-p {top_p} is given without --temperature; give both or neither")
    elif other:
        raise UserError(f"--temperature {temperature} contradicts {other}; give one of them")


def _set_library_messages(quiet: bool) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not shows_progress(quiet):
        logging.disable_progress_bar()


def _record_all(
    complete: Callable[..., dict[str, list[int]]],
    record_row: Callable[..., Row],
    prompts: list[Prompt],
    n_together: int,
    results: list[Row],
    quiet: bool,
) -> None:
    """Record every row, append what became of it to ``results`` and report on stderr."""
    with progress("recording", len(prompts), quiet) as advance:

        def show(n_tokens: int, name: str) -> None:
            advance(told=f"{name}: {n_tokens} tokens")

        for first in range(0, len(prompts), n_together):
            rows = prompts[first : first + n_together]
            all_of_them = counted(len(rows), "text")
            texts: dict[str, list[int]] = {}
            if n_together > 1:
                try:
                    texts = complete(rows, on_tokens=partial(show, name=all_of_them))
                except UserError as error:
                    print(f"sim: {error}", file=sys.stderr)
            for prompt in rows:
                row = record_row(
                    prompt,
                    completion_ids=texts.get(prompt.id),
                    on_tokens=partial(show, name=prompt.file_stem),
                )
                results.append(row)
                advance()
                if row.status == "failed":
                    print(f"line {prompt.line}, {row.name}: failed: {row.error}", file=sys.stderr)
                elif row.status == "kept" and not quiet:
                    print(f"{row.name}: recorded already, kept", file=sys.stderr)


def table_lines(rows: Iterable[Row]) -> list[str]:
    """Give a table of what became of each row, one line each under a header, columns aligned."""
    cells: list[tuple[str, ...]] = [("trace", "status", "prompt_tokens", "total_tokens", "correct")]
    for row in rows:
        numbers = (row.prompt_tokens, row.total_tokens)
        correct = {None: "-", True: "yes", False: "no"}[row.correct]
        cells.append((row.name, row.status, *("-" if n is None else str(n) for n in numbers), correct))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
