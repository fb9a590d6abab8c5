"""What a row of a live run says of one text."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import takewhile

import polars as pl
import pytest
from live_runs import DRAWN, N_NEW, PROBLEMS, RANDOM, RKV, SETTINGS, run, settings_for

from simulator.budget import parse_budget
from simulator.policies.language import parse_policy
from simulator.results.output import write_parquet
from traces.errors import InfeasibleBudgetError
from validate.eviction.decode import Completion
from validate.live import completions
from validate.live.completions import ROW_SCHEMA, Baseline, baselines_of, complete
from validate.live.matrix import FULL, Batch, Matrix
from validate.models.load import model_shape
from validate.models.next_token import Sampling
from validate.problems.prompts import Prompt, read_prompts


@pytest.fixture(scope="module")
def prompts(folder):
    return read_prompts(folder / "problems.jsonl", 3)


@pytest.fixture(scope="module")
def full(loaded, prompts):
    """Rows of the full cache."""
    return complete(loaded, prompts, FULL, None, SETTINGS)


def test_the_full_cache_writes_what_the_model_writes(full, loaded, prompts):
    assert full.schema == pl.Schema(ROW_SCHEMA)
    assert full["problem"].to_list() == [prompt.id for prompt in prompts]
    per_entry = model_shape(loaded.model.config, loaded.model.dtype).bytes_per_entry
    for row, prompt in zip(full.iter_rows(named=True), prompts, strict=True):
        ids = loaded.tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        written = loaded.model.generate(input_ids=ids, max_new_tokens=N_NEW, do_sample=False)[
            0, ids.shape[1] :
        ]
        assert row["token_ids"] == list(takewhile(lambda token: token != 2, written.tolist()))
        lengths = [ids.shape[1] + step for step in range(1, len(row["token_ids"]))]
        assert row["bytes_peak"] == 2 * 2 * per_entry * max(lengths)  # layers, KV heads
        assert row["bytes_mean"] == pytest.approx(2 * 2 * per_entry * sum(lengths) / len(lengths))
        assert row["prompt_tokens"] == ids.shape[1]
        assert row["n_tokens"] == len(row["token_ids"])
        assert (row["family"], row["expected"], row["sample"]) == ("walk", prompt.answer, 0)
        assert (row["policy"], row["right"]) == ("fullkv", False)
        unset = ("budget_asked", "budget_unit", "budget_entries", "diverged_at", "answer")
        assert [row[name] for name in unset] == [None] * 5


def test_baselines_are_read_back_from_rows(full, prompts):
    found = baselines_of(full)
    assert list(found) == [(prompt.id, 0) for prompt in prompts]
    assert found[prompts[1].id, 0] == Baseline(full["token_ids"][1].to_list(), full["ended"][1])


def test_shares_and_limits_are_of_the_full_cache_run_with_its_end(loaded, prompts):
    known = {
        (prompts[0].id, 0): Baseline([5] * 20, False),
        (prompts[1].id, 0): Baseline([5] * 19, True),
        (prompts[2].id, 0): Baseline([5] * 39, True),
    }
    rows = run(loaded, prompts, "51%", baselines=known)
    lengths = [20, 20, 40]
    expected = [
        (n_prompt + n) * 51 // 100 for n_prompt, n in zip(rows["prompt_tokens"], lengths, strict=True)
    ]
    assert rows["budget_entries"].to_list() == expected
    assert rows["n_tokens"].to_list() == [22, 22, 44]
    assert not rows["ended"].any()
    assert (
        rows.row(0, named=True).items() >= {"budget_asked": 51.0, "budget_unit": "%", "policy": "rkv"}.items()
    )
    assert json.loads(rows["policy_params"][0])["buffer"] == 4
    stretched = run(loaded, prompts, "51%", baselines=known, settings=replace(SETTINGS, stretch=1.5))
    assert stretched["n_tokens"].to_list() == [30, 30, 60]
    assert run(loaded, prompts, "20", baselines=known)["budget_entries"].to_list() == [20] * 3


@pytest.mark.parametrize("text", ["30!", "70%!"])
def test_no_decode_step_holds_more_than_a_cap_however_long_the_text(loaded, prompts, text):
    known = {(prompt.id, 0): Baseline([5] * 20, False) for prompt in prompts}
    settings = replace(SETTINGS, stretch=2.0)
    rows = run(loaded, prompts, text, baselines=known, settings=settings)
    shape = model_shape(loaded.model.config, loaded.model.dtype)
    assert rows["budget_kind"].to_list() == ["peak"] * 3
    assert rows["n_tokens"].to_list() == [40] * 3
    for row in rows.iter_rows(named=True):
        most = int(parse_budget(text).of_cache(shape, row["prompt_tokens"] + 20))
        assert row["budget_entries"] == most // 4 - 4
        assert row["bytes_peak"] == (most // 4) * 4 * shape.bytes_per_entry


@pytest.mark.parametrize(
    "text",
    [
        "rkv+utility:delta=3,buffer=4",
        "snapkv+pyramid+adakv:window=4,buffer=3",
        "rkv+wave-dynamic:layer_delta=5,buffer=4",
        "h2o:trigger=every-n,interval=5",
        "rkv:trigger=per-step",
        "rkv:buffer=4,prompt=wait",
    ],
)
def test_a_cap_holds_under_policies_that_divide_and_wait(loaded, prompts, text):
    known = {(prompt.id, 0): Baseline([5] * 30, False) for prompt in prompts}
    rows = run(loaded, prompts, "70%!", policy=parse_policy(text), baselines=known)
    shape = model_shape(loaded.model.config, loaded.model.dtype)
    for row in rows.iter_rows(named=True):
        most = int(parse_budget("70%!").of_cache(shape, row["prompt_tokens"] + 30))
        assert row["prompt_tokens"] + row["n_tokens"] > most // 4
        assert 0.6 * most < row["bytes_peak"] / shape.bytes_per_entry <= most


def test_rows_of_a_version_with_one_kind_of_budget_are_of_that_kind(folder, tmp_path, loaded, prompts, full):
    own = Matrix(tmp_path, settings_for(folder), 3)
    batches = [Batch(FULL, None, 0, 3), Batch(RKV, parse_budget("20"), 0, 3)]
    rows = run(loaded, prompts, "20", baselines=baselines_of(full))
    for batch, written in zip(batches, (full, rows), strict=True):
        write_parquet(written.drop("budget_kind"), batch.path(tmp_path))
    assert own.table(batches)["budget_kind"].to_list() == [None] * 3 + ["kept"] * 3


def test_a_text_ends_at_the_models_own_end(loaded, prompts, full, monkeypatch):
    written = full["token_ids"][0].to_list()
    end = next(token for i, token in enumerate(written) if i >= 5 and token not in written[:i])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", end)
    rows = complete(loaded, prompts, FULL, None, SETTINGS)
    assert rows["ended"][0]
    assert rows["token_ids"][0].to_list() == written[: written.index(end)]
    n_tokens = rows["prompt_tokens"][0] + written.index(end) + 1
    again = run(loaded, prompts[:1], "100%", baselines=baselines_of(rows))
    assert again["budget_entries"][0] == n_tokens
    assert again["diverged_at"][0] is None
    assert again["ended"][0]


def test_divergence_is_the_first_other_token(loaded, prompts, full):
    ample = run(loaded, prompts, "500", baselines=baselines_of(full))
    assert ample["diverged_at"].to_list() == [None] * 3  # a text that was cut off has not ended differently
    assert ample["n_tokens"].to_list() == [26] * 3
    scarce = run(loaded, prompts, "10", baselines=baselines_of(full))
    for mine, theirs, found in zip(
        scarce["token_ids"], full["token_ids"], scarce["diverged_at"], strict=True
    ):
        same = [a == b for a, b in zip(mine, theirs, strict=False)]
        assert found == (same.index(False) if False in same else None)
    assert scarce["diverged_at"].is_not_null().any()
    assert (scarce["bytes_peak"] < ample["bytes_peak"]).all()


@pytest.mark.parametrize(
    ("mine", "theirs", "step"),
    [
        (([1, 2], True), ([1, 2, 3], True), 2),
        (([1, 2], False), ([1, 2, 3], True), None),
        (([1, 2, 3], True), ([1, 2], True), 2),
        (([1, 2, 3], True), ([1, 2], False), None),
        (([1, 3], False), ([1, 2], False), 1),
        (([1, 2], True), ([1, 2], False), None),
    ],
)
def test_a_text_that_was_cut_off_has_not_diverged_there(mine, theirs, step):
    done = Completion(*mine, bytes_peak=0, bytes_mean=0)
    assert completions._divergence(done, Baseline(*theirs)) == step


def test_samples_are_reproducible_and_differ(loaded, prompts):
    rows = complete(loaded, prompts, FULL, None, DRAWN)
    assert rows.equals(complete(loaded, prompts, FULL, None, DRAWN))
    assert rows["sample"].to_list() == [0, 1] * 3
    assert rows["problem"].to_list() == [prompt.id for prompt in prompts for _ in range(2)]
    assert len({tuple(ids) for ids in rows["token_ids"]}) == 6
    other = complete(loaded, prompts, FULL, None, replace(DRAWN, sampling=Sampling(True, 1.5, 1.0, 8)))
    assert not other["token_ids"].equals(rows["token_ids"])


def test_each_text_has_its_own_streams_wherever_its_batch_begins(loaded, prompts):
    rows = complete(loaded, prompts, FULL, None, DRAWN)
    alone = complete(loaded, prompts[1:2], FULL, None, DRAWN, first=1)
    assert alone["token_ids"].to_list() == rows["token_ids"][2:4].to_list()
    known = baselines_of(rows)
    greedy = replace(DRAWN, sampling=Sampling())
    together = run(loaded, prompts, "12", RANDOM, greedy, known)
    apart = run(loaded, prompts[1:2], "12", RANDOM, greedy, known, first=1)
    assert apart["token_ids"].to_list() == together["token_ids"][2:4].to_list()
    assert together["token_ids"][2].to_list() != together["token_ids"][3].to_list()  # only the policy draws


def test_no_two_texts_of_a_run_share_a_stream(loaded, prompts, monkeypatch):
    drawn, by_policy = [], []

    def decode(model, encoded, *_, sampling, seeds, **__):
        drawn.extend(own.seed for own in sampling)
        by_policy.extend(seeds)
        return [Completion([5], False, 0, 0.0)] * len(encoded)

    monkeypatch.setattr(completions, "decode", decode)
    for first, own in ((0, prompts[:2]), (2, prompts[2:])):
        complete(loaded, own, FULL, None, DRAWN, first=first)
    assert drawn == list(range(7, 7 + 6))
    assert by_policy == list(range(3, 3 + 6))


def test_rows_are_graded_and_searched_for_loops(loaded, monkeypatch):
    prompts = [Prompt(i, own.id, own.prompt, None, own.family, own.answer) for i, own in enumerate(PROBLEMS)]
    ids = [loaded.tokenizer(own.completion, add_special_tokens=False)["input_ids"] for own in PROBLEMS]
    ids[1] = ids[1][:-1]  # the last word of the answer
    ids[2] = ids[2][:5] * 8
    monkeypatch.setattr(
        completions, "decode", lambda *_, **__: [Completion(own, True, 64, 32.0) for own in ids]
    )
    rows = complete(loaded, prompts, FULL, None, SETTINGS)
    assert rows["right"].to_list() == [True, False, False, True]
    assert rows["answer"][0] == PROBLEMS[0].answer == rows["expected"][0]
    assert rows["answer"].is_null().to_list() == [False, False, True, False]
    assert rows["loop_period"].to_list() == [None, None, 5, None]
    assert rows.row(0, named=True).items() >= {"bytes_peak": 64, "bytes_mean": 32.0, "ended": True}.items()


def test_a_budget_below_what_is_protected_is_refused(loaded, prompts, full):
    with pytest.raises(InfeasibleBudgetError, match="budget 3 entries"):
        run(loaded, prompts, "3", baselines=baselines_of(full))
