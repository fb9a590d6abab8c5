"""Measure exact-answer accuracy on held-out problems with the full cache.

``python -m validate.reasoner.evaluate`` prints one line per family and, with ``--json``, writes the figures.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from validate.models import load_model
from validate.reasoner.tasks import FAMILIES, Problem, answer_of, make_problem
from validate.reasoner.train import TRAINING_SEED


def greedy_completions(
    model: torch.nn.Module, tokenizer: Any, problems: list[Problem], batch: int, max_new_tokens: int
) -> list[str]:
    """Complete prompts greedily with stock ``generate``, in batches with left padding."""
    tokenizer.padding_side = "left"
    completions = []
    for first in range(0, len(problems), batch):
        prompts = [problem.prompt for problem in problems[first : first + batch]]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            ids = model.generate(**encoded, do_sample=False, max_new_tokens=max_new_tokens)
        new = ids[:, encoded["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new, skip_special_tokens=True)
    return completions


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
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--count", type=int, default=512, help="problems per family (default 512)")
    parser.add_argument("--seed", type=int, default=1, help="of the problems; 0 is the training stream")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.seed == TRAINING_SEED:
        parser.error(f"--seed is {TRAINING_SEED}, the training stream; allowed: any other")
    model, tokenizer, *_ = load_model(options.model, options.dtype, "cpu")
    rows = []
    for family in FAMILIES:
        problems = [make_problem(family, options.size, options.seed, i) for i in range(options.count)]
        longest = max(len(problem.completion.split()) for problem in problems)
        completions = greedy_completions(model, tokenizer, problems, options.batch, longest + 64)
        right = sum(
            answer_of(text) == problem.answer for text, problem in zip(completions, problems, strict=True)
        )
        low, high = wilson_interval(right, options.count)
        rows.append(
            {
                "family": family,
                "size": options.size,
                "dtype": options.dtype,
                "problems": options.count,
                "seed": options.seed,
                "right": right,
                "accuracy": right / options.count,
                "low": low,
                "high": high,
            }
        )
        print(
            f"{family:8s} n={options.size} {options.dtype}: {right}/{options.count} exact "
            f"({right / options.count:.1%}, 95% interval {low:.1%} to {high:.1%})",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
