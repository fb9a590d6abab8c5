"""Times a pretrained model: recording and live decoding alone and together, levels by token and by span.

Not a test: it takes minutes and needs a quiet machine. All figures come from one run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import validate.levels.runs
from simulator.policies.language import parse_policy
from traces.store import open_trace
from validate.eviction.decode import decode
from validate.levels.runs import baseline_of, run_forced, run_masked
from validate.models.load import LoadedModel, load_model
from validate.models.next_token import Sampling
from validate.problems.prompts import Prompt, encode_prompt, read_prompts
from validate.record.rows import RowSettings, complete_rows, record_row


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tell(what: str, n_tokens: int, took: float, first: float | None = None) -> float:
    rate = n_tokens / took
    times = "" if first is None else f"  {rate / first:5.1f} x"
    print(f"{what:<58}{n_tokens:>7} tokens {took:>7.1f} s {rate:>7.1f} tokens/s{times}", flush=True)
    return rate


def record(loaded: LoadedModel, rows: list[Prompt], n_new: int, together: bool) -> tuple[int, float]:
    with tempfile.TemporaryDirectory() as folder:
        out, settings = Path(folder), RowSettings(max_new_tokens=n_new)

        def work() -> None:
            texts = complete_rows(loaded, rows, out, settings) if together else {}
            for row in rows:
                record_row(loaded, row, out, settings, completion_ids=texts.get(row.id))

        took = seconds(work)
        traces = [open_trace(path) for path in out.glob("*.kvtrace")]
        return sum(trace.total_tokens - trace.prompt_tokens for trace in traces), took


def live(loaded: LoadedModel, rows: list[Prompt], n_new: int, policy: str, entries: int) -> tuple[int, float]:
    ids = [encode_prompt(loaded.tokenizer, row.text) for row in rows]
    found = []

    def work() -> None:
        settings = {"stop_ids": (), "sampling": Sampling()}
        found.extend(decode(loaded.model, ids, parse_policy(policy, buffer=32), entries, n_new, **settings))

    took = seconds(work)
    return sum(len(own.token_ids) for own in found), took


def levels(loaded: LoadedModel, row: Prompt, n_new: int, entries: int, buffer: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        record_row(loaded, row, Path(folder), RowSettings(max_new_tokens=n_new))
        trace = open_trace(next(Path(folder).glob("*.kvtrace")))
        baseline = baseline_of(loaded.model, trace)
        n_tokens = trace.total_tokens - trace.prompt_tokens
        for name in ("rkv", "snapkv"):
            policy, first = parse_policy(name, buffer=buffer), None
            # What is compiled at a first call is not to be timed.
            validate.levels.runs._FORCED_TOKENS = 512
            for run in (run_masked, run_forced):
                run(loaded.model, trace, policy, entries, baseline=lambda: baseline)
            for what, run, most in (
                ("forced, token by token", run_forced, 1),
                ("forced, by spans", run_forced, 512),
                ("masked", run_masked, 512),
            ):
                validate.levels.runs._FORCED_TOKENS = most
                took = seconds(lambda: run(loaded.model, trace, policy, entries, baseline=lambda: baseline))  # noqa: B023
                rate = tell(f"{what}, {name} at {entries}, buffer {buffer}", n_tokens, took, first)
                first = first or rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--prompts", required=True, help="JSONL of at least 16 problems")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--entries", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--levels-only", action="store_true", help="neither record nor decode live")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = read_prompts(asked.prompts, 16)
    firsts: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(asked.model, dtype, "cpu")
        for n_rows in () if asked.levels_only else (1, len(rows)):
            what = f"{dtype}, {n_rows} {'text' if n_rows == 1 else 'texts'}"
            took = record(loaded, rows[:n_rows], asked.tokens, n_rows > 1)
            rate = tell(f"record, {what}", *took, firsts.get("record"))
            firsts.setdefault("record", rate)
            took = live(loaded, rows[:n_rows], asked.tokens, "rkv", asked.entries)
            rate = tell(f"live, rkv at {asked.entries}, {what}", *took, firsts.get("live"))
            firsts.setdefault("live", rate)
        for buffer in (32, 128):  # as in the other measurements, and as R-KV publishes it
            levels(loaded, rows[0], 2 * asked.tokens, asked.entries, buffer)


if __name__ == "__main__":
    main()
