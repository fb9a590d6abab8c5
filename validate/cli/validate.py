"""The ``sim validate`` verb: policies with real eviction, and how well the simulator predicts them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from simulator.cli.completion import policies
from traces.documents import read_json
from traces.errors import UserError
from traces.extras import require_extra
from traces.seeds import require_seed
from validate.models.shapes import asked_model, meaningless

if TYPE_CHECKING:
    from simulator.budget import Budget
    from simulator.policies.language import Policy

DEFAULT_POLICIES = "streamingllm,snapkv,rkv,pyramid-rkv,rkv+wave,rkv+utility,reasonalloc,random,random-prompt"
DEFAULT_BUDGETS = "10%,15%,20%,30%,40%,50%"
LEVELS = ("live", "shadow", "forced")


def validate(
    context: typer.Context,
    level: Annotated[
        str, typer.Option(help="live: problems with answers. shadow, forced: the tokens of --trace.")
    ] = "live",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="live: JSONL with prompt (or problem, question) and answer. With --config: BENCHMARK=FILE."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="live: a protocol in TOML, such as validate/configs/reasonalloc_paper.toml."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="live: folder for the results; an interrupted run goes on there.")
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option("--trace", "-t", help="shadow, forced: trace, folder or glob; repeats."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="'reference', a folder with a saved model, or a hub id.", show_default="reference"),
    ] = None,
    random_weights: Annotated[
        str | None, typer.Option(help="Instead: random weights of this shape, such as R1-Llama-8B.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, float16 or bfloat16.", show_default="float32 on a CPU")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help="Comma list.",
            show_default=DEFAULT_POLICIES.replace(",", ", "),
            autocompletion=policies,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="Comma list.", show_default=DEFAULT_BUDGETS.replace(",", ", ")),
    ] = None,
    configs: Annotated[
        Path | None,
        typer.Option(help='Instead of both: JSON list of {"policy": "rkv:alpha=0.2", "budget": "20%"}.'),
    ] = None,
    buffer: Annotated[
        int | None, typer.Option(help="Entries added between compressions, for every policy (default 128).")
    ] = None,
    wave: Annotated[list[Path] | None, typer.Option(help="Wave made by sim calibrate; repeats.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take only the first N problems.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Texts per problem; more than one need --temperature.", show_default="1"),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this nucleus only.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of a full-cache text.", show_default="1400")
    ] = None,
    stretch: Annotated[
        float | None,
        typer.Option(
            help="Under eviction a text may be so many times as long as its full-cache run.",
            show_default="1.1, sampled 2",
        ),
    ] = None,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Do not apply the tokenizer's chat template.")
    ] = False,
    batch: Annotated[int | None, typer.Option(help="Problems decoded together.", show_default="128")] = None,
    simulated: Annotated[
        Path | None,
        typer.Option(help="Rows of sim replay (Parquet): how well do they predict these answers?"),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write charts and tables to this HTML file.")] = None,
    steps: Annotated[
        Path | None, typer.Option(help="forced: write mass per layer and step to this file (Parquet).")
    ] = None,
    format: Annotated[str | None, typer.Option(help="table, csv, json or parquet.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write rows to this file.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling and of policies that draw at random.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; 0 uses all cores (one on a GPU).")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Decode with real eviction, live or beside a replay.

    Live runs grade answers, forced ones tell drift from the simulator, shadow ones that decisions are equal.

    A live run decodes every problem with the full cache first; shares of a budget are shares of that run.
    """
    if context.invoked_subcommand is not None:
        return
    from simulator.policies.wave import tell_unused
    from simulator.results.output import choose_format, require_parquet, require_places
    from validate.levels.cells import compare_with_traces
    from validate.live.output import read_simulated, report_failed, tell
    from validate.live.run import n_asked, open_matrix, processes, run_matrix
    from validate.models.load import know_model

    require_seed(seed, "--seed")
    if level not in LEVELS:
        raise UserError(f"--level is '{level}'; allowed: {', '.join(LEVELS)}")
    source = asked_model(model, random_weights, "reference")
    chosen = choose_format(format, output)
    require_places({"-o": output, "--report": report, "--steps": steps})
    if report is not None:
        require_extra("--report", "altair", "vl_convert")
    if config is not None:
        beside = {
            "--trace": trace or None, "--configs": configs, "--buffer": buffer, "--temperature": temperature,
            "--top-p": top_p, "--stretch": stretch, "--simulated": simulated,
            "--steps": steps, "--level": None if level == "live" else level,
        }  # fmt: skip
        for option, given in beside.items():
            if given is not None:
                raise UserError(f"{option} does not go with --config: the file says what is run")
        if out is None:
            raise UserError("--config needs --out FOLDER")
        from validate.protocol.options import Asked, asked_lists
        from validate.protocol.run import run_protocol

        policies, budgets = asked_lists(policy, budget)
        asked = Asked(
            config=config,
            out=out,
            model=asked_model(model, random_weights, None),
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
        return
    cells = _asked_cells(policy, budget, configs, buffer)
    if level != "live":
        live_only = {
            "--prompts": prompts or None, "--out": out, "--simulated": simulated, "--report": report,
            "--limit": limit, "--samples": samples,
            "--temperature": temperature, "--top-p": top_p, "--max-new-tokens": max_new_tokens,
            "--stretch": stretch, "--batch": batch, "--no-chat": no_chat or None, "--jobs": jobs or None,
        }  # fmt: skip
        for name, given in live_only.items():
            if given is not None:
                raise UserError(f"{name} goes with --level live; --level {level} takes --trace")
        if steps is not None and level != "forced":
            raise UserError(f"--steps goes with --level forced; found: {level}")
        require_parquet({"--steps": steps})
        compare_with_traces(
            level, trace, source, revision, dtype, device, cells, wave, seed, chosen, output, steps, quiet
        )
        return
    if not prompts or out is None:
        raise UserError("--level live needs --prompts FILE.jsonl and --out FOLDER")
    if trace:
        raise UserError("--trace goes with --level shadow or forced; --level live takes --prompts")
    if steps is not None:
        raise UserError("--steps goes with --level forced; found: live")
    if len(prompts) > 1:
        raise UserError(f"--prompts is given {len(prompts)} times; allowed: once, or with --config")
    settings = _matrix_settings(
        prompts[0], source, revision, dtype, device, limit, 128 if batch is None else batch, wave,
        1 if samples is None else samples, temperature, top_p,
        1400 if max_new_tokens is None else max_new_tokens, stretch, no_chat, seed,
    )  # fmt: skip
    replayed = None if simulated is None else read_simulated(simulated)
    n_processes = processes(jobs, settings.device)
    if wave:
        tell_unused(wave, [know_model(source, revision).name])
    matrix = open_matrix(settings, out)
    rows, failed = run_matrix(matrix, cells, n_processes, quiet)
    note = meaningless(source)
    tell(rows, out, replayed, report, chosen, output, note, quiet=quiet)
    report_failed(list(failed.values()), n_asked(matrix, cells), "batches")


class _Configuration(TypedDict):
    """An entry of --configs; whatever else it says is not read."""

    policy: str
    budget: str | int | float


def _asked_cells(
    policy: list[str] | None, budget: list[str] | None, configs: Path | None, buffer: int | None
) -> list[tuple[Policy, Budget]]:
    """Read what is to be run: the product of policies and budgets, or the pairs of a file."""
    from simulator.budget import parse_budget, parse_budgets
    from simulator.policies.language import parse_policies, parse_policy, require_buffers

    if configs is None:
        policies = parse_policies(policy or [DEFAULT_POLICIES], buffer)
        return [(own, each) for each in parse_budgets(budget or [DEFAULT_BUDGETS]) for own in policies]
    overrides = {} if buffer is None else {"buffer": buffer}
    if policy or budget:
        raise UserError("--configs stands instead of --policy and --budget; give one or the other")
    rows = read_json(configs, f"--configs {configs}", list[_Configuration])
    if not rows:
        raise UserError(f"--configs {configs} holds no configuration; allowed: one or more")
    cells = [(parse_policy(row["policy"], **overrides), parse_budget(row["budget"])) for row in rows]
    require_buffers((own for own, _ in cells), buffer)
    return list(dict.fromkeys(cells))


def _matrix_settings(
    prompts: str,
    model: str,
    revision: str | None,
    dtype: str | None,
    device: str,
    limit: int | None,
    batch: int,
    wave: list[Path] | None,
    samples: int,
    temperature: float | None,
    top_p: float | None,
    max_new_tokens: int,
    stretch: float | None,
    no_chat: bool,
    seed: int,
) -> Any:
    from dataclasses import asdict

    from validate.live.matrix import MatrixSettings
    from validate.models.load import resolve_device
    from validate.models.next_token import Sampling

    target = str(resolve_device(device))
    for name, value in (("samples", samples), ("batch", batch), ("max-new-tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"--{name} is {value}; allowed: 1 or more")
    if stretch is not None and not stretch >= 1:
        raise UserError(f"--stretch is {stretch}; allowed: 1 or more")
    if temperature is None and (top_p is not None or samples > 1):
        what = "--top-p" if top_p is not None else f"--samples {samples}"
        raise UserError(f"{what} is given without --temperature: greedy texts are all the same")
    sampling = Sampling(
        temperature is not None,
        1.0 if temperature is None else temperature,
        1.0 if top_p is None else top_p,
        seed,
    )
    return MatrixSettings(
        model=model,
        # Tokens equal those of another implementation in float32 only, and a CPU is no slower in it.
        dtype=dtype or ("float32" if target == "cpu" else "auto"),
        device=target,
        revision=revision,
        prompts=prompts,
        limit=limit,
        batch=batch,
        waves=tuple(str(path) for path in wave or ()),
        live={
            "max_new_tokens": max_new_tokens,
            # Sampled texts differ in length even with the full cache.
            "stretch": stretch or (1.1 if temperature is None else 2.0),
            "samples": samples,
            "sampling": asdict(sampling),
            "use_chat_template": not no_chat,
            "seed": seed,
        },
    )
