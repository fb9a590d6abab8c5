"""Traces at a URL: found through fsspec, and kept in a local cache under their checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from traces.atomic import write_file
from traces.cache import cache_folder
from traces.errors import TraceError, UserError
from traces.extras import require_extra
from traces.lock import locked
from traces.manifest import MANIFEST_NAME, Manifest, parse_manifest

SUFFIX = ".kvtrace"
_CHUNK_BYTES = 4 * 2**20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(text: str) -> bool:
    """Say whether a trace is asked for by URL."""
    return _SCHEME.match(text) is not None


def find_remote(url: str) -> list[str]:
    """List the URLs of traces that a URL stands for.

    Parameters
    ----------
    url : str
        ``scheme://.../NAME.kvtrace``, which is not looked for yet; else a folder of traces, or a glob.

    Raises
    ------
    TraceError
        If there is none, or the place cannot be listed.
    UserError
        If fsspec, or what it needs for the scheme, is not installed.
    """
    url = url.rstrip("/")
    is_glob = any(sign in url for sign in "*?[")
    if url.endswith(SUFFIX) and not is_glob:
        return [url]
    with _told(url):
        files, path = _opened(url)
        found = files.glob(path) if is_glob else [path]
        inner = [trace for place in found for trace in _traces_at(files, place)]
        urls = [files.unstrip_protocol(trace) for trace in sorted(set(inner))]
    if not urls:
        raise TraceError(f"{url}: no trace found; allowed: a URL or glob of *{SUFFIX}")
    return urls


def remote_manifest(url: str) -> Manifest:
    """Read what a trace at a URL says of itself.

    Raises
    ------
    TraceError
        If it is missing, cannot be read or is corrupt.
    UserError
        If fsspec, or what it needs for the scheme, is not installed.
    """
    return parse_manifest(f"{url}/{MANIFEST_NAME}", _manifest_bytes(url))


def fetch(url: str) -> Path:
    """Bring a trace here, file by file; what is here already, whole, is not fetched again.

    Returns
    -------
    Path
        Its copy in the cache, under the trace's id and its own name.

    Raises
    ------
    TraceError
        If it is missing, cannot be read, or a file is not what the manifest says.
    UserError
        If fsspec, or what it needs for the scheme, is not installed.
    """
    content = _manifest_bytes(url)
    manifest = parse_manifest(f"{url}/{MANIFEST_NAME}", content)
    folder = cache_folder("traces") / manifest.trace_id / url.rstrip("/").rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, wait=True):
        for name, record in manifest.all_files.items():
            if not _is_whole(folder / name, record["sha256"]):
                _fetch_file(f"{url}/{name}", folder / name, record["sha256"])
        # Last: a trace without its manifest is unfinished.
        write_file(folder / MANIFEST_NAME, lambda temporary: temporary.write_bytes(content))
    return folder


def _fetch_file(url: str, path: Path, sha256: str) -> None:
    def download(temporary: Path) -> None:
        digest = hashlib.sha256()
        with temporary.open("wb") as target:
            for chunk in _chunks(url):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != sha256:
            raise TraceError(f"{url}: sha256 {digest.hexdigest()} found; the manifest says {sha256}")

    write_file(path, download)


def _chunks(url: str) -> Iterator[bytes]:
    with _told(url):
        files, path = _opened(url)
        source = files.open(path, "rb")
    with source:
        while True:
            with _told(url):
                chunk = source.read(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk


def _is_whole(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _manifest_bytes(url: str) -> bytes:
    return b"".join(_chunks(f"{url.rstrip('/')}/{MANIFEST_NAME}"))


def _traces_at(files: Any, place: str) -> list[str]:
    if place.rstrip("/").endswith(SUFFIX):
        return [place.rstrip("/")]
    return [found.rstrip("/") for found in files.glob(f"{place.rstrip('/')}/*{SUFFIX}")]


def _opened(url: str) -> tuple[Any, str]:
    require_extra(url, "fsspec")
    fsspec = import_module("fsspec")
    files, path = fsspec.core.url_to_fs(url)
    return files, path


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Put what file systems raise, each in its own words, into one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise TraceError(f"{url}: not found; allowed: a NAME{SUFFIX}, folder or glob") from None
    except ImportError as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}") from None
    except Exception as error:
        words = " ".join(str(error).split())
        raise TraceError(f"{url}: cannot be read: {type(error).__name__}: {words}") from None
