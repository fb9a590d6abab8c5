"""What a kind of file needs to be fuzzed, and JSON read by nobody's reader but Python's own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Change = Callable[[bytes, random.Random], bytes]


@dataclass
class Target:
    """One kind of file.

    Attributes
    ----------
    name : str
    path : Path
        The file that is changed; what lies beside it is sound.
    change : callable
        Gives other content.
    meaning : callable
        Reads by the product's own door; raises UserError where it refuses.
    expected : callable
        What the content should mean, from its bytes.
    commands : sequence of list of str
        Command lines that read the file too.
    beside : dict
        Content of the files that ``change`` may have touched, to be put back.
    """

    name: str
    path: Path
    change: Change
    meaning: Callable[[Path], Any]
    expected: Callable[[bytes], Any]
    commands: Sequence[list[str]] = ()
    beside: dict[Path, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sound = self.path.read_bytes()
        self.beside = self.beside or {self.path: self.sound}

    def restore(self) -> None:
        """Put the sound files back."""
        for path, content in self.beside.items():
            path.write_bytes(content)


def only_json(content: bytes) -> Any:
    """Read JSON, refusing what the product has to refuse as well: names twice, numbers that are none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def number(text: str) -> Any:
        raise ValueError(text)

    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=number)
