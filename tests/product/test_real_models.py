"""A pretrained language model, from its packages to the divergence of a cell: `make test-real`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from agreement import make_wave

from simulator.engine.compression import Compressor
from simulator.policies.language import parse_policy
from simulator.policies.shipped import ALIASES, SCORERS
from simulator.workers.cores import n_cores
from traces.check import check_trace
from traces.store import open_trace
from validate.levels.runs import _ForcedLayer, _TraceRun, baseline_of, run_forced, run_masked
from validate.models.fetch import fetch_model
from validate.models.load import load_model
from validate.problems.families import make_problem
from validate.problems.prompts import encode_prompt
from validate.record.decode import record_decode

pytestmark = pytest.mark.real

NAME = "smollm2-135m"
PROBLEMS = {
    "sum": "What is 12 + 30?",
    "robe": "A robe takes 2 bolts of blue and half that of white. How many?",
}
# Of a text of some 150 tokens; the others' own windows are longer.
PAPER = ("snapkv-paper", "criticalkv", "cakekv", "pyramidkv", "ada-snapkv")
SMALL = {
    "lagkv": "lag=8",
    # Without the largest ranges: in the first layer a word's values are those of the same word elsewhere, and
    # only rounding tells such ties apart.
    "vase": "window=8,large_share=0",
    "random-attention": "protect=sinks:4+recent:16",
    **dict.fromkeys((*PAPER, "headkv-snapkv"), "window=8"),
}
OTHERS = (
    "rkv+adakv",
    "rkv+utility",
    "rkv+pyramid",
    "rkv+cake:cake_window=8",
    "rkv+wave-dynamic",
    "rkv:trigger=segment",
)
POLICIES = "streamingllm,snapkv,rkv,pyramid-rkv,rkv+utility,h2o,tova,random"


@pytest.fixture(scope="module")
def loaded():
    """Give the model, fetched before the first run into the user's own cache."""
    fetch_model(NAME)
    torch.set_num_threads(n_cores())
    return load_model(NAME, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    rows = [json.dumps({"id": name, "problem": text}) for name, text in PROBLEMS.items()]
    (folder / "problems.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def recorded(loaded, folder, run_sim):
    out = folder / "alone"
    named = ["--model", NAME, "--prompts", folder / "problems.jsonl", "--max-new-tokens", 96, "--values"]
    code, _, said = run_sim("record", *named, "--out", out, "--batch", 1)
    assert code == 0, said
    return named, {name: open_trace(out / f"{name}.kvtrace") for name in PROBLEMS}


def test_it_writes_its_own_text_alone_and_in_a_batch(recorded, folder, run_sim):
    named, alone = recorded
    assert "12 + 30 = 32" in alone["sum"].text()  # it reasons badly, in fluent English
    assert run_sim("record", *named, "--out", folder / "together", "--batch", 2)[0] == 0
    for name, trace in alone.items():
        check_trace(trace)
        own = open_trace(folder / "together" / f"{name}.kvtrace")
        assert own.token_ids.tolist() == trace.token_ids.tolist()
        for layer in (0, 29):
            for part in ("queries", "keys", "values", "lse"):
                mine, theirs = (each.stored(layer, part)[:] for each in (own, trace))
                np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=2e-3)


def test_it_is_replayed(recorded, folder, run_sim):
    code, out, _ = run_sim(
        *("replay", "--trace", folder / "alone", "--policy", POLICIES, "--budget", "30%,60%"),
        *("--buffer", 8, "--format", "json"),
    )
    assert code == 0
    rows = json.loads(out)
    assert len(rows) == 2 * 8 * 2
    assert {row["error"] for row in rows} == {None}


def test_the_full_cache_does_not_diverge(recorded, loaded):
    _, traces = recorded
    for run in (run_masked, run_forced):
        found = run(loaded.model, traces["robe"], parse_policy("fullkv"), 10).divergence
        assert found.kl.max() < 1e-5
        assert not found.top_changed.any()


@pytest.fixture(scope="module")
def by_reasoner(tmp_path_factory):
    """Give the small reasoner and a text of its own."""
    loaded = load_model("reference", "float32", "cpu")
    prompt = encode_prompt(loaded.tokenizer, make_problem("walk", 9, 0, size=4, length=60).prompt)
    path = tmp_path_factory.mktemp("reasoner") / "walk.kvtrace"
    return loaded, record_decode(
        loaded.model, loaded.tokenizer, prompt, path, max_new_tokens=96, model_name=loaded.name
    )


@pytest.mark.parametrize("model", ["smollm2-135m", "reference"])
@pytest.mark.parametrize("name", [*SCORERS, *ALIASES, *OTHERS])
def test_a_forced_run_by_spans_is_one_token_by_token(
    name, model, loaded, recorded, by_reasoner, monkeypatch, tmp_path
):
    """Decisions are equal up to the first that is a near-tie: closer than rounding moves the scores."""
    own, trace = (loaded, recorded[1]["robe"]) if model == NAME else by_reasoner
    model = own.model
    baseline = baseline_of(model, trace)
    text = f"{name}:{SMALL[name]}" if name in SMALL else name
    if name == "headkv-snapkv":  # a table of every query head, as HeadKV's authors lay theirs out
        shape, draw = trace.shape, np.random.default_rng(5)
        heads = [f"{layer}-{head}" for layer in range(shape.n_layers) for head in range(shape.n_query_heads)]
        table = tmp_path / "heads.json"
        table.write_text(json.dumps({head: draw.uniform(size=3).tolist() for head in heads}))
        text += f",head_table={table}"
    waves = {trace.model: make_wave(trace, np.linspace(3, 1, trace.shape.n_layers))}
    run = _TraceRun(model, trace, parse_policy(text, buffer=8), 40, 1, waves)
    decisions, whole = [], Compressor.survivors

    def survivors(self, scores, positions):
        chosen = whole(self, scores, positions)
        for kv_head, (own, held, slots) in enumerate(zip(scores, positions, chosen, strict=True)):
            kept = held if slots is None else held[slots]
            at = self._n_tokens, self.layer, kv_head
            decisions[-1].append((at, kept.tolist(), dict(zip(held.tolist(), own.tolist(), strict=True))))
        return chosen

    monkeypatch.setattr(Compressor, "survivors", survivors)
    found = []
    for most in (1, 512):
        decisions.append([])
        found.append(run.feed(_ForcedLayer, most, baseline.predictions.compare)[1])
    one, many = (sorted(own, key=lambda decision: decision[0]) for own in decisions)
    # Words of the small reasoner end no sentence.
    assert len(one) > 90 or name == "fullkv" or (name == "rkv:trigger=segment" and own is not loaded)
    for (at, kept, scores), (same, mine, _) in zip(one, many, strict=True):
        assert same == at
        if mine != kept:
            (left,), (right,) = set(kept) - set(mine), set(mine) - set(kept)
            assert abs(scores[left] - scores[right]) < 1e-6
            return
    np.testing.assert_allclose(found[1].kl, found[0].kl, atol=1e-4, rtol=0)


HOSTILE = [
    {"id": "long", "prompt": "Repeat: " + " ".join(f"item {i}" for i in range(120))},
    {"id": "short", "prompt": "Hi"},
    {"id": "told", "prompt": "Who are you?", "system": "You are a pirate and speak like one."},
    {
        "id": "goes-on",
        "prompt": "Say yes.",
        "completion": "Yes.<|im_end|>\n<|im_start|>user\nAgain!<|im_end|>\n<|im_start|>assistant\nYes, yes.",
    },
    {"id": "tiny", "prompt": "Say no.", "completion": "No."},
]


@pytest.fixture(scope="module")
def hostile(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for name, chosen in (("decoded", HOSTILE[:3]), ("rescored", HOSTILE[3:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n")
    return folder


def test_prompts_of_very_different_lengths_are_decoded_together_as_alone(hostile, run_sim):
    named = ["--model", NAME, "--prompts", hostile / "decoded.jsonl", "--max-new-tokens", 24]
    for out, batch in (("alone", 1), ("together", 3)):
        code, _, said = run_sim("record", *named, "--out", hostile / out, "--batch", batch)
        assert code == 0, said
    for row in HOSTILE[:3]:
        one, other = (open_trace(hostile / out / f"{row['id']}.kvtrace") for out in ("alone", "together"))
        assert one.token_ids.tolist() == other.token_ids.tolist()
    assert "You are a pirate" in one.text()
    assert one.text().index("You are a pirate") < one.text().index("Who are you?")


@pytest.mark.parametrize("policy", ["rkv", "reasonalloc", "snapkv", "h2o", "tova"])
def test_levels_take_prompts_beyond_the_budget_and_texts_within_the_window(policy, hostile, loaded, run_sim):
    named = ["--model", NAME, "--prompts", hostile / "rescored.jsonl", "--rescore"]
    assert run_sim("record", *named, "--out", hostile / "rescored")[0] == 0
    assert (
        run_sim(
            "record",
            *named[:2],
            "--prompts",
            hostile / "decoded.jsonl",
            "--max-new-tokens",
            24,
            "--out",
            hostile / "alone",
        )[0]
        == 0
    )
    for trace in map(open_trace, sorted(hostile.glob("[ar]*/*.kvtrace"))):
        waves = {trace.model: make_wave(trace, np.linspace(3, 1, 30))}
        run = _TraceRun(loaded.model, trace, parse_policy(policy, buffer=4), 16, 1, waves)
        baseline = baseline_of(loaded.model, trace)
        forced = [run.feed(_ForcedLayer, most, baseline.predictions.compare)[1] for most in (1, 512)]
        np.testing.assert_allclose(forced[1].kl, forced[0].kl, atol=1e-4, rtol=0)
        masked = run_masked(loaded.model, trace, parse_policy(policy, buffer=4), 16, seed=1, waves=waves)
        assert np.isfinite(masked.divergence.kl).all()
        if trace.path.stem == "long":  # the prompt alone is far beyond the budget
            assert masked.divergence.kl[0] > 1e-3
        if trace.path.stem == "tiny":
            assert trace.total_tokens - trace.prompt_tokens < 8
    texts = {path.stem: open_trace(path).text() for path in hostile.glob("rescored/*.kvtrace")}
    assert texts["goes-on"].count("<|im_end|>") == 4  # system's, prompt's and two within the text
