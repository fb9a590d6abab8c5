"""Run the protocol of a TOML file, and set what it gives beside published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl

from simulator.policies.wave import known_waves
from simulator.results.labels import told_apart
from simulator.results.output import write_rows
from simulator.workers.cores import worker_count
from traces.errors import UserError
from validate.live.accuracy import accuracy_table
from validate.live.completions import LiveSettings
from validate.live.matrix import MatrixSettings
from validate.live.output import put_out, report_failed
from validate.live.run import decoding_dtype, open_matrix, run_matrix
from validate.live.terminal import print_published
from validate.models.load import resolve_device
from validate.models.shapes import PREFIX, meaningless
from validate.protocol.file import Benchmark, Protocol, read_protocol
from validate.protocol.options import Asked, Choice, choose_model, given_prompts, narrowed
from validate.protocol.preflight import require_runnable
from validate.protocol.prompts import prepare_prompts
from validate.protocol.published import beside_published


def run_protocol(asked: Asked, chosen: str, output: Path | None = None, report: Path | None = None) -> None:
    """Decode what is not done yet, and tell accuracy beside what was published.

    Everything that can be refused is refused before the first text. The comparison goes to ``output``, or to
    standard output, as ``chosen``: table, csv, json or parquet. ``report`` is an HTML page of it.
    """
    protocol = read_protocol(asked.config)
    device = str(resolve_device(asked.device))
    jobs = worker_count(asked.jobs, None if device == "cpu" else 1)
    model = choose_model(protocol, asked.model)
    given = given_prompts(protocol, asked)
    protocol, changes = narrowed(protocol, asked)
    waves = _wave_files(protocol, model, asked.waves)
    require_runnable(protocol, model, asked, known_waves(waves))
    matrices = {}
    for name, benchmark in protocol.benchmarks.items():
        source = given.get(name, benchmark.prompts)
        if source is None:
            raise UserError(
                f"{asked.config}: benchmark '{name}' has no prompts; allowed: --prompts {name}=FILE"
            )
        place = prepare_prompts(name, source, protocol.prompt, asked.out / "prompts")
        settings = _settings(protocol, benchmark, model, asked, device, place, waves)
        matrices[name] = open_matrix(settings, asked.out / model.folder / name)
    found, n_batches = {}, 0
    failed: list[UserError] = []
    for name, matrix in matrices.items():
        cells = [(policy, own) for own in protocol.benchmarks[name].budgets for policy in protocol.policies]
        rows, errors, n_asked = run_matrix(matrix, cells, jobs, asked.quiet, name)
        write_rows(accuracy_table(rows), matrix.folder / "accuracy.csv", "csv")
        found[name] = rows
        failed += errors
        n_batches += n_asked
    table = _compared(found, protocol, model)
    write_rows(table, asked.out / f"comparison-{model.folder}.csv", "csv")
    note = "\n".join(filter(None, [*changes, meaningless(model.load)]))
    (labelled,) = told_apart(table)
    show = partial(print_published, table=labelled, source=protocol.source, note=note)
    put_out(table, show, output, chosen, note, quiet=asked.quiet)
    if report is not None:
        # altair is needed for a report alone.
        from validate.live.report import write_report

        (rows,) = told_apart(pl.concat(own.with_columns(family=pl.lit(name)) for name, own in found.items()))
        write_report(
            report,
            rows,
            accuracy_table(rows),
            asked.out / model.folder,
            note=note,
            published=labelled,
            source=protocol.source,
        )
    report_failed(failed, n_batches, "batches")


def _wave_files(protocol: Protocol, model: Choice, given: Sequence[str]) -> list[str]:
    """List the files of waves: that of the model, unless its weights are random, and those given."""
    own = None if model.stands_for is None else protocol.models[model.stands_for].wave
    return [*([own] if own and not model.load.startswith(PREFIX) else []), *given]


def _settings(
    protocol: Protocol,
    benchmark: Benchmark,
    model: Choice,
    asked: Asked,
    device: str,
    prompts: Path,
    waves: Sequence[str],
) -> MatrixSettings:
    return MatrixSettings(
        model=model.load,
        dtype=decoding_dtype(asked.dtype, device),
        device=device,
        revision=asked.revision,
        prompts=str(prompts),
        limit=asked.limit,
        batch=benchmark.batch,
        waves=tuple(waves),
        live=LiveSettings(
            max_new_tokens=benchmark.max_new_tokens,
            stretch=protocol.stretch,
            samples=protocol.samples,
            sampling=replace(protocol.sampling, seed=asked.seed),
            use_chat_template=asked.use_chat_template,
            seed=asked.seed,
        ),
    )


def _compared(found: dict[str, pl.DataFrame], protocol: Protocol, model: Choice) -> pl.DataFrame:
    return pl.concat(
        beside_published(
            rows,
            model.label,
            name,
            [own for own in protocol.published if (own.model, own.benchmark) == (model.stands_for, name)],
        )
        for name, rows in found.items()
    )
