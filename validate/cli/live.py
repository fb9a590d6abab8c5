"""``sim validate live``: accuracy with real eviction, and how well the simulator predicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulator.cli import shared
from traces.errors import UserError
from traces.seeds import require_seed
from validate.cli import options
from validate.models.shapes import asked_model, meaningless


def live(
    prompts: Annotated[
        str,
        typer.Option(
            help=f"JSONL with prompt (or problem, question) and answer; or {options.SHIPPED_PROMPTS}."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run goes on there.")],
    model: options.Model = None,
    random_weights: options.RandomWeights = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    policy: options.Policies = None,
    budget: options.Budgets = None,
    configs: options.Configs = None,
    buffer: shared.Buffer = None,
    wave: shared.Waves = None,
    limit: options.Limit = None,
    samples: Annotated[int, typer.Option(help="Texts per problem; more than one need --temperature.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this nucleus only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of a full-cache text.")] = 1400,
    stretch: Annotated[
        float | None,
        typer.Option(
            help="Under eviction a text may be so many times as long as its full-cache run.",
            show_default="1.1, sampled 2",
        ),
    ] = None,
    no_chat: options.NoChat = False,
    batch: Annotated[int, typer.Option(help="Problems decoded together.")] = 128,
    simulated: Annotated[
        Path | None,
        typer.Option(help="Rows of sim replay (Parquet): how well do they predict these answers?"),
    ] = None,
    report: options.Report = None,
    format: shared.Format = None,
    output: shared.Output = None,
    seed: options.Seed = 0,
    jobs: options.Processes = 0,
    quiet: shared.Quiet = False,
) -> None:
    """Decode problems with real eviction and grade the answers.

    Every problem is decoded with the full cache first; shares of a budget are shares of that run.
    """
    from simulator.policies.wave import tell_unused
    from simulator.results.output import choose_format, require_places
    from simulator.workers.cores import worker_count

    require_seed(seed, "--seed")
    source = asked_model(model, random_weights, "reference")
    chosen = choose_format(format, output)
    require_places({"-o": output, "--report": report})
    options.require_report(report)
    cells = options.asked_cells(policy, budget, configs, buffer)
    from validate.live.completions import LiveSettings
    from validate.live.matrix import MatrixSettings
    from validate.live.output import read_simulated, report_failed, tell
    from validate.live.run import decoding_dtype, open_matrix, run_matrix
    from validate.models.load import know_model, resolve_device
    from validate.problems.sets import prompts_file

    target = str(resolve_device(device))
    shared.require_counts(samples=samples, batch=batch, max_new_tokens=max_new_tokens, stretch=stretch)
    if temperature is None and (top_p is not None or samples > 1):
        what = "--top-p" if top_p is not None else f"--samples {samples}"
        raise UserError(f"{what} is given without --temperature: greedy texts are all the same")
    settings = MatrixSettings(
        model=source,
        dtype=decoding_dtype(dtype, target),
        device=target,
        revision=revision,
        prompts=str(prompts_file(prompts)),
        limit=limit,
        batch=batch,
        waves=tuple(map(str, wave or ())),
        live=LiveSettings(
            max_new_tokens=max_new_tokens,
            # Sampled texts differ in length even with the full cache.
            stretch=stretch or (1.1 if temperature is None else 2.0),
            samples=samples,
            sampling=options.asked_sampling(temperature, top_p, seed),
            use_chat_template=not no_chat,
            seed=seed,
        ),
    )
    replayed = None if simulated is None else read_simulated(simulated)
    n_processes = worker_count(jobs, None if target == "cpu" else 1)
    if wave:
        tell_unused(wave, [know_model(source, revision).name])
    rows, failed, n_asked = run_matrix(open_matrix(settings, out), cells, n_processes, quiet)
    tell(rows, out, replayed, report, chosen, output, meaningless(source), quiet=quiet)
    report_failed(failed, n_asked, "batches")
