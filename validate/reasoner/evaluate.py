"""Measure exact-answer accuracy on held-out problems with the full cache.

``python -m validate.reasoner.evaluate`` prints one line per family and, with ``--json``, writes the figures.

Greedy decoding writes exactly the reference chain if and only if, with that chain as input, every word of it
is the most probable next one. So one forward pass settles most problems, and only the others are decoded;
``--decode`` decodes them all.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from validate.models.load import load_model
from validate.problems.families import (
    FAMILIES,
    LEG_COUNTS,
    LENGTHS,
    SIZES,
    Problem,
    answer_of,
    make_problem,
    parse_range,
)
from validate.reasoner.train import TRAINING_SEED


def greedy_completions(
    model: torch.nn.Module, tokenizer: Any, problems: list[Problem], batch: int, max_new_tokens: int
) -> list[str]:
    """Complete prompts greedily with stock ``generate``, in batches with left padding."""
    tokenizer.padding_side = "left"
    generate = cast(Callable[..., torch.Tensor], model.generate)
    completions = []
    for first in range(0, len(problems), batch):
        prompts = [problem.prompt for problem in problems[first : first + batch]]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            ids = generate(**encoded, do_sample=False, max_new_tokens=max_new_tokens)
        new = ids[:, encoded["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new, skip_special_tokens=True)
    return completions


@torch.inference_mode()
def chains_followed(
    model: torch.nn.Module, tokenizer: Any, problems: list[Problem], batch: int
) -> list[bool]:
    """Tell for each problem whether greedy decoding writes its reference chain, word for word."""
    followed = []
    for first in range(0, len(problems), batch):
        prompts, rows = [], []
        for problem in problems[first : first + batch]:
            prompts.append(len(tokenizer(problem.prompt).input_ids))
            rows.append(
                [*tokenizer(f"{problem.prompt} {problem.completion}").input_ids, tokenizer.eos_token_id]
            )
        # Padding stands on the right, where causal attention of the words before it does not look.
        ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        chosen = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            followed.append(torch.equal(chosen[i, prompt - 1 : len(row) - 1], ids[i, prompt : len(row)]))
    return followed


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Give the 95% Wilson score interval of a proportion."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (centre - spread) / scale, (centre + spread) / scale


def main() -> None:
    """Evaluate every family and print its accuracy."""
    parser = argparse.ArgumentParser(description="Exact-answer accuracy of the reasoner, full cache, greedy.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--size", type=parse_range, default=SIZES, metavar="N[-M]", help="default 4-12")
    parser.add_argument(
        "--length", type=parse_range, default=LENGTHS, metavar="N[-M]", help="default 560-900"
    )
    parser.add_argument("--legs", type=parse_range, default=LEG_COUNTS, metavar="N[-M]", help="default 1-3")
    parser.add_argument("--count", type=int, default=512, help="problems per family (default 512)")
    parser.add_argument("--seed", type=int, default=1, help="of the problems; 0 is the training stream")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--decode", action="store_true", help="decode every problem, token by token")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.seed == TRAINING_SEED:
        parser.error(f"--seed is {TRAINING_SEED}, the training stream; allowed: any other")
    model, tokenizer, *_ = load_model(options.model, options.dtype, "cpu")
    rows = []
    for family in FAMILIES:
        problems = [
            make_problem(family, options.seed, i, options.size, options.length, legs=options.legs)
            for i in range(options.count)
        ]
        followed = [False] * len(problems)
        if not options.decode:
            followed = chains_followed(model, tokenizer, problems, options.batch)
        others = [problem for problem, same in zip(problems, followed, strict=True) if not same]
        longest = max((len(problem.completion.split()) for problem in others), default=0)
        completions = greedy_completions(model, tokenizer, others, options.batch, longest + 64)
        found = [answer_of(text) == problem.answer for text, problem in zip(completions, others, strict=True)]
        right = sum(followed) + sum(found)
        low, high = wilson_interval(right, options.count)
        rows.append(
            {
                "family": family,
                "size": options.size,
                "length": options.length,
                "legs": options.legs,
                "dtype": options.dtype,
                "problems": options.count,
                "seed": options.seed,
                "decoded": len(others),
                "right": right,
                "accuracy": right / options.count,
                "low": low,
                "high": high,
            }
        )
        print(
            f"{family:8s} {options.dtype}: {right}/{options.count} exact "
            f"({right / options.count:.1%}, 95% interval {low:.1%} to {high:.1%}; {len(others)} decoded)",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
