"""Slow solvers of the problem families: from a prompt alone the bare chain, the answer, possible recaps."""

import re


def read_legs(table):
    """Read the legs of a prompt: what each is about, and its lines."""
    legs = re.findall(r"M(\d+) (\w+) C(\d+) #(\d+) ", table)
    assert re.sub(r"M\d+ \w+ C\d+ #\d+ ", "", table) == f"M{len(legs) + 1} end"
    for number, (mark, _, count, _) in enumerate(legs, 1):
        assert int(mark) == int(count) == number
    return [(topic, int(lines)) for _, topic, _, lines in legs]


class Told:
    """What a solver says: legs, lines, results, and the recap that each line could have."""

    def __init__(self):
        self.words, self.results, self.recaps = [], [], []

    def leg(self, topic):
        number = len(self.results) + 1
        self.words.append(f"leg M{number} {topic} C{number}")

    def line(self, left, text, recap):
        self.words.append(f"#{left} {text} .")
        self.recaps.append((left, " ".join([*self.results, recap])))

    def result(self, value, goal=""):
        number = len(self.results) + 1
        self.words.append(f"#0 {goal}mark T{number} {value} .")
        self.results.append(f"T{number} {value}")

    def all(self):
        answer = " ".join(self.results)
        return (
            " ".join([*self.words, f"leg M{len(self.results) + 1} end answer {answer}"]),
            answer,
            self.recaps,
        )


def solve_walk(prompt):
    table, legs = re.fullmatch(r"walk (.*) legs (.*) care\d think", prompt).groups()
    entries = re.findall(r"(\w+) (\w+) ;", table)
    exits = dict(entries)
    assert 3 * len(entries) == 3 * len(exits) == len(table.split())
    told = Told()
    for place, lines in read_legs(legs):
        told.leg(place)
        for left in range(lines, 0, -1):
            key, seen = place, ""
            if exits[exits[place]] == "dead":
                seen, key = f"{place} {exits[place]} dead ", place.capitalize()
            place = exits[key]
            told.line(left, f"so from {seen}{key} {place}", place)
        told.result(place)
    return told.all()


def solve_program(prompt):
    parts = re.fullmatch(r"program ((?:\w\w \d )+); (.*) L(\d+) loop legs (.*) care\d think", prompt)
    values = {name: int(value) for name, value in re.findall(r"(\w\w) (\d)", parts[1])}
    code = re.findall(r"L(\d+) (\w\w) R(\d+) (\w\w) ;", parts[2])
    assert 5 * len(code) == len(parts[2].split())
    assert [(int(left), int(right)) for left, _, right, _ in code] == [
        (i, i) for i in range(1, int(parts[3]))
    ]
    told, at = Told(), 0
    for leg, (goal, lines) in enumerate(read_legs(parts[4]), 1):
        told.leg(goal)
        for left in range(lines, 0, -1):
            jump = f"L{at + 1} loop " if at == len(code) else ""
            at %= len(code)
            number, x, _, y = code[at]
            total = (values[x] + values[y]) % 10
            used = f"L{number} {x} {values[x]} R{number} {y} {values[y]}"
            values[x] = total
            told.line(left, f"{jump}{used} sum {total} set {x} {total}", f"{goal} {values[goal]}")
            at += 1
        told.result(values[goal], f"goal M{leg} {goal} {values[goal]} ")
    return told.all()


def solve_machine(prompt):
    parts = re.fullmatch(r"machine (.*) legs (.*) queue : (.*) \. care\d think", prompt)
    rules = re.findall(r"([A-Z]\w) (\w\w) ;", parts[1])
    assert 3 * len(rules) == 3 * len(dict(rules)) == len(parts[1].split())
    told, queue = Told(), parts[3].split()
    for topic, lines in read_legs(parts[2]):
        assert topic == "front"
        told.leg(topic)
        for left in range(lines, 0, -1):
            key = queue.pop(0).capitalize()
            queue.append(dict(rules)[key])
            told.line(left, f"{key} {queue[-1]} : {' '.join(queue)}", f": {' '.join(queue)}")
        told.result(queue[0])
    return told.all()


SOLVERS = {"walk": solve_walk, "program": solve_program, "machine": solve_machine}
