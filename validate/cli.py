"""The command ``sim``: every verb, and one place that turns errors into a line and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from simulator.bench_command import bench
from simulator.blas import use_one_thread
from simulator.commands import calibrate, policies_app, replay
from simulator.results_command import results
from simulator.search_command import search
from simulator.sweep_command import sweep
from traces.commands import trace_app
from traces.errors import Interrupted, UserError
from traces.extras import explained
from validate.bench_command import bench as device_bench
from validate.record_command import record
from validate.report_command import report
from validate.validate_command import validate

app = typer.Typer(
    name="sim",
    help="How to divide a limited KV cache over layers, heads and tokens while a model decodes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(record)
app.add_typer(trace_app, name="trace")
app.command()(calibrate)
app.add_typer(policies_app, name="policies")
app.command()(replay)
app.command()(sweep)
app.command()(search)
app.command()(results)
app.command()(report)
app.command()(bench)
validate_app = typer.Typer(invoke_without_command=True)
validate_app.callback()(validate)
validate_app.command("bench")(device_bench)
app.add_typer(validate_app, name="validate")


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
            print(error.format_message())
            sys.exit(2)
        sys.exit(_say(error.format_message(), getattr(error, "exit_code", 2)))
    if code == Interrupted.exit_code:
        _say("interrupted: run the same command again", code)
    sys.exit(code or 0)


def _say(message: str, code: int) -> int:
    print(f"sim: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
