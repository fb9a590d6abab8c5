"""Exact-answer accuracy on held-out problems with the full cache.

Greedy decoding writes exactly the reference chain if and only if, with that chain as input, every word of it
is the most probable next one. So one forward pass settles most problems, and only the others are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence

from validate.models.load import LoadedModel
from validate.problems.families import LEG_COUNTS, LENGTHS, SIZES, Problem, answer_of, make_problem


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
        own = problems[first : first + batch]
        texts = tokenizer([f"{problem.prompt} {problem.completion}" for problem in own]).input_ids
        rows = [torch.tensor([*text, tokenizer.eos_token_id]) for text in texts]
        # Padding stands on the right, where causal attention of the words before it does not look.
        ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        chosen = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        for problem, row, words in zip(own, rows, chosen, strict=True):
            prompt = len(tokenizer(problem.prompt).input_ids)
            followed.append(torch.equal(words[prompt - 1 : len(row) - 1], row[prompt:]))
    return followed


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Give the 95% Wilson score interval of a proportion."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (centre - spread) / scale, (centre + spread) / scale


def family_accuracy(
    loaded: LoadedModel,
    family: str,
    seed: int,
    count: int,
    batch: int,
    size: tuple[int, int] = SIZES,
    length: tuple[int, int] = LENGTHS,
    legs: tuple[int, int] = LEG_COUNTS,
    *,
    decode_all: bool = False,
) -> dict[str, Any]:
    """Solve the first ``count`` problems of one family's stream greedily and grade the answers.

    With ``decode_all``, those that one forward pass settles are decoded as well.

    Returns
    -------
    dict
        What was asked; how many were ``decoded`` and ``right``; ``accuracy`` and its 95% interval ``low`` to
        ``high``.

    Raises
    ------
    ValueError
        As `make_problem`.
    """
    model, tokenizer, *_ = loaded
    problems = [make_problem(family, seed, i, size, length, legs=legs) for i in range(count)]
    followed = [False] * count if decode_all else chains_followed(model, tokenizer, problems, batch)
    others = [problem for problem, same in zip(problems, followed, strict=True) if not same]
    longest = max((len(problem.completion.split()) for problem in others), default=0)
    completions = greedy_completions(model, tokenizer, others, batch, longest + 64)
    found = [answer_of(text) == problem.answer for text, problem in zip(completions, others, strict=True)]
    right = sum(followed) + sum(found)
    low, high = wilson_interval(right, count)
    return {
        "family": family,
        "size": size,
        "length": length,
        "legs": legs,
        "dtype": str(model.dtype).removeprefix("torch."),
        "problems": count,
        "seed": seed,
        "decoded": len(others),
        "right": right,
        "accuracy": right / count,
        "low": low,
        "high": high,
    }


def told(row: dict[str, Any]) -> str:
    """Write a row of `family_accuracy` as one line."""
    return (
        f"{row['family']:8s} {row['dtype']}: {row['right']}/{row['problems']} exact ({row['accuracy']:.1%}, "
        f"95% interval {row['low']:.1%} to {row['high']:.1%}; {row['decoded']} decoded)"
    )
