"""Whatever the bytes of a trace: it is right, or it is refused in one line."""

import contextlib
import json
import shutil

import naive_traces as naive
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces import ModelShape, TraceError, check_trace, make_synthetic, open_trace

FILES = (
    "manifest.json",
    "tokens.safetensors",
    "layer_000.safetensors",
    "layer_001.safetensors",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Return a tiny trace that nobody changes."""
    path = tmp_path_factory.mktemp("good") / "t.kvtrace"
    return naive.small_trace(path, n_tokens=5, prompt_tokens=3, vocabulary={0: "a", 4: "b"})


mutations = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 400)),
    st.tuples(st.just("truncate"), st.floats(0, 1), st.none()),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("replace"), st.none(), st.binary(max_size=200)),
)


def mutate(content, mutation):
    """Return changed bytes."""
    kind, place, detail = mutation
    at = int((place or 0) * max(0, len(content) - 1))
    if kind == "flip":
        flipped = bytearray(content)
        if flipped:
            flipped[at] ^= detail
        return bytes(flipped)
    return {
        "cut": content[:at] + content[at + (detail if kind == "cut" else 0) :],
        "truncate": content[:at],
        "insert": content[:at] + (detail if kind == "insert" else b"") + content[at:],
        "replace": detail,
    }[kind]


def outcome(path):
    """Open a trace, read all it offers and check it; any other error than a refusal escapes."""
    try:
        trace = open_trace(path)
        for layer in range(trace.shape.n_layers):
            for read in (trace.queries, trace.keys, trace.lse):
                read(layer)
        trace.text()
        check_trace(trace)
    except TraceError as error:
        return "refused" if "\n" not in str(error) else "refused in several lines"
    return "accepted"


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True])
def test_changed_bytes_are_refused_in_words(good, tmp_path, sealed):
    path = tmp_path / "t.kvtrace"
    shutil.copytree(good.path, path)
    original = {name: (path / name).read_bytes() for name in FILES}

    @given(name=st.sampled_from(FILES), mutation=mutations)
    @settings(max_examples=200, deadline=None)
    def check(name, mutation):
        changed = mutate(original[name], mutation)
        (path / name).write_bytes(changed)
        if sealed and name != "manifest.json":
            naive.reseal(path)
        result = outcome(path)
        for damaged in {name, "manifest.json"}:
            (path / damaged).write_bytes(original[damaged])
        if result == "refused":
            return
        assert result == "accepted"
        if name == "manifest.json":
            content, before = json.loads(changed), json.loads(original[name])
            assert naive.naive_content_id(content) == naive.naive_content_id(before)
        else:
            assert sealed or changed == original[name]

    check()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(data=st.data(), value=anything, sealed=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_any_field_is_refused_in_words_or_harmless(good, tmp_path, data, value, sealed):
    path = tmp_path / "t.kvtrace"
    if not path.exists():
        shutil.copytree(good.path, path)
    manifest = json.loads((good.path / "manifest.json").read_text())
    place = manifest
    name = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[name], dict) and place[name] and data.draw(st.booleans()):
        place = place[name]
        name = data.draw(st.sampled_from(sorted(place)))
    place[name] = value
    if sealed:
        with contextlib.suppress(TypeError, AttributeError, KeyError):
            manifest["trace_id"] = naive.naive_content_id(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert outcome(path) in ("refused", "accepted")


def test_every_single_bit_of_the_content_counts(tmp_path):
    shape = ModelShape(1, 1, 1, 8)
    trace = make_synthetic(tmp_path / "t.kvtrace", shape=shape, prompt_tokens=1, total_tokens=2, seed=0)
    for name in ("tokens.safetensors", "layer_000.safetensors"):
        content = (trace.path / name).read_bytes()
        for at in range(len(content)):
            (trace.path / name).write_bytes(
                content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
            )
            with pytest.raises(TraceError):
                check_trace(open_trace(trace.path))
        (trace.path / name).write_bytes(content)
    check_trace(open_trace(trace.path))
