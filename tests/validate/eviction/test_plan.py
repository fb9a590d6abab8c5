"""What every sequence of a batch may keep, settled without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from simulator.policies.language import parse_policy
from traces.errors import UserError
from traces.shape import ModelShape
from validate.eviction.plan import Plan

SHAPE = ModelShape(n_layers=2, n_query_heads=4, n_kv_heads=2, head_dim=16, dtype="float32")
PYRAMID = "snapkv+custom:window=4,layer_shares=3/1"


def planned(text, entries, **given):
    return Plan(parse_policy(text), SHAPE, {"rope_theta": 1e4}, entries, **given)


def test_rows_of_one_budget_keep_the_same_whatever_their_prompts_are():
    plan = planned(PYRAMID, 20)
    plan.read(np.array([5, 90, 7]))
    assert plan.budgets.tolist() == [[30, 10]] * 3
    assert list(plan.seeds) == [0, 1, 2]


def test_rows_that_are_left_keep_their_own_budgets_prompts_and_seeds():
    plan = planned(PYRAMID, [20, 40, 60], seeds=[4, 5, 6])
    plan.read(np.array([5, 90, 7]))
    plan.keep_rows(np.array([2, 0]))
    assert plan.budgets.tolist() == [[90, 30], [30, 10]]
    assert (plan.prompts.tolist(), list(plan.seeds)) == ([7, 5], [6, 4])
    plan.require_rows(2)
    with pytest.raises(UserError, match="budgets are given for 2 sequences; found: a batch of 3"):
        plan.require_rows(3)


def test_budgets_move_between_layers_after_the_prompt_and_every_delta_tokens():
    plan = planned("rkv+wave-dynamic:window=4,layer_delta=10", 20)
    plan.read(np.array([30, 33]))
    assert [n for n in range(30, 64) if plan.is_divided_at(0, n)] == [30, 40, 50, 60]
    assert plan.is_divided_at(1, 43)


def test_a_plan_needs_no_torch():
    code = "import sys, validate.eviction.plan; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
