"""Where the command ``sim`` begins: Ctrl-C is one line even while its modules are still loading."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run one verb of ``sim`` and exit with its code."""
    try:
        from simulator.workers.interrupts import raise_again

        sys.unraisablehook = raise_again
        from validate.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("sim: interrupted: run the same command again", file=sys.stderr)
        sys.exit(130)
    finally:
        # All is done and said; Python's own end would answer in its own words.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
