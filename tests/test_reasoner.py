"""The generator, its tokenizer, and a training that resumes where it was killed."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from validate.reasoner import train as training
from validate.reasoner.tasks import FAMILIES, answer_of, main, make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer


def solve_walk(prompt: str) -> str:
    table, questions = re.fullmatch(r"walk (.*) ask (.*) think", prompt).groups()
    following, digit = {}, {}
    for key, target, number in re.findall(r"(\w+) : (\w+) (\d) ;", table):
        following[key], digit[key] = target, int(number)
    sums = []
    for question in questions.split(" , "):
        key, end = question.split(" to ")
        total = 0
        while key != end:
            total += digit[key]
            key = following[key]
        sums.append(str(total % 10))
    return " ".join(sums)


def solve_program(prompt: str) -> str:
    lines, asked = re.fullmatch(r"program (.*) ask (\w+) think", prompt).groups()
    values: dict[str, int] = {}
    for name, left, operator, right in re.findall(r"(\w+) = (\w+) ([-+*]) (\w+) ;", lines):
        a, b = (int(x) if x.isdigit() else values[x] for x in (left, right))
        values[name] = {"+": a + b, "-": a - b, "*": a * b}[operator] % 10
    return str(values[asked])


SOLVERS = {"walk": solve_walk, "program": solve_program}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(3, 40), st.integers(0, 2**40))
def test_answers_agree_with_an_independent_solver(family, size, index):
    problem = make_problem(family, size, 1, index)
    assert SOLVERS[family](problem.prompt) == problem.answer
    assert answer_of(problem.completion) == problem.answer


def test_a_chain_states_every_running_value_truly():
    problem = make_problem("program", 12, 1, 3)
    stated = dict(re.findall(r": (\w+) (\d) ;", problem.completion))
    for name, value in re.findall(r"\b([a-z]{2}) (\d)", problem.completion):
        assert stated[name] == value


def test_streams_are_fixed_by_seed_and_differ_between_seeds():
    assert make_problem("walk", 8, 1, 0) == make_problem("walk", 8, 1, 0)
    assert make_problem("walk", 8, 1, 0).prompt != make_problem("walk", 8, 2, 0).prompt


@pytest.mark.parametrize(("family", "size"), [("maze", 8), ("walk", 2), ("walk", 65)])
def test_refuses_what_it_cannot_make(family, size):
    with pytest.raises(ValueError, match="allowed"):
        make_problem(family, size, 1, 0)


def test_answer_of_text_without_answer_is_none():
    assert answer_of("ba : be 1 = 1 ;") is None


def test_tokenizer_knows_every_word_and_reads_back_as_text():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == VOCABULARY_SIZE
    for family in FAMILIES:
        problem = make_problem(family, 40, 1, 0)
        ids = tokenizer(problem.prompt).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == problem.prompt


def test_problem_command_writes_jsonl(capsys):
    main(["--family", "mixed", "--count", "3", "--size", "5", "--seed", "4"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["family"] for row in rows] == ["walk", "program", "walk"]
    assert {"id", "prompt", "completion", "answer"} <= rows[0].keys()


def test_loss_counts_chain_tokens_only():
    tokenizer = build_tokenizer()
    ids, labels = training.make_batch(tokenizer, "walk", step=0, largest=5, tokens=200)
    think = tokenizer.convert_tokens_to_ids("think")
    for row, label in zip(ids, labels, strict=True):
        chain_starts = int(np.flatnonzero(row == think)[0]) + 1
        assert (label[:chain_starts] == -100).all()
        end = int(np.flatnonzero(row == tokenizer.eos_token_id)[0])
        assert (label[chain_starts : end + 1] == row[chain_starts : end + 1]).all()
        assert (label[end + 1 :] == -100).all()


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
