"""The problem families against slow solvers, their tokenizer, and a training that resumes where it died."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from validate.problems.families import (
    CARE,
    FAMILIES,
    LENGTHS,
    MAX_LENGTH,
    MAX_SIZE,
    MIN_LENGTH,
    MIN_SIZE,
    answer_of,
    make_problem,
    split_into_legs,
)
from validate.reasoner import train as training
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer

# Each solver reads the prompt alone. It gives the bare chain, the answer, and what recaps could say.


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
CHECKED_EVERY = {"care0": 0, "care1": 5, "care2": 2}
RECAPPED_EVERY = {"care0": 0, "care1": 10, "care2": 10}
CHECK = re.compile(r"(\S+) (\S+) check \1 (\S+) (ok|fix)")
RECAP = re.compile(r"recap ([^.]*) \. ")

sizes, lengths = st.integers(MIN_SIZE, MAX_SIZE), st.integers(MIN_LENGTH, MAX_LENGTH)
families, cares = st.sampled_from(list(FAMILIES)), st.none() | st.integers(0, 2)
legs = st.none() | st.integers(1, 8)
MANY = settings(deadline=None, max_examples=150, derandomize=True, database=None)


def lines_of(text, found):
    """Give the number of the line that each match in a chain belongs to."""
    return [int(re.findall(r"#(\d+) ", text[: each.start()])[-1]) for each in found]


def without_care(problem):
    """Take checks and recaps out of a chain, having proved each of them."""
    text, care = problem.completion, problem.prompt.split()[-2]
    _, _, recaps = SOLVERS[problem.family](problem.prompt)

    found, every = list(RECAP.finditer(text)), RECAPPED_EVERY[care]
    assert len(found) == text.split().count("recap")
    said = list(zip(lines_of(text, found), [each[1] for each in found], strict=True))
    assert said == [(line, recap) for line, recap in recaps if every and line % every == 0]

    checks, every = list(CHECK.finditer(text)), CHECKED_EVERY[care]
    assert len(checks) == text.split().count("check")
    assert lines_of(text, checks) == [line for line, _ in recaps if every and line % every == 0]
    for each in checks:
        assert (each[2] == each[3]) == (each[4] == "ok")
    slips = [text[: each.start(2)].count(" ") for each in checks if each[4] == "fix"]
    assert tuple(slips) == problem.slips
    return RECAP.sub("", CHECK.sub(r"\1 \3", text))


@MANY
@given(families, sizes, lengths, cares, legs, st.integers(0, 2**62), st.sampled_from([0.0, 0.12, 1.0]))
def test_chains_and_answers_agree_with_an_independent_solver(
    family, size, length, care, legs, index, slip_rate
):
    problem = make_problem(family, 1, index, size, length, care, legs, slip_rate)
    chain, answer, _ = SOLVERS[family](problem.prompt)
    assert without_care(problem) == chain
    assert problem.answer == answer_of(problem.completion) == answer
    if care is not None:
        assert problem.prompt.split()[-2] == CARE[care]


@MANY
@given(families, sizes, lengths, cares, legs, st.integers(0, 2**62))
def test_slips_change_neither_the_prompt_nor_what_is_true(family, size, length, care, legs, index):
    asked = (family, 1, index, size, length, care, legs)
    right, wrong = make_problem(*asked), make_problem(*asked, slip_rate=1.0)
    assert (right.id, right.prompt, right.answer) == (wrong.id, wrong.prompt, wrong.answer)
    assert right.slips == ()
    words, slipped = right.completion.split(), wrong.completion.split()
    assert len(wrong.slips) == words.count("check") == slipped.count("fix")
    differ = {i for i, (a, b) in enumerate(zip(words, slipped, strict=True)) if a != b}
    corrections = {i for i, word in enumerate(slipped) if word == "fix"}
    assert differ == corrections | set(wrong.slips)


def test_the_slip_rate_is_the_share_of_checked_lines():
    problems = [make_problem("program", 1, index, care=2, slip_rate=0.12) for index in range(60)]
    n_checks = sum(problem.completion.split().count("check") for problem in problems)
    assert 0.08 < sum(len(problem.slips) for problem in problems) / n_checks < 0.16


@given(st.integers(4, 220), legs, st.integers(0, 2**32))
@MANY
def test_legs_have_2_to_60_lines(lines, wanted, seed):
    found = split_into_legs(np.random.default_rng(seed), lines, wanted)
    assert sum(found) == lines
    assert all(2 <= each <= 60 for each in found)
    assert 1 <= len(found) <= 8
    if wanted is not None and 4 * wanted <= lines <= 45 * wanted:
        assert len(found) == wanted


@pytest.mark.parametrize("size", [MIN_SIZE, 11, MAX_SIZE])
@pytest.mark.parametrize("family", FAMILIES)
def test_size_counts_places_instructions_or_rules(family, size):
    words = make_problem(family, 1, 0, size).prompt.split()
    found = {
        "walk": words.count(";")
        - words.count("dead")
        - sum(word.istitle() for word in words[: words.index("legs")]),
        "program": sum(bool(re.fullmatch(r"R\d+", word)) for word in words),
        "machine": words.count(";"),
    }
    assert found[family] == size


@pytest.mark.parametrize("family", FAMILIES)
def test_default_prompts_are_short_and_chains_as_long_as_asked(family):
    errors = []
    for index in range(300):
        length = LENGTHS[0] + index * (LENGTHS[1] - LENGTHS[0]) // 299
        problem = make_problem(family, 1, index, length=length)
        prompt, chain = len(problem.prompt.split()), len(problem.completion.split())
        assert prompt <= (prompt + chain) / 4
        errors.append(chain / length - 1)
    # Chains come in whole lines, which are longer where there are dead ends, jumps and checks.
    assert max(map(abs, errors)) < 0.15
    assert abs(sum(errors) / len(errors)) < 0.06


def test_streams_are_fixed_by_their_arguments_and_differ_between_seeds():
    for family in FAMILIES:
        assert make_problem(family, 1, 0) == make_problem(family, 1, 0)
        prompts = {make_problem(family, seed, index).prompt for seed in range(5) for index in range(5)}
        assert len(prompts) == 25


def test_a_range_is_drawn_from_ends_included():
    problems = [make_problem("machine", 1, index, (5, 7), 60) for index in range(40)]
    assert {problem.id.split("-")[1] for problem in problems} == {"n5", "n6", "n7"}
    assert {problem.prompt.split()[-2] for problem in problems} == set(CARE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"family": "maze"}, "family 'maze' is unknown; allowed: walk, program, machine"),
        ({"size": MIN_SIZE - 1}, f"size 3 is out of range; allowed: {MIN_SIZE} to {MAX_SIZE}"),
        ({"size": MAX_SIZE + 1}, "size .* is out of range"),
        ({"size": (8, MAX_SIZE + 1)}, "size .* is out of range"),
        ({"size": (9, 8)}, r"size 9-8 is out of range"),
        ({"length": MIN_LENGTH - 1}, f"length 39 is out of range; allowed: {MIN_LENGTH} to {MAX_LENGTH}"),
        ({"length": MAX_LENGTH + 1}, "length .* is out of range"),
        ({"care": -1}, "care -1 is out of range; allowed: 0 to 2"),
        ({"care": 3}, "care 3 is out of range"),
        ({"legs": 0}, "legs 0 is out of range; allowed: 1 to 8"),
        ({"legs": (3, 9)}, "legs .* is out of range"),
        ({"slip_rate": -0.1}, "slip_rate.*allowed: 0 to 1"),
        ({"slip_rate": 1.5}, "slip_rate.*allowed: 0 to 1"),
    ],
)
def test_refuses_what_it_cannot_make(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        make_problem(**{"family": "walk", "seed": 1, "index": 0} | settings)
    assert "\n" not in str(caught.value)


def test_answer_of_a_text_without_answer_is_none():
    assert answer_of("#3 so from ba be . #2") is None


def test_tokenizer_knows_every_word_and_reads_back_as_text():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == VOCABULARY_SIZE
    for family in FAMILIES:
        for size in range(MIN_SIZE, MAX_SIZE + 1):
            for care in range(len(CARE)):
                problem = make_problem(family, 1, size, size, MAX_LENGTH, care, slip_rate=0.5)
                for text in (problem.prompt, problem.completion):
                    ids = tokenizer(text).input_ids
                    assert ids[0] == tokenizer.bos_token_id
                    assert tokenizer.unk_token_id not in ids
                    assert len(ids) == 1 + len(text.split())
                    assert tokenizer.decode(ids[1:]) == text


def test_the_longest_problem_fits_into_the_model():
    positions = training.reasoner_config(build_tokenizer()).max_position_embeddings
    for family in FAMILIES:
        for index in range(20):
            problem = make_problem(family, 1, index, MAX_SIZE, MAX_LENGTH)
            assert len(problem.prompt.split()) + len(problem.completion.split()) + 2 <= positions


@pytest.fixture
def tiny_training(monkeypatch):
    """Make training a matter of seconds: a tiny model, short chains."""

    def config(tokenizer):
        return LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    monkeypatch.setattr(training, "reasoner_config", config)
    monkeypatch.setattr(training, "CURRICULUM", (((4, 5), (40, 60)), ((4, 6), (60, 90))))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_counts_chain_tokens_other_than_slips(family, monkeypatch):
    problems = []

    def recorded(*arguments, **settings):
        problems.append(make_problem(*arguments, **settings))
        return problems[-1]

    monkeypatch.setattr(training, "make_problem", recorded)
    monkeypatch.setattr(training, "SLIP_RATE", 0.5)
    tokenizer = build_tokenizer()
    ids, labels = training.make_batch(tokenizer, family, step=3, stage=0, tokens=2000)
    assert len(problems) == len(ids) == len(labels) > 3
    assert any(problem.slips for problem in problems)
    for row, label, problem in zip(ids.tolist(), labels.tolist(), problems, strict=True):
        prompt, chain = tokenizer(problem.prompt).input_ids, problem.completion.split()
        used = len(prompt) + len(chain) + 1
        assert row[: len(prompt)] == prompt
        assert tokenizer.convert_ids_to_tokens(row[len(prompt) : used]) == [*chain, "<eos>"]
        assert set(row[used:]) <= {tokenizer.pad_token_id}
        ignored = {*range(len(prompt)), *(len(prompt) + slip for slip in problem.slips)}
        ignored |= set(range(used, len(row)))
        expected = [-100 if i in ignored else token for i, token in enumerate(row)]
        assert label == expected


def test_batches_are_fixed_by_step_family_and_stage():
    tokenizer = build_tokenizer()
    asked = [("walk", 0, 0), ("walk", 1, 0), ("program", 0, 0), ("walk", 0, 1)]
    batches = [training.make_batch(tokenizer, *each, 600)[0] for each in asked]
    assert torch.equal(batches[0], training.make_batch(tokenizer, *asked[0], 600)[0])
    assert len({tuple(batch[0].tolist()) for batch in batches}) == 4


@pytest.mark.usefixtures("tiny_training")
def test_a_killed_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    options = {"steps": 5, "tokens": 300, "peak": 1e-3, "checkpoint_every": 2}
    training.train(tmp_path / "whole", **options)

    make_batch = training.make_batch

    def killed_at_step_three(tokenizer, family, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return make_batch(tokenizer, family, step, *rest)

    monkeypatch.setattr(training, "make_batch", killed_at_step_three)
    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path / "parts", **options)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(training, "make_batch", make_batch)
    training.train(tmp_path / "parts", **options)

    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert parts["step"] == whole["step"] == 5
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    rows = (tmp_path / "parts" / "training.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [5]
    assert (tmp_path / "parts" / "model.safetensors").exists()


@pytest.mark.usefixtures("tiny_training")
def test_loss_goes_down():
    run = training.Run(build_tokenizer(), "cpu")
    losses = []
    for _ in range(12):
        figures = run.advance(0.02, 900)
        losses.append([figures[f"{family}_loss"] for family in FAMILIES])
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < first - 0.5


@pytest.mark.usefixtures("tiny_training")
def test_problems_grow_once_the_easy_ones_are_mastered(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MOVE_UP_AT", 0.9)
    run = training.Run(build_tokenizer(), "cpu")
    run._recent.extend([1.0] * 48)
    run.advance(1e-3, 200)
    assert run.stage == 0  # 49 steps are too few to tell
    run.save(tmp_path / "run.pt")
    again = training.Run(build_tokenizer(), "cpu")
    again.restore(tmp_path / "run.pt")
    for each in (run, again):
        each.advance(1e-3, 200)
        assert each.stage == 1
    for _ in range(2):
        run._recent.extend([1.0] * 49)
        run.advance(1e-3, 200)
        assert run.stage == 1  # there is none above


def test_learning_rate_warms_up_and_falls():
    rates = [training.learning_rate(step, 4000, 1.0) for step in (0, 99, 1000, 2000, 3000, 3999)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 1.0, 0.5, 0.02])
