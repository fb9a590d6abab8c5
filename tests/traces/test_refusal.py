"""What is no trace is refused when it is opened, in one line that names the file and the value."""

import json

import naive_traces as naive
import pytest

from traces import TraceError, open_trace


@pytest.fixture
def path(tmp_path):
    """Return the path of a trace of 5 tokens, to be damaged."""
    return naive.small_trace(tmp_path / "t.kvtrace", n_tokens=5, prompt_tokens=3).path


def nested(levels):
    """Return a value so many objects deep."""
    value = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def set_fields(path, **fields):
    """Change fields of the manifest; an ellipsis removes one."""
    manifest = json.loads((path / "manifest.json").read_text()) | fields
    kept = {name: value for name, value in manifest.items() if value is not ...}
    (path / "manifest.json").write_text(json.dumps(kept))


def refusal(path):
    """Return the message with which a trace is refused."""
    with pytest.raises(TraceError) as error:
        open_trace(path)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_what_is_no_trace_is_refused(tmp_path, path):
    assert "not found" in refusal(tmp_path / "nothing.kvtrace")
    assert "File name too long" in refusal(tmp_path / ("long" * 100))
    file = tmp_path / "file.kvtrace"
    file.write_text("{}")
    assert "not a directory" in refusal(file)
    with pytest.raises(TraceError, match="not found"):
        open_trace("a\0b")
    (path / "manifest.json").unlink()
    assert "no manifest.json found; the recording is unfinished" in refusal(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "gguf"}, "format 'gguf' found; allowed: 'kvtrace'"),
        ({"format": ...}, "format None found"),
        ({"version": 2}, "version 2 found, this build reads 1"),
        ({"version": True}, "version True found, this build reads 1"),
        ({"version": "1"}, "version '1' found, this build reads 1"),
        ({"rope": ...}, "field 'rope' is missing"),
        ({"model": 3}, "model is 3; allowed: str"),
        ({"seed": "x"}, "seed is 'x'; allowed: int | null"),
        ({"has_values": 1}, "has_values is 1; allowed: bool"),
        ({"n_layers": True}, "n_layers is True; allowed: int"),
        ({"n_layers": 2.0}, "n_layers is 2.0; allowed: int"),
        ({"n_layers": 0}, "n_layers is 0; allowed: an integer of at least 1"),
        ({"n_layers": 3}, "files lists 3 files; allowed: 4"),
        ({"n_layers": 10**4000}, "4001 digits found; allowed: 64 bits"),
        ({"head_dim": -8}, "head_dim is -8"),
        ({"head_dim": 10**18}, "the manifest says F16"),
        ({"head_dim": 4}, "the manifest says F16 (4, 5, 4)"),
        ({"n_query_heads": 5}, "n_query_heads is 5; allowed: a multiple of n_kv_heads (2)"),
        ({"n_kv_heads": 1}, "keys is F16 (2, 5, 8); the manifest says F16 (1, 5, 8)"),
        ({"dtype": "int4"}, "dtype is 'int4'; allowed: float16, bfloat16, float32"),
        ({"dtype": "bfloat16"}, "queries is F16 (4, 5, 8); the manifest says BF16"),
        ({"scale": 0}, "scale is 0; allowed: float > 0.0"),
        ({"scale": -0.5}, "scale is -0.5"),
        ({"scale": float("nan")}, "nan found; allowed: finite"),
        ({"scale": float("inf")}, "inf found; allowed: finite"),
        ({"scale": 10**400}, "401 digits found"),
        ({"scale": "1"}, "scale is '1'; allowed: float"),
        ({"origin": "guessed"}, "origin: Invalid enum value 'guessed'"),
        ({"prompt_tokens": 6}, "prompt_tokens is 6; allowed: 1 to total_tokens (5)"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"total_tokens": 0}, "total_tokens is 0"),
        ({"total_tokens": 6}, "the manifest says I32 (6,)"),
        ({"vocabulary": {"a": "b"}}, "a key of vocabulary is a str; allowed: int"),
        ({"vocabulary": {"1": 2}}, "vocabulary[...] is a int; allowed: str"),
        ({"has_values": False}, "arrays keys, lse, queries, values found; allowed: lse, queries"),
        ({"files": {}}, "files lists 0 files; allowed: 3"),
        (
            {"files": {name: {"size": 1, "sha256": "0" * 64} for name in "abc"}},
            "files lacks 'tokens.safetensors'",
        ),
        ({"trace_id": "0" * 64}, f"trace_id is {'0' * 64}; the content gives"),
        ({"trace_id": "nan"}, "trace_id is 'nan'"),
        ({"task": {"family": ["a"]}}, "task.family is ['a']; allowed: text"),
        ({"task": {"family": 10**18}}, "task.family is 1000000000000000000; allowed: text"),
        ({"task": {"deep": nested(900)}}, "levels of nesting"),
        ({"sampling": nested(900)}, "levels of nesting"),
        ({"rope": {"rope_theta": -1.0}}, "rope.rope_theta is -1.0; allowed: a number above 0"),
        ({"rope": {"rope_theta": "1e4"}}, "rope.rope_theta is '1e4'"),
        ({"rope": {"rope_type": 3}}, "rope.rope_type is 3; allowed: text"),
        ({"rope": {"partial_rotary_factor": 1.5}}, "rope.partial_rotary_factor is 1.5"),
        ({"rope": {"factor": True}}, "rope.factor is True"),
        ({"minor": 0}, "manifest_sha256 is there at version 1.0"),
        ({"minor": -1}, "minor is -1"),
        ({"extra": "\ud800"}, "lone surrogate"),
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_manifest_that_cannot_be_is_refused(path, fields, message, sealed):
    set_fields(path, **fields)
    if not sealed:
        refusal(path)
        return
    # With the digests of the changed content, the reason has to be the field itself.
    manifest = json.loads((path / "manifest.json").read_text())
    if "trace_id" not in fields:
        manifest["trace_id"] = naive.naive_content_id(manifest)
    (path / "manifest.json").write_text(json.dumps(naive.signed(manifest)))
    assert message in refusal(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "another"},
        {"model_revision": "x"},
        {"rope": {"rope_theta": 2.0}},
        {"vocabulary": {"1": "b"}},
        {"task": {"id": "x"}},
        {"sampling": {"temperature": 1.0}},
        {"seed": 7},
        {"origin": "decoded"},
        {"writer": {}},
        {"extra": 1},
        {"manifest_sha256": ...},
        {"minor": ...},
        {"minor": 3},
    ],
)
def test_no_field_can_be_changed_without_notice(path, fields):
    set_fields(path, **fields)
    assert "manifest_sha256 is" in refusal(path)


def test_a_name_twice_in_an_object_is_refused(path):
    text = (path / "manifest.json").read_text()
    for name in ("model", "size"):
        place = text.index(f'"{name}":')
        (path / "manifest.json").write_text(f'{text[:place]}"{name}": 3, {text[place:]}')
        assert f"'{name}' stands twice" in refusal(path)


def test_a_manifest_of_before_is_read_and_said_to_be_unverified(path, run_sim):
    assert "manifest agrees with its digest" in run_sim("trace", "validate", path)[1]
    set_fields(path, minor=..., manifest_sha256=..., model="renamed")
    assert open_trace(path).model == "renamed"
    assert (
        "manifest has no digest: model, RoPE, task and vocabulary cannot be verified"
        in (run_sim("trace", "validate", path)[1])
    )
    # What its identity covers is verified as before.
    set_fields(path, scale=3.0)
    assert "the content gives" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": "kvtrace"}', b"9" * 5000],
)
def test_a_manifest_that_is_no_json_object_is_refused(path, content):
    (path / "manifest.json").write_bytes(content)
    message = refusal(path)
    assert "manifest.json" in message
    assert len(message) < len(str(path)) + 120


def test_missing_and_truncated_files_are_refused(path):
    file = path / "layer_001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"{len(content) - 1} bytes found; the manifest says {len(content)}" in refusal(path)
    file.write_bytes(b"")
    assert "0 bytes found" in refusal(path)
    file.unlink()
    assert "layer_001.safetensors: missing" in refusal(path)
    file.mkdir()
    assert "layer_001.safetensors: missing" in refusal(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "header: not valid JSON"),
        (b"[1]     ", "header: the whole is [1]"),
        (b'{"a":1}', "entry of 'a' is damaged"),
        (b'{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}', "dtype 'I64'; allowed"),
        (b'{"a":{"dtype":"I32","shape":[-5],"data_offsets":[0,20]}}', "is damaged"),
        (b'{"a":{"dtype":"I32","shape":[5],"data_offsets":[0,16]}}', "is damaged"),
        (b'{"a":{"dtype":"I32","shape":[5],"data_offsets":[20,0]}}', "is damaged"),
        (b'{"a":{"dtype":"I32","shape":[5],"data_offsets":[0]}}', "is damaged"),
        (b'{"a":{"dtype":"I32","shape":[true],"data_offsets":[0,4]}}', "is damaged"),
        (b'{"a":{"dtype":"I32","shape":[4],"data_offsets":[4,20]}}', "gap or overlap"),
        (b'{"a":{"dtype":"I32","shape":[4],"data_offsets":[0,16]}}', "arrays end at byte"),
        (b'{"a":{"dtype":"I32","shape":[5],"data_offsets":[0,20]}}', "arrays a found; allowed"),
        (b'{"token_ids":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}', "is F32 (5,)"),
        (b'{"token_ids":{"dtype":"I32","shape":[5,1],"data_offsets":[0,20]}}', "is I32 (5, 1)"),
    ],
)
def test_a_damaged_safetensors_header_is_refused(path, header, message):
    data = (path / "tokens.safetensors").read_bytes()[-20:]
    content = len(header).to_bytes(8, "little") + header + data
    (path / "tokens.safetensors").write_bytes(content)
    naive.reseal(path)
    assert message in refusal(path)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63])
def test_a_wrong_header_length_is_refused(path, length):
    file = path / "layer_000.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    naive.reseal(path)
    assert f"header length {length} found" in refusal(path)
