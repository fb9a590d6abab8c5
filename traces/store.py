"""Finding traces on disk and opening them, refusing in words what is not one."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from traces.container import TAGS, TensorLayout, read_layout
from traces.errors import TraceError
from traces.manifest import DRAWS_NAME, MANIFEST_NAME, TOKENS_NAME, Manifest, read_manifest, sensitivity_dtype
from traces.remote import SUFFIX, fetch, find_remote, is_remote
from traces.trace import Trace
from traces.wording import near

_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors", ".gguf", ".ckpt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# The bundled trace goes by this name wherever a trace is asked for, unless something is so called.
SAMPLE_NAME = "sample"
SAMPLES = Path(__file__).parent / "samples"


def open_trace(path: str | Path) -> Trace:
    """Open a trace without reading its arrays.

    The manifest, the presence and size of every file, and the type and shape of every array are
    checked; checksums and numbers are left to `check_trace`.

    Parameters
    ----------
    path : str or Path
        The directory ``NAME.kvtrace``, or ``sample`` for the bundled trace.

    Raises
    ------
    TraceError
        If it is missing, unfinished, of an unknown version, truncated or corrupt.
    """
    path = Path(path)
    if str(path) == SAMPLE_NAME and not path.exists():
        (path,) = _traces_at(SAMPLES)
    try:
        if not path.exists():
            raise TraceError(f"{path}: not found; allowed: a directory NAME{SUFFIX}")
        if not path.is_dir():
            raise TraceError(f"{path}: {_what_else(path)}")
        if not (path / MANIFEST_NAME).is_file():
            raise TraceError(f"{path}: {_what_else(path)}")
        manifest = read_manifest(path / MANIFEST_NAME)
        layouts = {name: _read_checked_layout(path / name, manifest) for name in manifest.all_files}
    except (OSError, ValueError, RuntimeError) as error:
        # A name with a NUL byte is a ValueError, a name too long an OSError, links in a ring a RuntimeError.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise TraceError(f"{path}: cannot be opened: {reason}") from None
    return Trace(path, manifest, layouts)


def find_traces(patterns: Iterable[str | Path]) -> list[Path]:
    """Find the traces that paths, globs and directories of traces stand for.

    Parameters
    ----------
    patterns : iterable of str or Path
        A trace, a directory that holds ``*.kvtrace``, a glob (``**`` included) of either, or ``sample``.
        A URL of any of these is fetched to the cache first; see ``traces.remote``.

    Returns
    -------
    list of Path
        Sorted, each trace once.

    Raises
    ------
    TraceError
        If a pattern matches no trace.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    found: dict[str, Path] = {}
    for pattern in patterns:
        if is_remote(str(pattern)):
            matches = [fetch(url) for url in find_remote(str(pattern))]
        else:
            matches = [Path(pattern)] if os.path.exists(pattern) else _expand_glob(str(pattern))
        if str(pattern) == SAMPLE_NAME and not matches:
            matches = [SAMPLES]
        traces = [trace for match in matches for trace in _traces_at(match)]
        if not traces:
            raise TraceError(f"{pattern}: {_what_else(pattern)}")
        for trace in traces:
            found.setdefault(os.path.realpath(trace), trace)
    return sorted(found.values())


def _what_else(asked: str | Path) -> str:
    """Say what is found where a trace was asked for, and what is allowed."""
    path, allowed = Path(asked), f"allowed: a directory NAME{SUFFIX}, a folder of them, or a glob in quotes"
    recorded = "traces of a model are recorded by sim record --model"
    if path.is_dir():
        if (path / "config.json").is_file():
            return f"a model's folder; {allowed}; {recorded}"
        if path.suffix == SUFFIX:
            return f"no {MANIFEST_NAME} found; the recording is unfinished"
        names = sorted(os.listdir(path))
        return f"a folder without a trace ({f'it has {names[0]}' if names else 'it is empty'}); {allowed}"
    if path.exists():
        hint = f"; {recorded}" if path.suffix in _WEIGHTS else ""
        return f"a file, not a directory; {allowed}{hint}"
    if glob.has_magic(str(asked)):
        return f"matches no trace; {allowed}"
    if _HUB_ID.fullmatch(str(asked)) and not path.parent.exists():
        return f"not found; if it is a model of a hub, {recorded}; {allowed}"
    names = [SAMPLE_NAME, *(other.name for other in path.parent.glob(f"*{SUFFIX}"))]
    return f"not found{near(path.name, names) or ';'} {allowed}"


def _expand_glob(pattern: str) -> list[Path]:
    return [Path(match) for match in glob.glob(pattern, recursive=True)]


def _traces_at(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    if path.suffix == SUFFIX or (path / MANIFEST_NAME).is_file():
        return [path]
    return [inner for inner in path.glob(f"*{SUFFIX}") if inner.is_dir()]


def _read_checked_layout(path: Path, manifest: Manifest) -> Mapping[str, TensorLayout]:
    if not path.is_file():
        raise TraceError(f"{path}: missing; the manifest names it")
    size, expected_size = path.stat().st_size, manifest.all_files[path.name]["size"]
    if size != expected_size:
        raise TraceError(f"{path}: {size} bytes found; the manifest says {expected_size}")
    layout = read_layout(path)
    expected = expected_tensors(path.name, manifest)
    if set(layout) != set(expected):
        names = ", ".join(ascii(name)[1:-1][:40] for name in sorted(layout)[:8])
        raise TraceError(f"{path}: arrays {names} found; allowed: {', '.join(expected)}")
    for name, (tag, shape) in expected.items():
        tensor = layout[name]
        if (tensor.tag, tensor.shape) != (tag, shape):
            raise TraceError(
                f"{path}: {name} is {tensor.tag} {tensor.shape}; the manifest says {tag} {shape}"
            )
    return layout


def expected_tensors(file_name: str, manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and shape of each array that a file has to hold."""
    n_tokens, head_dim = manifest.total_tokens, manifest.head_dim
    if file_name == TOKENS_NAME:
        return {"token_ids": (TAGS["int32"], (n_tokens,))}
    if manifest.sensitivity is not None and file_name in manifest.sensitivity["files"]:
        n_steps = n_tokens - manifest.prompt_tokens
        n_draws = manifest.n_draws
        if file_name == DRAWS_NAME:
            return {"log_weights": (TAGS["float32"], (n_draws, n_steps))}
        shape = n_draws, manifest.n_query_heads, n_steps, head_dim
        return {"sensitivity": (TAGS[sensitivity_dtype(manifest.dtype)], shape)}
    tag = TAGS[manifest.dtype]
    expected = {
        "lse": (TAGS["float32"], (manifest.n_query_heads, n_tokens)),
        "queries": (tag, (manifest.n_query_heads, n_tokens, head_dim)),
        "keys": (tag, (manifest.n_kv_heads, n_tokens, head_dim)),
    }
    if manifest.has_values:
        expected["values"] = (tag, (manifest.n_kv_heads, n_tokens, head_dim))
    return expected
