"""``sim validate protocol``: what a published protocol gives here, beside its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulator.cli import shared
from simulator.cli.completion import policies
from traces.seeds import require_seed
from validate.cli import options
from validate.models.shapes import asked_model


def protocol(
    config: Annotated[
        Path, typer.Option(help="The protocol in TOML, such as validate/configs/reasonalloc_paper.toml.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run goes on there.")],
    prompts: Annotated[
        list[str] | None, typer.Option(help="BENCHMARK=FILE: problems (JSONL); repeats.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="One of the file, NAME=PLACE, a folder or a hub id.", show_default="the file's"),
    ] = None,
    random_weights: options.RandomWeights = None,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", "-p", help="Only these of the file.", show_default="all", autocompletion=policies
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="Only these of the file.", show_default="all"),
    ] = None,
    wave: shared.Waves = None,
    limit: options.Limit = None,
    samples: Annotated[int | None, typer.Option(help="Texts per problem.", show_default="the file's")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of a text.", show_default="the file's")] = None,
    no_chat: options.NoChat = False,
    batch: Annotated[
        int | None, typer.Option(help="Problems decoded together.", show_default="the file's")
    ] = None,
    report: options.Report = None,
    format: shared.Format = None,
    output: shared.Output = None,
    seed: options.Seed = 0,
    jobs: options.Processes = 0,
    quiet: shared.Quiet = False,
) -> None:
    """Run a paper's protocol and set accuracy beside its numbers.

    Parts of it can be run. The table says what is not the file's.
    """
    from simulator.results.output import choose_format, require_places

    require_seed(seed, "--seed")
    source = asked_model(model, random_weights, None)
    chosen = choose_format(format, output)
    require_places({"-o": output, "--report": report})
    options.require_report(report)
    from validate.protocol.options import Asked, asked_lists
    from validate.protocol.run import run_protocol

    policies, budgets = asked_lists(policy, budget)
    asked = Asked(
        config=config,
        out=out,
        model=source,
        revision=revision,
        dtype=dtype,
        device=device,
        prompts=tuple(prompts or ()),
        policies=policies,
        budgets=budgets,
        waves=tuple(map(str, wave or ())),
        samples=samples,
        max_new_tokens=max_new_tokens,
        batch=batch,
        limit=limit,
        use_chat_template=not no_chat,
        seed=seed,
        jobs=jobs,
        quiet=quiet,
    )
    run_protocol(asked, chosen, output, report)
