"""Traces at a URL: found, fetched once, checked, and refused in one line."""

from __future__ import annotations

import sys
from itertools import count

import pytest
from sweeps import table_of, write_spec

from traces import remote
from traces.cache import cache_folder
from traces.errors import TraceError, UserError
from traces.remote import fetch, find_remote, is_remote
from traces.store import find_traces, open_trace

fsspec = pytest.importorskip("fsspec")
_serial = count()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def place():
    """Give a folder in fsspec's memory."""
    files, name = fsspec.filesystem("memory"), f"/bucket-{next(_serial)}"
    files.mkdirs(name)
    yield f"memory:/{name}"
    files.rm(name, recursive=True)


def upload(trace, place, name=None):
    files = fsspec.filesystem("memory")
    url = f"{place}/{name or trace.path.name}"
    for path in trace.path.iterdir():
        files.pipe(f"{url}/{path.name}".removeprefix("memory:/"), path.read_bytes())
    return url


def count_reads(monkeypatch):
    """Record the name of every file that is read from its place."""
    read, plain = [], remote._chunks
    monkeypatch.setattr(remote, "_chunks", lambda url: read.append(url.rpartition("/")[2]) or plain(url))
    return read


def test_what_is_a_url():
    assert all(map(is_remote, ("s3://b/x.kvtrace", "memory://x", "HTTPS://a/b", "file:///x")))
    assert not any(map(is_remote, ("sample", "a/b.kvtrace", "C:\\x", "/x://y", "")))


def test_the_cache_lies_where_it_is_wanted(monkeypatch, tmp_path):
    assert cache_folder("traces") == tmp_path / "cache" / "traces"
    monkeypatch.delenv("KVBUDGET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("traces") == tmp_path / "xdg" / "kvbudget" / "traces"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("traces") == tmp_path / ".cache" / "kvbudget" / "traces"


def test_a_trace_is_fetched_whole_and_once(make_trace, place, monkeypatch):
    trace = make_trace()
    url = upload(trace, place)
    read = count_reads(monkeypatch)
    path = fetch(url)
    assert path == cache_folder("traces") / trace.trace_id / trace.path.name
    assert open_trace(path).manifest == trace.manifest
    for file in trace.path.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()
    assert len(read) == 4
    assert fetch(url) == path
    assert read[4:] == ["manifest.json"]
    assert not list(path.glob(".*"))


def test_what_is_damaged_or_missing_in_the_cache_is_fetched_again(make_trace, place, monkeypatch):
    trace = make_trace()
    url = upload(trace, place)
    path = fetch(url)
    (path / "layer_000.safetensors").write_bytes(b"damaged")
    (path / "tokens.safetensors").unlink()
    read = count_reads(monkeypatch)
    fetch(url)
    assert sorted(read) == ["layer_000.safetensors", "manifest.json", "tokens.safetensors"]
    assert (path / "layer_000.safetensors").read_bytes() == (
        trace.path / "layer_000.safetensors"
    ).read_bytes()


def test_a_file_that_is_not_what_the_manifest_says_is_refused(make_trace, place):
    url = upload(make_trace(), place)
    fsspec.filesystem("memory").pipe(f"{url}/layer_001.safetensors".removeprefix("memory:/"), b"other")
    with pytest.raises(TraceError, match=r"layer_001\.safetensors: sha256 \w+ found; the manifest says"):
        fetch(url)
    (folder,) = next(cache_folder("traces").iterdir()).glob("*.kvtrace")
    # What was whole stays; without a manifest the trace is unfinished.
    assert sorted(path.name for path in folder.iterdir()) == ["layer_000.safetensors", "tokens.safetensors"]


def test_folders_and_globs_are_listed(make_trace, place):
    urls = [upload(make_trace(), place, name) for name in ("a1.kvtrace", "a2.kvtrace", "b.kvtrace")]
    fsspec.filesystem("memory").pipe(f"{place}/notes.txt".removeprefix("memory:/"), b"x")
    # fsspec writes one slash more in front of what is in its memory.
    found = [[url.replace(":///", "://") for url in find_remote(f"{place}/{tail}")] for tail in ("", "a*")]
    assert found == [urls, urls[:2]]
    assert find_remote(urls[2]) == urls[2:]
    with pytest.raises(TraceError, match=r"no trace found; allowed: a URL or glob"):
        find_remote(f"{place}/c*")


def test_files_by_url_and_the_other_verbs(make_trace, run_sim):
    trace = make_trace()
    url = f"file://{trace.path}"
    assert [path.name for path in find_traces([url])] == [trace.path.name]
    assert find_traces([f"file://{trace.path.parent}"]) == find_traces([url])
    code, out, _ = run_sim("replay", "--trace", url, "--policy", "rkv:buffer=5", "--budget", 12)
    assert code == 0
    assert trace.path.name in out


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("memory://nowhere/x.kvtrace", TraceError, "nowhere/x.kvtrace/manifest.json: not found; allowed:"),
        ("nonsense://a/x.kvtrace", TraceError, "cannot be read: ValueError: Protocol not known: nonsense"),
        ("memory://nowhere-at-all", TraceError, "memory://nowhere-at-all: no trace found"),
    ],
)
def test_what_is_not_there_is_one_line(url, kind, message):
    with pytest.raises(kind) as raised:
        find_traces([url])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_fsspec_is_said_with_the_remedy(monkeypatch, run_sim):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"needs fsspec, .* pip install 'kvbudget\[remote\]'"):
        find_traces(["memory://x/y.kvtrace"])
    code, _, err = run_sim("replay", "--trace", "memory://x/y.kvtrace")
    assert (code, err.count("\n")) == (2, 1)


def test_a_sweep_of_urls_is_that_of_their_files(make_trace, place, tmp_path, run_sim):
    traces = [make_trace(), make_trace()]
    urls = [upload(trace, place) for trace in traces]
    common = {"policies": ["rkv:buffer=5", "fullkv"], "budgets": [12, 14]}
    by_url = write_spec(tmp_path, traces=[place], **common)
    assert run_sim("sweep", by_url, "--jobs", 1)[0] == 0
    by_path = write_spec(tmp_path, traces=[str(trace.path) for trace in traces], **common)
    assert run_sim("sweep", by_path, "--jobs", 1, "--out", tmp_path / "local")[0] == 0
    assert table_of(tmp_path / "out").equals(table_of(tmp_path / "local"))
    # One that is missing is a failure of its own cells.
    both = write_spec(tmp_path, traces=[f"{place}/gone.kvtrace", urls[0]], **common)
    code, _, err = run_sim("sweep", both, "--jobs", 1)
    assert code == 1
    assert "8 cells: 4 done before, 4 replayed" in err
    assert "gone.kvtrace/manifest.json: not found" in err
