"""Measure accuracy against budget: policies x budgets on held-out problems, with an evicting decode.

``python -m validate.reasoner.budgets --out budgets.jsonl``; rows already in the file are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from simulator.policy import parse_policy, split_list
from simulator.wave import known_waves
from validate.models import load_model
from validate.reasoner.evaluate import wilson_interval
from validate.reasoner.evicting import decode_evicting
from validate.reasoner.tasks import FAMILIES, LEG_COUNTS, LENGTHS, SIZES, answer_of, make_problem, parse_range
from validate.reasoner.train import TRAINING_SEED

POLICIES = "fullkv,streamingllm,snapkv,rkv,pyramid-rkv,rkv+utility,reasonalloc,random,random-prompt"
BUDGETS = "10,15,20,30,50"
BUFFER = 32
# A derailed chain may go on for ever: it may be this much longer than the full-cache chain.
LONGEST = 1.1


def main() -> None:
    """Measure what is asked for and append one JSON row per point."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--budgets", default=BUDGETS, help="percent of the full-cache run's tokens")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--count", type=int, default=128, help="problems per point (default 128)")
    parser.add_argument("--size", type=parse_range, default=SIZES, metavar="N[-M]")
    parser.add_argument("--length", type=parse_range, default=LENGTHS, metavar="N[-M]")
    parser.add_argument("--legs", type=parse_range, default=LEG_COUNTS, metavar="N[-M]")
    parser.add_argument("--seed", type=int, default=1, help="of the problems; 0 is the training stream")
    parser.add_argument("--buffer", type=int, default=BUFFER)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, appended to")
    options = parser.parse_args()
    if options.seed == TRAINING_SEED:
        parser.error(f"--seed is {TRAINING_SEED}, the training stream; allowed: any other")
    model, tokenizer, name, _ = load_model(options.model, "float32", "cpu")
    done = set()
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
        done = {(row["family"], row["policy"], row["budget_percent"]) for row in rows}
    waves = known_waves()
    for family in options.families.split(","):
        problems = [
            make_problem(family, options.seed, i, options.size, options.length, legs=options.legs)
            for i in range(options.count)
        ]
        prompts = [tokenizer(problem.prompt).input_ids for problem in problems]
        chains = [len(problem.completion.split()) + 1 for problem in problems]
        totals = [len(prompt) + chain for prompt, chain in zip(prompts, chains, strict=True)]
        for percent in map(float, options.budgets.split(",")):
            for text in split_list(options.policies):
                policy = parse_policy(text, buffer=options.buffer)
                percent_of = percent if policy.evicts else 100.0
                if (family, text, percent_of) in done:
                    continue
                done.add((family, text, percent_of))
                started = time.perf_counter()
                completions = decode_evicting(
                    model,
                    prompts,
                    policy,
                    [max(1, int(total * percent_of / 100)) for total in totals],
                    [int(chain * LONGEST) for chain in chains],
                    eos=tokenizer.eos_token_id,
                    name=name,
                    waves=waves,
                )
                answers = [answer_of(tokenizer.decode(tokens)) for tokens in completions]
                right = sum(a == p.answer for a, p in zip(answers, problems, strict=True))
                low, high = wilson_interval(right, len(problems))
                row = {
                    "family": family,
                    "policy": text,
                    "budget_percent": percent_of,
                    "problems": len(problems),
                    "seed": options.seed,
                    "buffer": options.buffer,
                    "right": right,
                    "accuracy": right / len(problems),
                    "low": low,
                    "high": high,
                    "never_answered": sum(answer is None for answer in answers),
                    "mean_tokens": sum(map(len, completions)) / len(problems),
                    "seconds": round(time.perf_counter() - started, 1),
                }
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{family:8s} {text:16s} {percent_of:5g}%  {right:3d}/{len(problems)} "
                    f"({row['seconds']} s, {torch.get_num_threads()} threads)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
