"""What holds for all allocators while a trace is replayed: totals, files and waves, kept prompts."""

from __future__ import annotations

from dataclasses import replace

import naive_allocators
import numpy as np
import pytest
from agreement import agree, make_wave
from allocating import layer_request, written

from simulator.engine.loop import Engine
from simulator.engine.request import Request
from simulator.policies.heads.duo import Duo
from simulator.policies.heads.headkv import HeadKV
from simulator.policies.language import parse_policy
from simulator.policies.layers.squeeze import Squeeze
from simulator.policies.layers.table import TableLayers
from simulator.policies.shipped import HEAD_ALLOCATORS, LAYER_ALLOCATORS
from traces.errors import InfeasibleBudgetError, MissingDataError, UserError


@pytest.mark.parametrize("allocator", [Squeeze(), TableLayers(), HeadKV(), Duo()], ids=repr)
def test_waves_are_checked_by_all_that_use_them(allocator):
    ask = allocator.allocate if allocator.name in LAYER_ALLOCATORS else allocator.table
    request = layer_request(20, 2, [1.0, 2], 2)
    ask(request)
    with pytest.raises(MissingDataError, match=r"no wave for model 'other' \(known: m\)"):
        ask(replace(request, model="other"))
    with pytest.raises(MissingDataError, match="has 2 layers, the trace 3"):
        ask(replace(request, n_layers=3))
    wave = replace(request.waves["m"], model_revision="r1", trace_ids=("t",))
    with pytest.raises(MissingDataError, match="of revision r1, the trace of r2; allowed: the same"):
        ask(replace(request, waves={"m": wave}, model_revision="r2"))
    with pytest.raises(UserError, match="trace t was used to calibrate"):
        ask(replace(request, waves={"m": wave}))


def test_infeasible_budgets_are_refused(make_trace):
    trace = make_trace()
    waves = {trace.model: make_wave(trace, (1, 5))}
    # Without protected entries a floored pyramid of ten ends in a layer without any.
    with pytest.raises(InfeasibleBudgetError, match="'pyramid-code' leaves layer 1 no entry"):
        Request(trace, parse_policy("knorm+pyramid-code"), 10)
    with pytest.raises(InfeasibleBudgetError, match="at least 9"):
        Request(trace, parse_policy("snapkv+squeeze+duo"), 8, waves=waves)


DYNAMIC = [
    ("snapkv+wave-dynamic:buffer=4,layer_delta=12,gamma=2", True),
    ("rkv+wave-dynamic+utility:buffer=4,layer_delta=7,delta=8", True),
    ("streamingllm+wave-dynamic+adakv:trigger=per-step,layer_delta=10", True),
    ("snapkv+wave-dynamic:buffer=4,layer_delta=0,gamma=2", False),
    ("snapkv+cake:buffer=4,cake_window=8", False),
]


@pytest.fixture
def uneven_trace(make_trace, rng):
    """Write a trace whose layers differ in how they attend, and change while it decodes."""
    queries, keys = rng.normal(size=(3, 4, 150, 8)), rng.normal(size=(3, 2, 150, 8))
    sharpness = np.ones((3, 1, 150, 1))
    sharpness[0, :, :80] = sharpness[1, :, 80:] = 6
    return make_trace(arrays=(queries * sharpness, keys), prompt_tokens=40)


@pytest.mark.parametrize(("policy", "moves"), DYNAMIC)
def test_dynamic_layer_budgets_move_and_their_total_stays(policy, moves, uneven_trace):
    entries, buffer, n_kv_heads = 17, 4, 2
    request = Request(uneven_trace, parse_policy(policy), entries)
    (outcome,) = Engine([request]).run()
    total = 3 * n_kv_heads * entries
    assert sum(layer.compressor.total for layer in request.layers) == total
    in_force = [
        {division.budgets.sum() for division in outcome.divisions if division.layer == layer}
        for layer in range(3)
    ]
    assert len({max(budgets) for budgets in in_force}) > 1, "layers are divided alike"
    assert any(len(budgets) > 1 for budgets in in_force) == moves
    assert all(division.lengths.sum() <= division.budgets.sum() for division in outcome.divisions)
    # After a reallocation a layer that lost budget holds it for one more token.
    assert outcome.held[1:].max() <= total + 3 * n_kv_heads * (buffer + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "moves"), DYNAMIC)
def test_dynamic_runs_are_equal_bit_for_bit(policy, moves, uneven_trace):
    outcomes = [
        Engine([Request(uneven_trace, parse_policy(policy), 17) for _ in range(2)], jobs=jobs).run()
        for jobs in (1, 1, 2)
    ]
    first, *others = [outcome for run in outcomes for outcome in run]
    for other in others:
        np.testing.assert_array_equal(first.mass, other.mass)
        np.testing.assert_array_equal(first.held, other.held)
        np.testing.assert_array_equal(first.evicted_at, other.evicted_at)
        for one, same in zip(first.divisions, other.divisions, strict=True):
            assert (one.layer, one.compression, one.n_tokens) == (same.layer, same.compression, same.n_tokens)
            np.testing.assert_array_equal(one.budgets, same.budgets)


def test_a_static_division_is_carried_out_once_and_after_a_layer_reallocation(uneven_trace):
    still = agree(uneven_trace, "recency+custom+custom:buffer=4,layer_shares=1/2/3,head_shares=3/1", 17)
    for layer, total in enumerate((18, 34, 50)):
        found = {tuple(d.budgets.tolist()) for d in still.outcome.divisions if d.layer == layer}
        assert found == {tuple(naive_allocators.in_proportion([3, 1], total, 0))}
    moving = agree(uneven_trace, "snapkv+wave-dynamic+custom:buffer=4,layer_delta=30,head_shares=3/2", 17)
    budgets = {(d.layer, tuple(d.budgets.tolist())) for d in moving.outcome.divisions}
    assert len(budgets) > 3
    assert all(a > b for _, (a, b) in budgets)


@pytest.mark.parametrize("text", ["recency+table+headkv", "tova+uniform+duo", "snapkv+wave-dynamic+headkv"])
@pytest.mark.parametrize("official", [False, True])
def test_tables_from_files_are_the_twins(text, official, uneven_trace, tmp_path):
    found = [[5, 1], [1, 0], [2, 9]]
    if official:
        heads = [(layer, head) for layer in range(3) for head in range(4)]
        found = {f"{layer}-{head}": [head % 3, layer, 1.5] for layer, head in heads}
    path = written(tmp_path / "table.json", found)
    assert not agree(uneven_trace, f"{text}:buffer=6,head_table={path}", 19).adopted


def test_every_allocator_is_sound_by_default():
    for table in (LAYER_ALLOCATORS, HEAD_ALLOCATORS):
        for name, part in table.items():
            assert part().name == name
            assert part.__doc__


KEEPING = [
    "snapkv:buffer=4",
    "rkv+wave+utility:buffer=4,delta=8,slot_order=score",
    "random+pyramid+adakv:buffer=4",
    "knorm+wave-dynamic+adakv:buffer=4,layer_delta=9,form=floor",
    "streamingllm+squeeze+duo:trigger=per-step",
    "recency+cake+custom:trigger=every-n,interval=5,head_shares=1/9",
]


@pytest.mark.slow
@pytest.mark.parametrize("policy", KEEPING)
def test_a_kept_prompt_is_never_evicted(policy, make_trace):
    trace = make_trace(n_layers=3, n_tokens=90, prompt_tokens=20)
    agreement = agree(trace, f"{policy},prompt=keep", 34, demand=(2, 40, 7), seed=3)
    assert not agreement.adopted
    assert agreement.outcome.n_evicted > 0
    assert (agreement.outcome.evicted_at[:, :, :20] > trace.total_tokens).all()
    assert all(division.budgets.min() >= 20 for division in agreement.outcome.divisions)


def test_a_budget_has_to_hold_the_kept_prompt(make_trace):
    trace = make_trace(prompt_tokens=20)
    policy = parse_policy("snapkv:window=5,prompt=keep")
    Request(trace, policy, 26)
    with pytest.raises(InfeasibleBudgetError, match=r"a prompt of 20 and 5 recent .* at least 26") as refusal:
        Request(trace, policy, 25)
    assert refusal.value.exit_code == 5


@pytest.mark.parametrize("text", ["fullkv+cake", "rkv+cake:trigger=never", "rkv+wave-dynamic:trigger=never"])
def test_what_never_evicts_needs_no_division(text, make_trace):
    (outcome,) = Engine([Request(make_trace(), parse_policy(text), 10)]).run()
    assert (outcome.mass == 1).all()


def test_results_tell_the_content_of_a_file_of_shares(tmp_path):
    file = tmp_path / "shares.json"
    texts = [f"rkv+custom:layer_shares={file}", f"rkv+headkv:head_table={file}"]
    for text in texts:
        file.write_text("[1, 2]")
        first = parse_policy(text).parameters["source"]
        file.write_text("[1, 3]")
        assert first.startswith("shares.json ")
        assert parse_policy(text).parameters["source"] != first
    assert "source" not in parse_policy("rkv+custom:layer_shares=1/2").parameters
    assert "source" not in parse_policy("rkv+headkv").parameters


def test_one_number_is_a_list_of_one():
    assert parse_policy("rkv+custom:layer_shares=4").layers.layer_shares == "4"
    assert parse_policy("rkv:trigger=segment,segment=198").trigger.segment == "198"
