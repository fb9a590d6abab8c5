"""Live runs: what a row says of one text, and which batches are decoded when."""

from __future__ import annotations

import json
import random
import shutil
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import takewhile

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spies import NAME, tiny_waves
from tiny_models import tiny_model

from simulator.budget import parse_budget
from simulator.policies.language import parse_policy
from simulator.results.output import write_parquet
from simulator.results.tables import budget_columns
from traces.errors import InfeasibleBudgetError, MissingDataError, NoDeviceError, UserError
from validate.eviction.decode import Completion
from validate.live import completions, matrix
from validate.live.completions import ROW_SCHEMA, Baseline, LiveSettings, baselines_of, complete
from validate.live.matrix import FULL, Batch, Matrix, MatrixSettings
from validate.models.load import load_model, model_shape
from validate.models.next_token import Sampling
from validate.problems.families import make_problem
from validate.problems.prompts import Prompt, read_prompts
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer

PROBLEMS = [make_problem("walk", 1, index, size=4, length=60) for index in range(4)]
N_NEW = 24
SETTINGS = LiveSettings(max_new_tokens=N_NEW)
RKV, RANDOM = parse_policy("rkv", buffer=4), parse_policy("random", buffer=4)
DRAWN = replace(SETTINGS, samples=2, sampling=Sampling(True, 1.5, 1.0, 7), seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model beside its problems."""
    folder = tmp_path_factory.mktemp("live")
    tiny_model(vocab_size=VOCABULARY_SIZE, seed=2).save_pretrained(folder / NAME)
    build_tokenizer().save_pretrained(folder / NAME)
    rows = [{name: asdict(own)[name] for name in ("id", "family", "prompt", "answer")} for own in PROBLEMS]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder / NAME), "float32", "cpu")


@pytest.fixture(scope="module")
def prompts(folder):
    return read_prompts(folder / "problems.jsonl", 3)


@pytest.fixture(scope="module")
def full(loaded, prompts):
    """Rows of the full cache."""
    return complete(loaded, prompts, FULL, None, SETTINGS)


def run(loaded, prompts, budget, policy=RKV, settings=SETTINGS, baselines=None, **options):
    return complete(
        loaded, prompts, policy, parse_budget(budget), settings, baselines=baselines, waves={}, **options
    )


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
        write_parquet(written.drop("budget_kind"), own.path(batch))
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


def settings_for(folder, **fields):
    live = {"max_new_tokens": 8, "samples": 1, "sampling": asdict(Sampling()), "seed": 0}
    own = {"model": str(folder / NAME), "prompts": str(folder / "problems.jsonl"), "batch": 2, "live": live}
    return MatrixSettings(**own | fields)


CELLS = [(RKV, parse_budget("20")), (RANDOM, parse_budget("20")), (RKV, parse_budget("60%"))]


def test_problems_are_outermost_and_the_full_cache_comes_first(folder, tmp_path):
    own = Matrix(tmp_path, settings_for(folder), 5)
    batches = own.batches([(FULL, parse_budget("20")), *CELLS])
    assert [(batch.first, batch.count) for batch in batches] == [(0, 2)] * 4 + [(2, 2)] * 4 + [(4, 1)] * 4
    assert [(batch.policy, batch.budget) for batch in batches[:4]] == [(FULL, None), *CELLS]


def test_every_batch_has_a_file_of_its_own(folder, tmp_path):
    policies = [parse_policy(text) for text in ("rkv", "rkv:alpha=0.2", "rkv:buffer=4", "snapkv", "rkv+wave")]
    budgets = [parse_budget(text) for text in ("20", "20%", "20MiB", "2%", "0.2%")]
    cells = [(policy, budget) for policy in policies for budget in budgets]
    batches = Matrix(tmp_path, settings_for(folder), 6).batches(cells)
    names = {batch.file_name for batch in batches}
    assert len(names) == len(batches) == 3 * (1 + 25)
    assert all(name.isascii() and "/" not in name and "%" not in name for name in names)


class Waiting(Future):
    """A batch that is decoded when its end is asked for."""

    def result(self):
        if not self.done():
            self.calls.finish(self)
        return super().result()


class Calls:
    """Takes the place of processes: batches wait until one is waited for, which may be any of them."""

    def __init__(self, monkeypatch, asked, choose=lambda n: 0, failing=()):
        self.decoded, self.pending, self.choose, self.failing = [], {}, choose, failing
        self.settings = asked
        monkeypatch.setattr(matrix, "processes", lambda *_: self)
        monkeypatch.setattr(matrix, "_run_batch", self.run_batch)
        monkeypatch.setattr(matrix, "wait", self.wait)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for future in list(self.pending) if kind is None else ():
            self.finish(future)

    def submit(self, function, *arguments):
        future = Waiting()
        future.calls = self
        self.pending[future] = function, arguments
        return future

    def wait(self, running, **_):
        future = list(self.pending)[self.choose(len(self.pending))]
        self.finish(future)
        return {future}, set(running) - {future}

    def finish(self, future):
        function, arguments = self.pending.pop(future)
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    def run_batch(self, folder, batch):
        baseline = Batch(FULL, None, batch.first, batch.count)
        if batch.budget is not None:
            held = pl.read_parquet(folder / "batches" / baseline.file_name)
            assert len(held) >= batch.count * self.settings.live["samples"], (
                "decoded before its full-cache runs"
            )
        self.decoded.append(batch)
        if (batch.policy.name, batch.first) in self.failing:
            raise MissingDataError(f"{batch.policy.name} at {batch.first} lacks a wave")
        problems = range(batch.first, batch.first + batch.count)
        samples = range(self.settings.live["samples"])
        labels = {"policy": batch.policy.name, "policy_params": batch.policy.parameters_json}
        labels |= budget_columns(batch.budget)
        rows = [labels | {"problem": str(i), "sample": s} for i in problems for s in samples]
        write_parquet(pl.DataFrame(rows, schema=ROW_SCHEMA), folder / "batches" / batch.file_name)


@pytest.fixture
def calls(monkeypatch):
    return lambda asked, **options: Calls(monkeypatch, asked, **options)


def ran(own, batches, jobs=1):
    """Run; give errors by batch file, and what was told."""
    told = []
    errors = own.run(batches, jobs, lambda batch, error: told.append((batch, error)))
    return errors, told


@settings(deadline=None, max_examples=10)
@given(order=st.randoms(use_true_random=False), jobs=st.integers(1, 4))
def test_nothing_is_decoded_before_its_full_cache_whoever_is_done_first(
    folder, tmp_path_factory, order, jobs
):
    asked = settings_for(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = Calls(monkeypatch, asked, choose=order.randrange)
        own = Matrix(tmp_path_factory.mktemp("matrix"), asked, 3)
        batches = own.batches(CELLS)
        errors, told = ran(own, batches, jobs)
    assert errors == {}
    assert sorted(seen.decoded, key=str) == sorted(batches, key=str)
    assert sorted(told, key=str) == sorted(((batch, None) for batch in batches), key=str)
    assert len(own.table(batches)) == 3 * 4


def test_a_second_run_decodes_nothing(folder, tmp_path, calls):
    asked = settings_for(folder)
    own, seen = Matrix(tmp_path, asked, 4), calls(asked)
    batches = own.batches(CELLS)
    ran(own, batches)
    table = own.table(batches)
    assert len(seen.decoded) == len(batches) == 8
    errors, told = ran(Matrix(tmp_path, asked, 4), batches)
    assert (errors, told) == ({}, [(batch, None) for batch in batches])
    assert len(seen.decoded) == 8
    assert own.table(batches).equals(table)
    own.path(batches[5]).unlink()
    ran(own, batches)
    assert seen.decoded[8:] == [batches[5]]


@pytest.mark.parametrize("samples", [1, 2])
def test_more_problems_only_add_batches_and_fewer_take_rows_away(samples, folder, tmp_path, calls):
    asked = settings_for(folder, live={"samples": samples})
    seen = calls(asked, choose=lambda n_waiting: n_waiting - 1)
    # Of the second run only what was cut off is new: the full cache and three cells.
    for limit, n_decoded in ((3, 8), (4, 4), (6, 4), (3, 0)):
        n_before = len(seen.decoded)
        own = Matrix(tmp_path, replace(asked, limit=limit), limit)
        batches = own.batches(CELLS)
        assert ran(own, batches)[0] == {}
        assert len(seen.decoded) - n_before == n_decoded
        table = own.table(batches)
        assert len(table) == limit * samples * 4
        assert set(table["problem"]) == {str(i) for i in range(limit)}


def test_an_error_in_one_batch_is_told_and_the_others_are_written(folder, tmp_path, calls):
    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 4)
    batches = own.batches(CELLS)
    seen = calls(asked, failing={("random", 2)})
    errors, told = ran(own, batches)
    assert list(errors) == [batches[6].file_name]
    assert isinstance(errors[batches[6].file_name], MissingDataError)
    assert [pair for pair in told if pair[1]] == [(batches[6], "random at 2 lacks a wave")]
    assert len(told) == 8
    assert len(own.table(batches)) == 4 * 4 - 2
    seen.failing = ()
    assert ran(own, batches)[0] == {}
    assert seen.decoded[8:] == [batches[6]]


@pytest.mark.parametrize("jobs", [1, 3])
def test_without_a_full_cache_its_policies_are_not_decoded(folder, tmp_path, calls, jobs):
    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 4)
    batches = own.batches(CELLS)
    seen = calls(asked, failing={("fullkv", 0)})
    errors, told = ran(own, batches, jobs)
    assert set(errors) == {batch.file_name for batch in batches[:4]}
    assert sorted((b.file_name for b, _ in told)) == sorted(b.file_name for b in batches)
    reasons = {batch: error for batch, error in told if error}
    assert reasons[batches[0]] == "fullkv at 0 lacks a wave"
    assert reasons[batches[1]] == "its full-cache runs failed: fullkv at 0 lacks a wave"
    assert seen.decoded == [batches[0], *batches[4:]]
    assert set(own.table(batches)["problem"]) == {"2", "3"}


def test_an_interrupt_takes_waiting_batches_with_it(folder, tmp_path, calls):
    asked = settings_for(folder)
    own, seen = Matrix(tmp_path, asked, 4), calls(asked)

    def interrupt(batch, error):
        if batch.policy == RKV:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.run(own.batches(CELLS), 1, interrupt)
    assert len(seen.decoded) < len(own.batches(CELLS))
    assert len(own.table(own.batches(CELLS))) == 2 * len(seen.decoded)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"batch": 3}, "batch"),
        ({"live": {"max_new_tokens": 9}}, "live"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_a_folder_with_other_settings_is_refused(change, name, folder, tmp_path):
    Matrix(tmp_path / "run", settings_for(folder), 4)
    with pytest.raises(UserError, match=f"other settings: its {name} is") as caught:
        Matrix(tmp_path / "run", settings_for(folder, **change), 4)
    assert "\n" not in str(caught.value)
    assert "allowed: another folder" in str(caught.value)
    Matrix(tmp_path / "run", settings_for(folder, limit=2), 2)


def test_other_problems_are_refused_wherever_they_stand(folder, tmp_path):
    asked = settings_for(folder)
    Matrix(tmp_path / "run", asked, 4)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((folder / "problems.jsonl").read_bytes())
    Matrix(tmp_path / "run", replace(asked, prompts=str(moved)), 4)
    moved.write_text(moved.read_text().replace("walk", "wark"))
    with pytest.raises(UserError, match="its prompts_sha256 is"):
        Matrix(tmp_path / "run", replace(asked, prompts=str(moved)), 4)


def test_another_wave_under_the_same_name_is_refused(folder, tmp_path):
    wave = tmp_path / "wave.json"
    tiny_waves()[NAME].write(wave)
    asked = settings_for(folder, waves=(str(wave),))
    Matrix(tmp_path / "run", asked, 4)
    Matrix(tmp_path / "run", asked, 4)
    tiny_waves((1, 2))[NAME].write(wave)
    with pytest.raises(UserError, match="its waves is"):
        Matrix(tmp_path / "run", asked, 4)


def test_other_weights_under_the_same_name_are_refused(folder, tmp_path):
    model = tmp_path / NAME
    shutil.copytree(folder / NAME, model)
    asked = settings_for(folder, model=str(model))
    Matrix(tmp_path / "run", asked, 4)
    tiny_model(vocab_size=VOCABULARY_SIZE, seed=5).save_pretrained(model)
    with pytest.raises(UserError, match="its weights is"):
        Matrix(tmp_path / "run", asked, 4)


def test_a_damaged_batch_is_decoded_again(folder, tmp_path, calls):
    asked = settings_for(folder)
    own, seen = Matrix(tmp_path, asked, 4), calls(asked)
    batches = own.batches(CELLS)
    ran(own, batches)
    own.path(batches[2]).write_bytes(own.path(batches[2]).read_bytes()[:100])
    assert not own.is_done(batches[2])
    assert ran(own, batches)[0] == {}
    assert seen.decoded[8:] == [batches[2]]


def test_no_flipped_bit_of_a_batch_goes_unnoticed(folder, tmp_path, calls, capsys):
    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 4)
    calls(asked)
    batches = own.batches(CELLS)
    ran(own, batches)
    path, rng = own.path(batches[2]), random.Random(5)
    sound, rows = path.read_bytes(), own.table(batches)
    for _ in range(100):
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert not own.is_done(batches[2])
        assert "damaged or no parquet file; it is decoded again" in capsys.readouterr().err
    path.write_bytes(sound)
    assert own.table(batches).equals(rows)


def test_a_batch_that_lost_columns_or_is_another_is_decoded_again(folder, tmp_path, calls, capsys):
    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 4)
    calls(asked)
    batches = own.batches(CELLS)
    ran(own, batches)
    write_parquet(pl.read_parquet(own.path(batches[2])).drop("token_ids"), own.path(batches[2]))
    shutil.copy(own.path(batches[1]), own.path(batches[3]))
    assert [own.is_done(batch) for batch in batches[:4]] == [True, True, False, False]
    err = capsys.readouterr().err
    assert "has no column 'token_ids'" in err
    assert "holds rows of another batch" in err


@pytest.mark.parametrize("text", ["", "{", "3", '"text"', "[1]"])
def test_damaged_settings_are_refused(text, folder, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        Matrix(tmp_path, settings_for(folder), 4)


@pytest.fixture
def worker(monkeypatch):
    """An empty worker in this process."""
    monkeypatch.setattr(matrix, "_worker", {})
    n_threads, interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    torch.set_num_threads(n_threads)
    signal.signal(signal.SIGINT, interrupt)


def test_a_worker_writes_the_rows_of_a_batch(folder, tmp_path, loaded, worker):
    asked = settings_for(folder, live={"max_new_tokens": 8, "samples": 2, "sampling": asdict(DRAWN.sampling)})
    own = Matrix(tmp_path, asked, 4)
    batches = own.batches(CELLS[:2])[3:]
    matrix._start_worker(asked)
    for batch in batches:
        matrix._run_batch(tmp_path, batch)
    assert all(own.is_done(batch) for batch in batches)
    live = LiveSettings(max_new_tokens=8, samples=2, sampling=DRAWN.sampling)
    prompts = read_prompts(folder / "problems.jsonl")[2:]
    full = complete(loaded, prompts, FULL, None, live, first=2)
    random = run(loaded, prompts, "20", RANDOM, live, baselines_of(full), first=2)
    written = own.table(batches)
    assert list(written.schema) == [*ROW_SCHEMA, "seconds", "code_version"]
    assert (written["seconds"] > 0).all()
    same = written.select(list(ROW_SCHEMA))
    assert same[:4].equals(full)
    assert same[8:].equals(random)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model": "./none"}, UserError, "is not a folder here"),
        ({"waves": ("./none.json",)}, MissingDataError, "none.json"),
    ],
)
def test_a_worker_that_cannot_start_says_why_for_its_batches(change, kind, words, folder, tmp_path, worker):
    matrix._start_worker(replace(settings_for(folder), **change))
    with pytest.raises(kind, match=words):
        matrix._run_batch(tmp_path, Batch(FULL, None, 0, 2))


def test_a_device_without_memory_says_what_to_do(folder, tmp_path, worker, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError

    matrix._start_worker(settings_for(folder))
    monkeypatch.setattr(completions, "complete", fail)
    with pytest.raises(NoDeviceError, match="2 problems at once do not fit"):
        matrix._run_batch(tmp_path, Batch(FULL, None, 0, 2))


def test_what_a_users_part_raises_fails_its_batch_in_words(folder, tmp_path, worker):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from simulator.policies.heads.utility import UtilityHeads\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Mine(UtilityHeads):\n"
        "    name = 'mine'\n\n"
        "    def table(self, request):\n"
        "        raise KeyError('horizon')\n"
    )
    asked = settings_for(folder)
    Matrix(tmp_path, asked, 2)
    matrix._start_worker(asked)
    matrix._run_batch(tmp_path, Batch(FULL, None, 0, 2))
    policy = parse_policy(f"rkv+{tmp_path}/mine.py:Mine:window=2", buffer=2)
    with pytest.raises(UserError, match=r"'mine' failed: KeyError: 'horizon' \(mine.py, line 10\)"):
        matrix._run_batch(tmp_path, Batch(policy, parse_budget("20"), 0, 2))


def test_a_process_that_dies_is_told_in_one_line(folder, tmp_path, calls, monkeypatch):
    def die(*_):
        raise BrokenProcessPool

    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 4)
    calls(asked)
    monkeypatch.setattr(matrix, "_run_batch", die)
    with pytest.raises(UserError, match="a worker process died"):
        own.run(own.batches(CELLS), 1, lambda *_: None)


@pytest.mark.slow
def test_processes_decode_a_matrix(folder, tmp_path):
    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 3)
    batches = own.batches([*CELLS, (RKV, parse_budget("3"))])
    errors, told = ran(own, batches)
    assert {batch.file_name for batch, error in told if error} == set(errors)
    assert set(errors) == {batches[4].file_name, batches[9].file_name}
    assert all(isinstance(error, InfeasibleBudgetError) for error in errors.values())
    assert len(told) == len(batches) == 10
    table = own.table(batches)
    assert len(table) == 3 * 4
    assert table.filter(pl.col("policy") == "fullkv")["n_tokens"].to_list() == [8] * 3
    assert len(list((tmp_path / "batches").iterdir())) == 8
