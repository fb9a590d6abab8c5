"""Which batches of a live run are decoded when, and what is decoded again."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_runs import CELLS, RKV, Calls, ran, settings_for
from spies import NAME, tiny_waves
from tiny_models import tiny_model

from simulator.budget import parse_budget
from simulator.policies.language import parse_policy
from simulator.results.output import write_parquet
from traces.errors import MissingDataError, UserError
from validate.live.completions import LiveSettings
from validate.live.matrix import FULL, Matrix
from validate.reasoner.tokenizer import VOCABULARY_SIZE


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
    batches[5].path(tmp_path).unlink()
    ran(own, batches)
    assert seen.decoded[8:] == [batches[5]]


@pytest.mark.parametrize("samples", [1, 2])
def test_more_problems_only_add_batches_and_fewer_take_rows_away(samples, folder, tmp_path, calls):
    asked = settings_for(folder, live=LiveSettings(samples=samples))
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
    assert list(errors) == [batches[6]]
    assert isinstance(errors[batches[6]], MissingDataError)
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
    assert set(errors) == set(batches[:4])
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
        ({"live": LiveSettings(max_new_tokens=9)}, "live"),
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
    batches[2].path(tmp_path).write_bytes(batches[2].path(tmp_path).read_bytes()[:100])
    assert not own.is_done(batches[2])
    assert ran(own, batches)[0] == {}
    assert seen.decoded[8:] == [batches[2]]


def test_no_flipped_bit_of_a_batch_goes_unnoticed(folder, tmp_path, calls, capsys):
    asked = settings_for(folder)
    own = Matrix(tmp_path, asked, 4)
    calls(asked)
    batches = own.batches(CELLS)
    ran(own, batches)
    path, rng = batches[2].path(tmp_path), random.Random(5)
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
    write_parquet(pl.read_parquet(batches[2].path(tmp_path)).drop("token_ids"), batches[2].path(tmp_path))
    shutil.copy(batches[1].path(tmp_path), batches[3].path(tmp_path))
    assert [own.is_done(batch) for batch in batches[:4]] == [True, True, False, False]
    err = capsys.readouterr().err
    assert "has no column 'token_ids'" in err
    assert "holds rows of another batch" in err


@pytest.mark.parametrize("text", ["", "{", "3", '"text"', "[1]"])
def test_damaged_settings_are_refused(text, folder, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        Matrix(tmp_path, settings_for(folder), 4)
