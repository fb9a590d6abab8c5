"""Measure accuracy against budget: policies x budgets on held-out problems, with an evicting decode.

``python -m validate.reasoner.budgets --out budgets.jsonl``; rows already in the file are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from simulator.policy import Policy, parse_policy, split_list
from traces.errors import UserError
from validate.eviction.decode import decode
from validate.models import LoadedModel, load_model
from validate.reasoner.evaluate import wilson_interval
from validate.reasoner.tasks import (
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

POLICIES = "fullkv,streamingllm,snapkv,rkv,pyramid-rkv,rkv+utility,reasonalloc,random,random-prompt"
BUDGETS = "10,15,20,30,40,50"
BUFFER = 32
# A derailed chain may go on for ever: it may be this much longer than the full-cache chain.
LONGEST = 1.1


def measure(loaded: LoadedModel, policy: Policy, percent: float, problems: list[Problem]) -> dict[str, Any]:
    """Decode all problems under one policy and budget and grade them.

    Parameters
    ----------
    percent : float
        Budget per KV head, in percent of the tokens of the problem's full-cache run.
    """
    started = time.perf_counter()
    prompts = [loaded.tokenizer(problem.prompt).input_ids for problem in problems]
    chains = [len(problem.completion.split()) + 1 for problem in problems]
    totals = [len(prompt) + chain for prompt, chain in zip(prompts, chains, strict=True)]
    completions = decode(
        loaded.model,
        prompts,
        policy,
        [max(1, int(total * percent / 100)) for total in totals],
        [int(chain * LONGEST) for chain in chains],
        stop_ids=[loaded.tokenizer.eos_token_id],
        name=loaded.name,
        revision=loaded.revision,
    )
    answers = [answer_of(loaded.tokenizer.decode(completion.token_ids)) for completion in completions]
    right = sum(found == problem.answer for found, problem in zip(answers, problems, strict=True))
    low, high = wilson_interval(right, len(problems))
    return {
        "problems": len(problems),
        "right": right,
        "accuracy": right / len(problems),
        "low": low,
        "high": high,
        "never_answered": sum(answer is None for answer in answers),
        "mean_tokens": sum(len(completion.token_ids) for completion in completions) / len(problems),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _measured(out: Path) -> set[tuple[str, str, float]]:
    if not out.exists():
        return set()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {(row["family"], row["policy"], row["budget_percent"]) for row in rows}


def run(options: argparse.Namespace) -> None:
    """Measure every point that is not in the file yet and append it."""
    families = options.families.split(",")
    policies = [parse_policy(text, buffer=options.buffer) for text in split_list(options.policies)]
    texts = split_list(options.policies)
    settings = {"size": options.size, "length": options.length, "legs": options.legs}
    problems = {
        family: [make_problem(family, options.seed, i, **settings) for i in range(options.count)]
        for family in families
    }
    loaded = load_model(options.model, "float32", "cpu")
    done = _measured(options.out)
    for family in families:
        for percent in map(float, options.budgets.split(",")):
            for text, policy in zip(texts, policies, strict=True):
                # What never evicts has one point, whatever the budget.
                percent_held = percent if policy.evicts else 100.0
                if (family, text, percent_held) in done:
                    continue
                done.add((family, text, percent_held))
                place = {"family": family, "policy": text, "budget_percent": percent_held}
                row = place | {"seed": options.seed, "buffer": options.buffer} | settings
                row |= measure(loaded, policy, percent_held, problems[family])
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                right = f"{row['right']:3d}/{row['problems']}"
                print(f"{family:8s} {text:16s} {percent_held:5g}%  {right} ({row['seconds']} s)", flush=True)


def main() -> None:
    """Measure exact answers under eviction; append one JSON row per point."""
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
    try:
        run(options)
    except ValueError as error:
        parser.error(str(error))
    except UserError as error:
        print(f"budgets: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
