"""Problems with a chain of thought and a checkable answer: the training data and the accuracy benchmark.

Two families ask different things of a KV cache:

- *walk*: the prompt is a shuffled table of ``key : next digit ;`` and a list of start/end pairs. The chain
  restates each pair, copies every entry it visits and keeps a running sum modulo 10. The prompt is read
  again and again, at places that cannot be foreseen.
- *program*: the prompt is a list of definitions ``x = y op z ;`` modulo 10. The chain evaluates them in
  order and writes the value next to every name it uses. Values are wanted again at any distance.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass

import numpy as np

NAMES = tuple(consonant + vowel for consonant in "bdfgjklmnprstvwz" for vowel in "aeiu")
DIGITS = tuple("0123456789")
OPERATORS = ("+", "-", "*")
MAX_SIZE = len(NAMES)


@dataclass(frozen=True, slots=True)
class Problem:
    """One question, its full chain of thought, and the answer that is graded.

    Attributes
    ----------
    prompt, completion : str
        Tokens separated by blanks; the completion is the chain of thought and ends in ``answer ...``.
    answer : str
        What has to follow the last ``answer`` of a completion.
    """

    id: str
    family: str
    prompt: str
    completion: str
    answer: str


def make_walk(rng: np.random.Generator, size: int, pairs: int = 4, max_hops: int = 10) -> Problem:
    """Make a walk over one cycle of ``size`` keys; each pair is 2 to ``max_hops`` hops apart."""
    cycle = [NAMES[i] for i in rng.permutation(MAX_SIZE)[:size]]
    digit = {key: int(rng.integers(10)) for key in cycle}
    following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    table = " ".join(f"{cycle[i]} : {following[cycle[i]]} {digit[cycle[i]]} ;" for i in rng.permutation(size))

    questions, chain, sums = [], [], []
    for _ in range(pairs):
        start = int(rng.integers(size))
        hops = int(rng.integers(2, min(max_hops, size - 1) + 1))
        key, end = cycle[start], cycle[(start + hops) % size]
        questions.append(f"{key} to {end}")
        chain.append(f"{key} to {end} ;")
        total = 0
        while key != end:
            total = (total + digit[key]) % 10
            chain.append(f"{key} : {following[key]} {digit[key]} = {total} ;")
            key = following[key]
        chain.append(f"gives {total} .")
        sums.append(str(total))
    answer = " ".join(sums)
    prompt = f"walk {table} ask {' , '.join(questions)} think"
    return Problem("", "walk", prompt, f"{' '.join(chain)} answer {answer}", answer)


def make_program(rng: np.random.Generator, size: int, literal_share: float = 0.25) -> Problem:
    """Make ``size`` definitions whose operands are earlier names or, at ``literal_share``, digits."""
    names = [NAMES[i] for i in rng.permutation(MAX_SIZE)[:size]]
    values: dict[str, int] = {}
    lines, chain = [], []
    for name in names:
        written, traced, numbers = [], [], []
        for _ in range(2):
            if not values or rng.random() < literal_share:
                number = int(rng.integers(10))
                written.append(str(number))
                traced.append(str(number))
            else:
                operand = names[int(rng.integers(len(values)))]
                number = values[operand]
                written.append(operand)
                traced.append(f"{operand} {number}")
            numbers.append(number)
        operator = OPERATORS[int(rng.integers(3))]
        left, right = numbers
        values[name] = {"+": left + right, "-": left - right, "*": left * right}[operator] % 10
        lines.append(f"{name} = {written[0]} {operator} {written[1]} ;")
        chain.append(f"{name} = {traced[0]} {operator} {traced[1]} : {name} {values[name]} ;")
    asked = names[int(rng.integers(size))]
    answer = str(values[asked])
    prompt = f"program {' '.join(lines)} ask {asked} think"
    # Naming what was asked before answering turns the last step into a lookup like all others.
    completion = f"{' '.join(chain)} gives {asked} {answer} . answer {answer}"
    return Problem("", "program", prompt, completion, answer)


FAMILIES = {"walk": make_walk, "program": make_program}


def make_problem(family: str, size: int, seed: int, index: int) -> Problem:
    """Make problem ``index`` of a stream that is fixed by (family, size, seed).

    Raises
    ------
    ValueError
        For an unknown family or a size outside 3 to 64.
    """
    if family not in FAMILIES:
        raise ValueError(f"family '{family}' is unknown; allowed: {', '.join(FAMILIES)}")
    if not 3 <= size <= MAX_SIZE:
        raise ValueError(f"size {size} is out of range; allowed: 3 to {MAX_SIZE}")
    rng = np.random.default_rng([seed, index, size, list(FAMILIES).index(family)])
    problem = FAMILIES[family](rng, size)
    fields = asdict(problem) | {"id": f"{family}-n{size}-s{seed}-{index:04d}"}
    return Problem(**fields)


def answer_of(text: str) -> str | None:
    """Read what follows the last ``answer`` of a completion; None when it never answers."""
    _, found, tail = text.rpartition("answer ")
    return tail.strip() if found else None


def main(arguments: list[str] | None = None) -> None:
    """Write problems as JSONL, one per line, to standard output."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--family", choices=[*FAMILIES, "mixed"], default="mixed")
    parser.add_argument(
        "--size", type=int, default=16, help="entries of the table or definitions (default 16)"
    )
    parser.add_argument("--count", type=int, default=16, help="number of problems (default 16)")
    parser.add_argument(
        "--seed", type=int, default=1, help="training uses seed 0; any other is held out (default 1)"
    )
    options = parser.parse_args(arguments)
    families = list(FAMILIES) if options.family == "mixed" else [options.family]
    try:
        for index in range(options.count):
            problem = make_problem(families[index % len(families)], options.size, options.seed, index)
            sys.stdout.write(json.dumps(asdict(problem)) + "\n")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
