"""Kill a sweep at random, again and again, and compare: ``python tests/tools/kill_sweep.py SPEC.toml``.

The sweep runs undisturbed once, then in another folder with SIGKILL after random times until it was killed as
often as asked, then to its end. Both tables must be equal but for the seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from sweeps import kill, parts_of, start_sweep, table_of


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.3, help="seconds before a kill")
    parser.add_argument("--most", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm, disturbed = Path(folder) / "calm", Path(folder) / "disturbed"
        started = time.perf_counter()
        print(start_sweep(asked.spec, "--out", calm, "--jobs", asked.jobs).communicate()[1].splitlines()[0])
        print(f"undisturbed: {time.perf_counter() - started:.1f} s")
        n_kills = n_parts = n_at_work = 0
        while n_kills < asked.kills:
            sweep = start_sweep(asked.spec, "--out", disturbed, "--jobs", asked.jobs)
            time.sleep(rng.uniform(asked.least, asked.most))
            if not kill(sweep):
                print(f"done after {n_kills} kills; give it more to do, or less time")
                break
            n_kills += 1
            n_at_work += len(parts_of(disturbed)) > n_parts
            n_parts = len(parts_of(disturbed))
        print(f"{n_kills} kills, {n_at_work} of them after a part was written")
        print(
            start_sweep(asked.spec, "--out", disturbed, "--jobs", asked.jobs).communicate()[1].splitlines()[0]
        )
        found, expected = table_of(disturbed), table_of(calm)
        is_equal = found.equals(expected)
        statuses = found["status"].value_counts().rows()
        print(f"{len(found)} rows, {found['cell'].n_unique()} cells, {statuses}; equal: {is_equal}")
        sys.exit(not is_equal)


if __name__ == "__main__":
    main()
