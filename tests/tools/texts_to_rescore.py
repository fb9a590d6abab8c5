"""Write what a model wrote as rows to record by ``sim record --rescore``: id, prompt, completion, answer.

    python tests/tools/texts_to_rescore.py --model NAME --prompts SET --from runs/live --out texts.jsonl

``--from`` is a folder of ``sim validate live``, or of traces. Texts that end in a loop are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from traces.store import find_traces, open_trace
from validate.models.load import load_model
from validate.problems.grading import loop_period
from validate.problems.prompts import read_prompts
from validate.problems.sets import prompts_file


def token_ids(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Give the problem and the decoded tokens of every text in a folder, stop tokens included."""
    if (folder / "batches").is_dir():
        rows = pl.concat([pl.read_parquet(path) for path in sorted((folder / "batches").glob("*.parquet"))])
        yield from rows.filter(pl.col("budget_asked").is_null()).select("problem", "token_ids").iter_rows()
        return
    for path in find_traces([str(folder)]):
        trace = open_trace(path)
        yield str(trace.manifest.task["id"]), trace.token_ids[trace.prompt_tokens :].tolist()


def main() -> None:
    """Choose the texts and write them."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", required=True)
    asked.add_argument("--prompts", required=True, nargs="+")
    asked.add_argument("--from", dest="folder", type=Path, required=True)
    asked.add_argument("--least", type=int, default=1)
    asked.add_argument("--most", type=int, default=10**9)
    asked.add_argument("--out", type=Path, required=True)
    given = asked.parse_args()
    tokenizer = load_model(given.model, "bfloat16", "cpu").tokenizer
    known = {own.id: own for name in given.prompts for own in read_prompts(prompts_file(name))}
    rows = []
    for problem, ids in token_ids(given.folder):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        n_tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
        if n_tokens < given.least or loop_period(ids) is not None or len(rows) == given.most:
            continue
        own = known[problem]
        given_too = {name: getattr(own, name) for name in ("system", "family", "answer")}
        row = {"id": problem, "prompt": own.text, "completion": text}
        rows.append(row | {name: value for name, value in given_too.items() if value is not None})
    given.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    print(f"wrote {given.out}: {len(rows)} texts")


if __name__ == "__main__":
    main()
