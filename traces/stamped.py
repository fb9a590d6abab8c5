"""Our own small JSON files: format, version, the fields of one dataclass, and a digest of all of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traces.atomic import write_text
from traces.documents import convert, digest, read_json, shown
from traces.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_DIGEST = "sha256"


@dataclass(frozen=True)
class Stamp:
    """A kind of file.

    Attributes
    ----------
    format : str
        As it stands in the file, such as ``kvbudget-wave``.
    version : int
    name : str
        What messages call such a file.
    written_by : str
        The command, for messages.
    error : type of UserError
        What is raised.
    is_writable_by_hand : bool
        Whether a file without a digest is taken as it is.
    """

    format: str
    version: int
    name: str
    written_by: str
    error: type[UserError]
    is_writable_by_hand: bool = False

    def write(self, path: str | Path, record: DataclassInstance) -> None:
        """Write a record as JSON with a digest of itself, atomically."""
        content = {"format": self.format, "version": self.version, **asdict(record)}
        write_text(Path(path), json.dumps(content | {_DIGEST: digest(content)}, indent=1) + "\n")

    def read(self, path: str | Path, kind: type[DataclassInstance]) -> Any:
        """Read a record as a ``kind``.

        Raises
        ------
        UserError
            As ``error``, if the file is missing, changed, or not of this format and version.
        """
        what = f"{self.name} {path}"
        stored: dict[str, Any] = read_json(path, what, dict[str, Any], self.error)
        if (stored.get("format"), stored.get("version")) != (self.format, self.version):
            raise self.error(
                f"{what}: format {shown(stored.get('format'))} {shown(stored.get('version'))} found; "
                f"allowed: '{self.format}' {self.version}, as {self.written_by} writes it"
            )
        stamp = stored.get(_DIGEST)
        if stamp != digest(stored, without=_DIGEST) and not (stamp is None and self.is_writable_by_hand):
            rest = ", or has none" if self.is_writable_by_hand else ""
            raise self.error(
                f"{what} was changed since it was written; allowed: one that agrees with its {_DIGEST}{rest}"
            )
        known = sorted({"format", "version", _DIGEST, *(item.name for item in fields(kind))})
        if unknown := sorted(set(stored) - set(known)):
            raise self.error(f"{what}: field {shown(unknown[0])} is unknown; allowed: {', '.join(known)}")
        return convert(stored, what, kind, self.error)
