"""Problems with a chain of thought and a checkable answer: the training data and the accuracy benchmark.

Three families ask different things of a KV cache:

- *walk*: the prompt is a shuffled map of two rings with dead ends. The chain walks in legs and abandons dead
  ends. The map is read again throughout, in parts that cannot be foreseen.
- *program*: the prompt is a loop of instructions ``x := x + y`` modulo 10. The chain runs it, writing the
  value next to every name it uses. Values are wanted again at any distance, and only the newest counts.
- *machine*: a queue machine. Each step pops a name, looks up its rule, appends the result and writes the
  whole queue again: the working set moves with the chain and everything older is litter.

Every chain is cut into legs, whose goals the prompt lists; each leg ends in a result, and the answer is all
results. Like real chains of thought these are redundant: goals are restated, and at a level of ``care`` above
0 lines are derived a second time (``check``) and confirmed (``ok``) or corrected (``fix``), and results are
repeated (``recap``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NAMES = tuple(consonant + vowel for consonant in "bdfgklmn" for vowel in "aeiu")
# What a name with a capital leads to is another entry than what the name itself leads to.
CAPITALS = tuple(name.capitalize() for name in NAMES)
DIGITS = tuple("0123456789")
# Lines left in a leg: a chain counts down.
LINES = tuple(f"#{i}" for i in range(64))
LEFT = tuple(f"L{i}" for i in range(1, 22))
RIGHT = tuple(f"R{i}" for i in range(1, 22))
# A leg: what it is about, how many lines it has, and what came of it.
LEGS = tuple(f"M{i}" for i in range(1, 10))
COUNTS = tuple(f"C{i}" for i in range(1, 10))
RESULTS = tuple(f"T{i}" for i in range(1, 10))
CARE = ("care0", "care1", "care2")

MIN_SIZE, MAX_SIZE = 4, 20
MIN_LENGTH, MAX_LENGTH = 40, 1500
# What a problem is drawn from when nothing else is asked for.
SIZES, LENGTHS, LEG_COUNTS = (4, 12), (560, 900), (1, 3)


@dataclass(frozen=True, slots=True)
class Problem:
    """One question, its full chain of thought, and the answer that is graded.

    Attributes
    ----------
    id, family : str
    prompt, completion : str
        Tokens separated by blanks; the completion is the chain of thought and ends in ``answer ...``.
    answer : str
        What has to follow the last ``answer`` of a completion.
    slips : tuple of int
        Which words of the completion are wrong on purpose, to be put right by the check that follows.
    """

    id: str
    family: str
    prompt: str
    completion: str
    answer: str
    slips: tuple[int, ...] = ()


class Chain:
    """The words of a chain of thought, with the habits that all families share.

    Parameters
    ----------
    rng : numpy.random.Generator
    care : int
        0: never look back. 1: check every fifth line, recap every tenth. 2: check every second line, recap
        every tenth.
    slip_rate : float
        Share of the checked lines that are wrong at first.
    """

    def __init__(self, rng: np.random.Generator, care: int, slip_rate: float) -> None:
        self.rng, self.care, self.slip_rate = rng, care, slip_rate
        self.words: list[str] = []
        self.slips: list[int] = []
        self.results: list[str] = []

    def write(self, *words: str) -> None:
        """Append words."""
        self.words += words

    def recap(self, line: int, *state: str) -> None:
        """After every tenth line, repeat the results so far and where the leg stands."""
        if self.care > 0 and line % 10 == 0:
            self.write("recap", *self.results, *state, ".")

    def derive(self, line: int, key: str, value: str, wrong: tuple[str, ...]) -> None:
        """Write key and value; on lines that are checked, write them twice, the first time maybe wrong."""
        if self.care == 0 or line % (5, 2)[self.care - 1]:
            self.write(key, value)
            return
        slipped = bool(self.rng.random() < self.slip_rate)
        if slipped:
            self.slips.append(len(self.words) + 1)
        first = value
        while slipped and first == value:
            first = wrong[int(self.rng.integers(len(wrong)))]
        self.write(key, first, "check", key, value, "fix" if slipped else "ok")

    def lines(self, topic: str, count: int) -> Iterator[int]:
        """Copy a leg's entry from the prompt, up to its count, and open one line after another.

        Yields
        ------
        int
            How many lines of the leg are left, this one included.
        """
        leg = len(self.results) // 2
        self.write("leg", LEGS[leg], topic, COUNTS[leg])
        for left in range(count, 0, -1):
            self.write(LINES[left])
            yield left

    def close_leg(self, result: str, goal: str | None = None) -> None:
        """Restate the goal, if it is not at hand, and mark the result."""
        leg = len(self.results) // 2
        restated = () if goal is None else ("goal", LEGS[leg], goal, result)
        self.write(LINES[0], *restated, "mark", RESULTS[leg], result, ".")
        self.results += [RESULTS[leg], result]

    def finish(self) -> str:
        """Find no further leg, recall all results, and give them as the answer."""
        self.write("leg", LEGS[len(self.results) // 2], "end", "answer", *self.results)
        return " ".join(self.results)


def split_into_legs(rng: np.random.Generator, lines: int, legs: int | None = None) -> list[int]:
    """Split a chain into 1 to 8 legs of 2 to 60 lines; into ``legs`` as far as that allows."""
    longest, most = 60, len(RESULTS) - 1
    wanted = round(lines / rng.uniform(8, 40)) if legs is None else legs
    count = int(np.clip(wanted, -(-lines // 45), max(1, min(most, lines // 4))))
    while True:
        cuts = np.sort(rng.permutation(np.arange(1, lines))[: count - 1])
        sizes = np.diff([0, *cuts, lines]).tolist()
        if min(sizes) >= min(2, lines) and max(sizes) <= longest:
            return sizes


def _pick(rng: np.random.Generator, pool: tuple[str, ...], count: int) -> list[str]:
    return [pool[i] for i in rng.permutation(len(pool))[:count]]


def _leg_table(topics: list[str], sizes: list[int]) -> list[str]:
    """Write what the prompt says of the legs."""
    words = ["legs"]
    for leg, (topic, size) in enumerate(zip(topics, sizes, strict=True)):
        words += [LEGS[leg], topic, COUNTS[leg], LINES[size]]
    return [*words, LEGS[len(sizes)], "end"]


def make_walk(
    rng: np.random.Generator, size: int, length: int, care: int, legs: int | None, slip_rate: float
) -> tuple[list[str], Chain]:
    """Make a tour over two rings of ``size`` places together; every fourth place has a dead end first."""
    sizes = split_into_legs(rng, max(6, round(length / (7.2, 8.4, 10.0)[care])), legs)
    dead_ends = size // 4
    names = _pick(rng, NAMES, size + dead_ends)
    split = int(rng.integers(max(2, size // 3), size // 2 + 1))
    onward: dict[str, str] = {}
    for ring in (names[:split], names[split:size]):
        onward |= dict(zip(ring, ring[1:] + ring[:1], strict=True))
    exits = dict(onward)
    dead = names[size:]
    entries = [f"{name} dead ;" for name in dead]
    for place, end in zip(_pick(rng, tuple(onward), dead_ends), dead, strict=True):
        exits[place] = end
        entries.append(f"{place.capitalize()} {onward[place]} ;")
    entries += [f"{place} {exits[place]} ;" for place in onward]
    starts = [names[int(rng.integers(size))] for _ in sizes]
    prompt = ["walk", *(entries[i] for i in rng.permutation(len(entries))), *_leg_table(starts, sizes)]

    chain, places = Chain(rng, care, slip_rate), tuple(names[:size])
    for place, lines in zip(starts, sizes, strict=True):
        for left in chain.lines(place, lines):
            chain.write("so", "from")
            key = place
            if exits[place] in dead:
                chain.write(place, exits[place], "dead")
                key = place.capitalize()
            chain.derive(left, key, onward[place], places)
            place = onward[place]
            chain.write(".")
            chain.recap(left, place)
        chain.close_leg(place)
    return prompt, chain


def make_program(
    rng: np.random.Generator, size: int, length: int, care: int, legs: int | None, slip_rate: float
) -> tuple[list[str], Chain]:
    """Make a loop of ``size`` instructions over about ``size / 2`` variables."""
    sizes = split_into_legs(rng, max(4, round(length / (13.0, 14.6, 16.2)[care])), legs)
    variables = _pick(rng, NAMES, max(3, size // 2 + 1))
    value = {name: int(rng.integers(10)) for name in variables}
    code = [tuple(_pick(rng, tuple(variables), 2)) for _ in range(size)]
    asked = [code[int(rng.integers(size))][0] for _ in sizes]
    prompt = ["program", *(f"{name} {value[name]}" for name in variables), ";"]
    prompt += [f"{LEFT[i]} {left} {RIGHT[i]} {right} ;" for i, (left, right) in enumerate(code)]
    prompt += [LEFT[size], "loop", *_leg_table(asked, sizes)]

    chain, at = Chain(rng, care, slip_rate), 0
    for goal, lines in zip(asked, sizes, strict=True):
        for left in chain.lines(goal, lines):
            if at == size:
                chain.write(LEFT[size], "loop")
                at = 0
            first, second = code[at]
            total = (value[first] + value[second]) % 10
            chain.write(LEFT[at], first, str(value[first]), RIGHT[at], second, str(value[second]))
            chain.derive(left, "sum", str(total), DIGITS)
            value[first] = total
            chain.write("set", first, str(total), ".")
            chain.recap(left, goal, str(value[goal]))
            at += 1
        chain.close_leg(str(value[goal]), goal)
    return prompt, chain


def make_machine(
    rng: np.random.Generator, size: int, length: int, care: int, legs: int | None, slip_rate: float
) -> tuple[list[str], Chain]:
    """Make a queue machine of ``size`` rules (one cycle through all names) and a queue of 3 to 6 names."""
    width = int(rng.integers(3, min(6, size - 1) + 1))
    sizes = split_into_legs(rng, max(4, round(length / (width + (5.4, 7.0, 8.2)[care]))), legs)
    names = _pick(rng, NAMES, size)
    rule = dict(zip(names, names[1:] + names[:1], strict=True))
    queue = _pick(rng, tuple(names), width)
    rules = [f"{names[i].capitalize()} {rule[names[i]]} ;" for i in rng.permutation(size)]
    prompt = ["machine", *rules, *_leg_table(["front"] * len(sizes), sizes), "queue", ":", *queue, "."]

    chain = Chain(rng, care, slip_rate)
    for lines in sizes:
        for left in chain.lines("front", lines):
            front, queue = queue[0], [*queue[1:], rule[queue[0]]]
            chain.derive(left, front.capitalize(), rule[front], tuple(names))
            chain.write(":", *queue, ".")
            chain.recap(left, ":", *queue)
        chain.close_leg(queue[0])
    return prompt, chain


FAMILIES = {"walk": make_walk, "program": make_program, "machine": make_machine}


def make_problem(
    family: str,
    seed: int,
    index: int,
    size: int | tuple[int, int] = SIZES,
    length: int | tuple[int, int] = LENGTHS,
    care: int | None = None,
    legs: int | tuple[int, int] | None = LEG_COUNTS,
    slip_rate: float = 0.0,
) -> Problem:
    """Make problem ``index`` of a stream that is fixed by all arguments.

    Parameters
    ----------
    family : str
    seed, index : int
    size : int or (int, int)
        Difficulty: places, instructions or rules; a pair is a range to draw from, ends included.
    length : int or (int, int)
        Tokens that the chain of thought has, about.
    care : int, optional
        Redundancy, 0 to 2 (see `Chain`); drawn when None.
    legs : int or (int, int), optional
        Goals, as far as the length allows (2 to 60 lines each); one for every 8 to 40 lines when None.
    slip_rate : float
        Share of the checked lines that are wrong at first; the prompt does not depend on it.

    Raises
    ------
    ValueError
        For an unknown family or a parameter out of range.
    """
    if family not in FAMILIES:
        raise ValueError(f"family '{family}' is unknown; allowed: {', '.join(FAMILIES)}")
    if not 0 <= slip_rate <= 1:
        raise ValueError(f"slip_rate {slip_rate} is out of range; allowed: 0 to 1")
    rng = np.random.default_rng([seed, index, list(FAMILIES).index(family)])
    size = _drawn(rng, "size", size, MIN_SIZE, MAX_SIZE)
    length = _drawn(rng, "length", length, MIN_LENGTH, MAX_LENGTH)
    care = _drawn(rng, "care", (0, len(CARE) - 1) if care is None else care, 0, len(CARE) - 1)
    if legs is not None:
        legs = _drawn(rng, "legs", legs, 1, len(RESULTS) - 1)
    prompt, chain = FAMILIES[family](rng, size, length, care, legs, slip_rate)
    answer = chain.finish()
    identity = f"{family}-n{size}-c{care}-s{seed}-{index:04d}"
    text = " ".join([*prompt, CARE[care], "think"])
    return Problem(identity, family, text, " ".join(chain.words), answer, tuple(chain.slips))


def _drawn(rng: np.random.Generator, name: str, wanted: int | tuple[int, int], low: int, high: int) -> int:
    first, last = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    if not low <= first <= last <= high:
        found = first if first == last else f"{first}-{last}"
        raise ValueError(f"{name} {found} is out of range; allowed: {low} to {high}")
    return int(rng.integers(first, last + 1))


def answer_of(text: str) -> str | None:
    """Read what follows the last ``answer`` of a completion; None when it never answers."""
    _, found, tail = text.rpartition("answer ")
    return tail.strip() if found else None
