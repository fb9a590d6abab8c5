"""A synthetic trace has the attention it claims, by float64 attention over the whole T x T map."""

import tracemalloc

import naive_traces as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import ModelShape, Recipe, check_trace, make_synthetic
from traces.planting import concentration, draw_planting

# Shares are exact but for the rounding of one query coordinate.
SHARE_TOLERANCE = {"float16": 0.01, "bfloat16": 0.05, "float32": 1e-4}
PROMPT, TOTAL = 150, 600


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def made(request, tmp_path_factory):
    """Return a trace, its truth and its dense attention by layer."""
    path = tmp_path_factory.mktemp("made") / "t.kvtrace"
    shape = ModelShape(2, 4, 2, 64, request.param)
    trace = make_synthetic(
        path, shape=shape, prompt_tokens=PROMPT, total_tokens=TOTAL, seed=11, with_values=True
    )
    return trace, trace.manifest.task["truth"], [naive.dense_attention(trace, i) for i in (0, 1)]


def each_head(trace):
    """Yield (layer, query head, KV head)."""
    for layer in range(trace.shape.n_layers):
        for head in range(trace.shape.n_query_heads):
            yield layer, head, head // trace.shape.group_size


def speaks(truth, layer, kv_head):
    """Return at which tokens the needle has the floor in a KV head, bool (total_tokens,)."""
    tokens = np.arange(TOTAL)
    first, stop = truth["needle"]["steps"]
    return (first <= tokens) & (tokens < stop) & ([layer, kv_head] in truth["needle"]["heads"])


def test_it_is_a_valid_trace_with_its_own_lse(made):
    trace, _, dense = made
    check_trace(trace, samples=200)
    for layer, (_, lse) in enumerate(dense):
        np.testing.assert_allclose(trace.lse(layer), lse, rtol=1e-5, atol=1e-5)


def test_sinks_and_hitters_receive_their_share_in_every_head_at_every_step(made):
    trace, truth, dense = made
    recipe = Recipe()
    tolerance = SHARE_TOLERANCE[trace.shape.dtype]
    assert truth["sinks"] == [0, 1, 2, 3]
    for layer, head, kv_head in each_head(trace):
        weights = dense[layer][0][head]
        left = np.where(speaks(truth, layer, kv_head), 1 - recipe.needle_share, 1.0)
        hitters = truth["hitters"][layer][kv_head]
        assert len(hitters) == 3
        assert max(hitters) < PROMPT
        for positions, share in [(truth["sinks"], 0.3), (hitters, 0.2)]:
            mass = weights[:, positions].sum(axis=1)
            expected = share * left
            decode = slice(PROMPT, None)
            np.testing.assert_allclose(mass[decode], expected[decode], rtol=tolerance)


def test_the_needle_is_everything_in_its_range_and_nothing_outside(made):
    trace, truth, dense = made
    needle = truth["needle"]
    first, stop = needle["steps"]
    assert needle["position"] < PROMPT < first < stop < TOTAL
    assert len(needle["heads"]) == 2
    for layer, head, kv_head in each_head(trace):
        mass = dense[layer][0][head][:, needle["position"]]
        if [layer, kv_head] not in needle["heads"]:
            assert mass[first:stop].max() < 0.1
            continue
        tolerance = SHARE_TOLERANCE[trace.shape.dtype]
        np.testing.assert_allclose(mass[first:stop], 0.9, rtol=tolerance)
        assert mass[:first].max() < 1e-5
        assert mass[stop:].max() < 1e-5


def test_recent_entries_outweigh_older_ones(made):
    trace, truth, dense = made
    planted = {*truth["sinks"], truth["needle"]["position"]}
    for layer, head, kv_head in each_head(trace):
        weights = dense[layer][0][head].copy()
        weights[:, sorted(planted | set(truth["hitters"][layer][kv_head]))] = 0
        weights[speaks(truth, layer, kv_head)] = 0
        by_distance = [
            np.mean([np.diagonal(weights, -d)[PROMPT:].mean() for d in range(*span)])
            for span in [(0, 4), (4, 16), (16, 64), (64, 256)]
        ]
        assert by_distance[0] > 2 * by_distance[1] > 4 * by_distance[2]
        assert by_distance[2] > by_distance[3]


def test_duplicates_have_the_same_key_and_others_do_not(made):
    trace, truth, _ = made
    for layer in range(2):
        for kv_head in range(2):
            keys = trace.stored(layer, "keys")[kv_head]
            same = [
                [earlier, later]
                for later in range(TOTAL)
                for earlier in range(later)
                if keys[earlier, 10] == keys[later, 10] and (keys[earlier] == keys[later]).all()
            ]
            assert sorted(truth["duplicates"][layer][kv_head]) == sorted(same)
            assert len(same) == 2


def test_heads_are_broad_and_concentrated_in_turn(tmp_path):
    recipe = Recipe(sinks=0, hitters=0, needle_heads=0, duplicates=0, drift=0.8)
    trace = make_synthetic(
        tmp_path / "t.kvtrace", shape=ModelShape(1, 4, 4, 64), prompt_tokens=50,
        total_tokens=900, seed=2, recipe=recipe,
    )  # fmt: skip
    weights, _ = naive.dense_attention(trace, 0)
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    breadth = np.exp(-(weights * logarithms).sum(axis=2))  # effective number of entries
    tokens = np.arange(900)
    share = breadth / (tokens + 1)
    for head, phase in enumerate(trace.manifest.task["truth"]["phases"][0]):
        strength = concentration(recipe, phase, tokens, 900)
        assert strength.min() < 0.21
        assert strength.max() > 1.79
        late = tokens >= 200
        broad, sharp = late & (strength < 0.6), late & (strength > 1.4)
        if broad.any() and sharp.any():
            assert share[head, broad].min() > 3 * share[head, sharp].mean()
    leader = share[:, 200:].argmax(axis=0)
    assert len(set(leader.tolist())) > 1


@pytest.mark.parametrize(
    ("absent", "key"),
    [({"sinks": 0}, "sinks"), ({"needle_heads": 0}, "needle"), ({"hitters": 0}, "hitters"),
     ({"duplicates": 0}, "duplicates")],
)  # fmt: skip
def test_each_ingredient_can_be_left_out(tmp_path, absent, key):
    trace = make_synthetic(
        tmp_path / "t.kvtrace", shape=ModelShape(1, 2, 1, 16), prompt_tokens=40,
        total_tokens=120, seed=0, recipe=Recipe(**absent),
    )  # fmt: skip
    truth = trace.manifest.task["truth"]
    assert truth[key] in ([], None, [[[]]])
    assert all(truth[other] for other in {"sinks", "needle", "hitters", "duplicates"} - {key})
    check_trace(trace)


def test_without_recency_and_noise_attention_is_uniform(tmp_path):
    recipe = Recipe(sinks=0, hitters=0, needle_heads=0, recency=0, noise=0)
    trace = make_synthetic(
        tmp_path / "t.kvtrace", shape=ModelShape(1, 2, 1, 16), prompt_tokens=4,
        total_tokens=60, seed=0, recipe=recipe,
    )  # fmt: skip
    weights, lse = naive.dense_attention(trace, 0)
    np.testing.assert_allclose(weights[:, 59], 1 / 60)
    np.testing.assert_allclose(lse, np.broadcast_to(np.log(np.arange(1, 61)), (2, 60)))


def test_the_seed_decides_the_trace(tmp_path):
    def made_id(name, seed, **options):
        return make_synthetic(
            tmp_path / f"{name}.kvtrace", shape=ModelShape(2, 4, 2, 16, "bfloat16"),
            prompt_tokens=20, total_tokens=700, seed=seed, **options,
        ).trace_id  # fmt: skip

    first = made_id("a", 5)
    assert made_id("b", 5) == first
    assert len({first, made_id("c", 6), made_id("d", 5, recipe=Recipe(noise=0.4))}) == 3


@pytest.mark.slow
@given(
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    n_layers=st.integers(1, 2),
    n_kv_heads=st.integers(1, 2),
    group_size=st.integers(1, 2),
    head_dim=st.integers(8, 20),
    prompt_tokens=st.integers(1, 20),
    decoded=st.integers(0, 20),
    seed=st.integers(0, 2**63 - 1),
    recipe=st.builds(
        Recipe,
        sinks=st.integers(0, 6),
        hitters=st.integers(0, 4),
        needle_heads=st.integers(0, 5),
        duplicates=st.integers(0, 4),
        sink_share=st.floats(0.01, 0.49),
        hitter_share=st.floats(0.01, 0.49),
        needle_share=st.floats(0.01, 0.99),
        recency=st.floats(0, 2),
        horizon=st.floats(1, 100),
        drift=st.floats(0, 1),
        noise=st.floats(0, 4),
    ),
)
@settings(max_examples=60, deadline=None)
def test_any_small_trace_is_valid_and_keeps_its_shares(
    tmp_path_factory, dtype, n_layers, n_kv_heads, group_size, head_dim, prompt_tokens, decoded,
    seed, recipe,
):  # fmt: skip
    shape = ModelShape(n_layers, n_kv_heads * group_size, n_kv_heads, head_dim, dtype)
    trace = make_synthetic(
        tmp_path_factory.mktemp("any") / "t.kvtrace",
        shape=shape,
        prompt_tokens=prompt_tokens,
        total_tokens=prompt_tokens + decoded,
        seed=seed,
        recipe=recipe,
    )
    check_trace(trace, samples=20)
    # Coordinates stay where 16 bits are precise, also where nothing but planted positions exists.
    assert max(np.abs(trace.queries(layer)).max() for layer in range(n_layers)) < 300
    truth = trace.manifest.task["truth"]
    needle, sinks = truth["needle"], truth["sinks"]
    if needle is None:
        return
    for layer, kv_head in needle["heads"]:
        weights, _ = naive.dense_attention(trace, layer)
        heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
        planted = {needle["position"], *sinks, *truth["hitters"][layer][kv_head]}
        for token in range(*needle["steps"]):
            if planted >= set(range(token + 1)):
                continue  # nothing ordinary is there to take what the plan leaves
            mass = weights[heads, token, needle["position"]]
            np.testing.assert_allclose(mass, recipe.needle_share, rtol=0.2)


@pytest.mark.slow
def test_memory_is_bounded_by_the_keys_of_a_layer(tmp_path):
    def peak(n_layers):
        tracemalloc.start()
        make_synthetic(
            tmp_path / f"{n_layers}.kvtrace", shape=ModelShape(n_layers, 4, 4, 128),
            prompt_tokens=10, total_tokens=1536, seed=0,
        )  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    one_layer_stored = 2 * 4 * 1536 * 128 * 2
    assert peak(3) < peak(1) + one_layer_stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sinks": -1}, "sinks is -1; allowed: an integer, 0 up"),
        ({"hitters": 1.5}, "hitters is 1.5"),
        ({"sink_share": 0.0}, "sink_share is 0.0; allowed: between 0 and 1"),
        ({"needle_share": 1.0}, "needle_share is 1.0"),
        ({"sink_share": 0.5, "hitter_share": 0.5}, r"sink_share \+ hitter_share is 1.0"),
        ({"needle_start": 0.9}, "needle_start and needle_stop are 0.9 and 0.85"),
        ({"drift": 1.5}, "drift is 1.5; allowed: 0 to 1.0"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"horizon": 0.5}, "horizon is 0.5"),
    ],
)
def test_recipe_refuses_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_planting_keeps_kinds_apart_and_the_needle_in_the_decode():
    shape = ModelShape(2, 4, 4, 8)
    for seed in range(30):
        planting = draw_planting(np.random.default_rng(seed), Recipe(), shape, 12, 40)
        assert planting.needle is not None
        assert 12 <= planting.needle.steps[0] < planting.needle.steps[1] <= 40
        for layer in range(2):
            for head in planting.of_layer(layer):
                special = [*planting.sinks, *head.hitters, planting.needle.position]
                paired = [position for pair in head.duplicates for position in pair]
                assert len({*special, *paired}) == len(special) + len(paired) == 8 + 4
