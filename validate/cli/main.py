"""The command ``sim``: every verb, and one place that turns errors into a line and an exit code."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from simulator.cli.bench import bench
from simulator.cli.calibrate import calibrate
from simulator.cli.chart import chart
from simulator.cli.policies import list_policies, show_policy
from simulator.cli.replay import replay
from simulator.cli.results import results
from simulator.cli.search import search
from simulator.cli.sweep import sweep
from simulator.workers.blas import use_one_thread
from traces import commands as traces
from traces.errors import Interrupted, UserError
from traces.extras import explained
from traces.version import MINOR, VERSION, package_version
from validate.cli import models, reasoner
from validate.cli.bench import bench as device_bench
from validate.cli.calibrate import calibrate as calibrate_divergence
from validate.cli.forced import forced
from validate.cli.live import live
from validate.cli.masked import masked
from validate.cli.protocol import protocol
from validate.cli.record import record
from validate.cli.report import report
from validate.cli.shadow import shadow
from validate.cli.verbs import Verb, Verbs

_LONGEST_LINE = 1200

app = typer.Typer(
    name="sim",
    help="How to divide a limited KV cache over layers, heads and tokens while a model decodes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show versions and exit.", is_eager=True)
    ] = False,
) -> None:
    """How to divide a limited KV cache over layers, heads and tokens while a model decodes."""
    if version:
        print(versions())
        raise typer.Exit


def _add(group: typer.Typer, verb: Callable[..., None], example: str, name: str | None = None) -> None:
    group.command(name, cls=Verb, epilog=f"sim {example}")(verb)


def _group(name: str, help: str, example: str) -> typer.Typer:
    group = typer.Typer(cls=Verbs, no_args_is_help=True, help=help, epilog=f"sim {example}")
    app.add_typer(group, name=name)
    return group


_add(app, record, "record --model reference --prompts problems.jsonl --out runs/mine")
tracing = _group("trace", "Show, check and make traces.", "trace info sample")
_add(tracing, traces.info, "trace info sample --format json")
_add(tracing, traces.validate, "trace validate sample runs/heldout")
_add(tracing, traces.head, "trace head sample -n 60")
_add(tracing, traces.make, "trace make mine.kvtrace --total-tokens 2000")
pretrained = _group("models", "Pretrained language models: bring them once.", "models fetch smollm2-135m")
_add(pretrained, models.list_models, "models list --format json", "list")
_add(pretrained, models.fetch, "models fetch smollm2-135m")
_add(pretrained, models.charts, "models charts --out runs/charts")
_add(app, calibrate, "calibrate --trace runs/calibration --out wave.json")
naming = _group("policies", "Policies by name: what there is, and what each does.", "policies show rkv+wave")
_add(naming, list_policies, "policies list --format json", "list")
_add(naming, show_policy, "policies show reasonalloc", "show")
_add(app, replay, "replay --trace sample --policy rkv,reasonalloc --budget 20%,512KiB! --buffer 32")
_add(app, sweep, "sweep sweep.toml --dry-run")
_add(app, search, "search --trace 'runs/a/*' --held-out 'runs/b/*' --budget 20% --out runs/search")
_add(app, results, "results rows.parquet --metric lost_lookup_peak --budget 20%")
_add(app, report, "report --trace sample --policy rkv,h2o --budget 20% --buffer 32 --out page.html")
_add(app, chart, "chart trajectory.parquet --policy reasonalloc --budget 20% --out budgets.svg")
_add(app, bench, "bench --quick")
validation = _group(
    "validate",
    "Decode with real eviction, alone or beside a replay.",
    "validate shadow --trace sample --policy rkv --budget 20% --buffer 32",
)
_add(validation, shadow, "validate shadow --trace sample --policy rkv --budget 20% --buffer 32")
_add(validation, masked, "validate masked --trace sample --policy rkv,snapkv --budget 20% --buffer 32")
_add(validation, forced, "validate forced --trace sample --policy rkv,snapkv --budget 20% --buffer 32")
_add(validation, live, "validate live --prompts problems.jsonl --policy rkv --budget 20% --out runs/live")
_add(
    validation,
    protocol,
    "validate protocol --config validate/configs/reasonalloc_paper.toml --out runs/paper",
)
_add(
    validation,
    calibrate_divergence,
    "validate calibrate --trace runs/a --shifts shifts.parquet --measured masked.parquet --out mine.json",
    "calibrate",
)
_add(validation, device_bench, "validate bench --out runs/bench")
reasoning = _group(
    "reasoner",
    "The reference reasoner: problems, training, measurements.",
    "reasoner problems --family walk --count 8",
)
_add(reasoning, reasoner.problems, "reasoner problems --family walk --count 8 --seed 1")
_add(reasoning, reasoner.train, "reasoner train --out runs/reasoner")
_add(reasoning, reasoner.evaluate, "reasoner evaluate --json accuracy.json")
_add(reasoning, reasoner.profile, "reasoner profile --traces runs/heldout --out profile.json")
_add(reasoning, reasoner.charts, "reasoner charts --profile profile.json --out runs/charts")
_add(reasoning, reasoner.trust, "reasoner trust --out simulator/results/fidelity.json")
_add(reasoning, reasoner.pages, "reasoner pages --check")


def versions() -> str:
    """Tell the versions of the package, of Python, of the trace format and of the libraries that are here."""
    lines = [
        f"kvbudget {package_version()}",
        f"trace format {VERSION}.{MINOR}",
        f"python {platform.python_version()}",
    ]
    for name in ("numpy", "numba", "polars", "torch", "transformers", "triton", "altair"):
        with suppress(PackageNotFoundError):
            lines.append(f"{name} {installed_version(name)}")
    return "\n".join(lines)


def main() -> None:
    """Run one verb; every error is one line on standard error."""
    # NumPy's usual library only: torch, which some verbs load, has others and threads of its own.
    use_one_thread("openblas")
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        sys.exit(_say(str(error), error.exit_code))
    except (KeyboardInterrupt, typer.Abort):
        code = Interrupted.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError as error:
        sys.exit(_say(f"there is not enough memory: {str(error) or 'none is left'}", 1))
    except OSError as error:
        sys.exit(_say(f"{error.filename or 'file'}: {error.strerror}", 2))
    except ImportError as error:
        told = explained(error)
        if told is None:
            raise
        sys.exit(_say(str(told), told.exit_code))
    except Exception as error:
        # Usage errors come from whichever click typer was built with; they all know their message.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            with suppress(BrokenPipeError):
                print(error.format_message(), flush=True)
            sys.exit(2)
        message = error.format_message()
        if message.startswith("Got unexpected extra argument"):
            # As many as a glob matched, where it was not quoted.
            message = (
                f"{message[:120]}; an option takes one value each time: repeat it, or put a glob in quotes"
            )
        sys.exit(_say(message, getattr(error, "exit_code", 2)))
    if code == Interrupted.exit_code:
        _say("interrupted: run the same command again", code)
    sys.exit(code or 0)


def _say(message: str, code: int) -> int:
    line = " ".join(message.split())
    if len(line) > _LONGEST_LINE:
        # What is wrong stands in front and what is allowed behind; between may be all that a user gave.
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    print(f"sim: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
