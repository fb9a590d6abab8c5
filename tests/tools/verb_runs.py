"""What verbs that run a model are tested on: three problems, and who answers them."""

from __future__ import annotations

from validate.problems.families import make_problem

PROBLEMS = [make_problem("walk", 1, index, size=4, length=60) for index in range(3)]
# How many of the problems each policy answers where `answering` stands in for decoding.
RIGHT = {"rkv": 2, "streamingllm": 1, "random": 0}


def one_line(err, *words):
    """Check that an error is one line of ``sim`` that holds words."""
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("sim: ")
    for word in words:
        assert str(word) in err
