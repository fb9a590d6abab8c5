"""``sim reasoner``: problems, training and measurements of the reference reasoner."""

from __future__ import annotations

import re
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from simulator.cli import shared
from traces.atomic import write_text
from traces.documents import read_json, shown
from traces.errors import UserError
from traces.extras import require_extra
from traces.seeds import require_seed

Size = Annotated[str, typer.Option("--size", metavar="N[-M]", help="Difficulty.", show_default="4-12")]
Length = Annotated[
    str, typer.Option("--length", metavar="N[-M]", help="Tokens of a chain.", show_default="560-900")
]
Legs = Annotated[str, typer.Option("--legs", metavar="N[-M]", help="Goals.", show_default="1-3")]


def problems(
    family: Annotated[str, typer.Option(help="walk, program, machine or mixed.")] = "mixed",
    size: Size = "",
    length: Length = "",
    care: Annotated[int | None, typer.Option(help="Redundancy, 0 to 2.", show_default="drawn")] = None,
    legs: Legs = "",
    slip_rate: Annotated[float, typer.Option(help="Share of checked lines that are wrong at first.")] = 0.0,
    count: Annotated[int, typer.Option(help="Number of problems.")] = 16,
    seed: Annotated[int, typer.Option(help="Training uses seed 0; any other is held out.")] = 1,
) -> None:
    """Write problems as JSONL, one per line, to standard output."""
    from validate.problems.families import FAMILIES, make_problem

    if family not in (*FAMILIES, "mixed"):
        raise UserError(f"--family is '{family}'; allowed: {', '.join(FAMILIES)}, mixed")
    require_seed(seed, "--seed")
    asked: dict[str, Any] = _ranges(size, length, legs) | {"care": care, "slip_rate": slip_rate}
    families = list(FAMILIES) if family == "mixed" else [family]
    try:
        for index in range(count):
            problem = make_problem(families[index % len(families)], seed, index, **asked)
            print(dumps(asdict(problem)))
    except ValueError as error:
        raise UserError(str(error)) from None


def train(
    out: Annotated[Path, typer.Option(help="Folder for weights, log and checkpoint; resumes.")],
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 2200,
    tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 4500,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 4e-3,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train the reference reasoner from a seed; a killed run goes on.

    It takes about 45 minutes on two CPU cores.
    """
    from validate.reasoner.train import train as run

    run(out, steps, tokens, learning_rate, device)


def evaluate(
    model: Annotated[str, typer.Option(help="'reference', or a folder with a saved model.")] = "reference",
    size: Size = "",
    length: Length = "",
    legs: Legs = "",
    count: Annotated[int, typer.Option(help="Problems per family.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the problems; 0 is the training stream.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batch: Annotated[int, typer.Option(help="Problems decoded together.")] = 32,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every problem, token by token.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Measure accuracy on held-out problems with the full cache.

    Greedy decoding writes exactly the reference chain if, with it as input, every word of it is the most
    probable next one. So one forward pass settles most problems; --decode decodes them all.
    """
    from transformers.utils import logging

    from simulator.results.output import require_place
    from validate.models.load import load_model
    from validate.problems.families import FAMILIES
    from validate.reasoner.evaluate import family_accuracy, told
    from validate.reasoner.train import TRAINING_SEED

    if seed == TRAINING_SEED:
        raise UserError(f"--seed is {TRAINING_SEED}, the training stream; allowed: any other")
    require_seed(seed, "--seed")
    shared.require_counts(count=count, batch=batch)
    require_place(json, "--json")
    asked = _ranges(size, length, legs)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_model(model, dtype, "cpu")
    rows = []
    for family in FAMILIES:
        try:
            row = family_accuracy(loaded, family, seed, count, batch, decode_all=decode, **asked)
        except ValueError as error:
            raise UserError(str(error)) from None
        rows.append(row)
        print(told(row), flush=True)
    if json is not None:
        _write_json(json, rows, indent=1)


def profile(
    traces: Annotated[list[str], typer.Option(help="Trace, folder of traces or glob; repeats.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    rho: Annotated[float, typer.Option(help="Attention mass to hold.")] = 0.93,
    steps: Annotated[int, typer.Option(help="Decode steps per trace.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the random halves.")] = 0,
) -> None:
    """Profile recorded traces: what their heads need and attend to.

    Demand of every head, how stable it is between problems, and a name for what it attends to.
    """
    from simulator.results.output import require_place
    from traces.store import find_traces, open_trace
    from validate.reasoner.profile import profile_traces

    require_place(out, "--out")
    require_seed(seed, "--seed")
    opened = [open_trace(path) for path in find_traces(traces)]
    _write_json(out, profile_traces(opened, rho, steps, seed))


def charts(
    profile: Annotated[Path, typer.Option(help="File of sim reasoner profile.")],
    out: Annotated[Path, typer.Option(help="Folder for the SVG files.")],
) -> None:
    """Draw the demand and the attention maps of a profile as SVG."""
    require_extra("a figure", "altair", "vl_convert")
    from simulator.charts.style import styled
    from validate.reasoner.charts import demand_chart, map_chart
    from validate.reasoner.profile import FORMAT

    found = read_json(profile, f"--profile {profile}", dict[str, Any])
    if found.get("format") != FORMAT:
        raise UserError(f"--profile {profile}: format is {shown(found.get('format'))}; allowed: '{FORMAT}'")
    made = {"demand-profile": demand_chart(found), "attention-maps": map_chart(found)}
    out.mkdir(parents=True, exist_ok=True)
    for name, chart in made.items():
        styled(chart).save(out / f"{name}.svg")
        print(f"wrote {out / f'{name}.svg'}")


def trust(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("simulator/results/fidelity.json"),
) -> None:
    """Gather how far each number of a replay can be trusted.

    It reads the stored tables that ship with the package.
    """
    from simulator.results.output import require_place
    from validate.pages.trust import measured_fidelity

    require_place(out, "--out")
    _write_json(out, measured_fidelity(), indent=1)


def pages(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a page would change.")
    ] = False,
) -> None:
    """Write the tables of the pages anew from the stored tables."""
    from validate.pages.write import pages as write_pages

    write_pages(check)


def _ranges(size: str, length: str, legs: str) -> dict[str, tuple[int, int]]:
    """Read ``8`` or ``8-16`` of each that is given."""
    found = {}
    for name, text in (("size", size), ("length", length), ("legs", legs)):
        if not text:
            continue
        ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
        if ends is None:
            raise UserError(f"--{name} is {shown(text)}; allowed: a number, or two such as 8-16")
        found[name] = int(ends[1]), int(ends[2] or ends[1])
    return found


def _write_json(path: Path, content: object, indent: int | None = None) -> None:
    write_text(path, dumps(content, indent=indent) + "\n")
    print(f"wrote {path}")
