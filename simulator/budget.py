"""What a user may ask for as a budget, and what it is in entries."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real

from traces.documents import shown
from traces.errors import InfeasibleBudgetError, UserError
from traces.shape import ModelShape
from traces.wording import near

_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
# Beyond this no cache will go, and sums over layers stay far from overflow.
_LARGEST = 10**12
_ALLOWED = (
    "entries per KV head (128), a share of the full cache (5%) or bytes of the whole cache (64MiB), "
    "with ! (64MiB!) as a cap on the peak, with +prompt (128+prompt) on top of a prompt that is kept"
)
KEPT, PEAK, ON_PROMPT = KINDS = "kept", "peak", "on prompt"
_MARKS = {KEPT: "", PEAK: "!", ON_PROMPT: "+prompt"}
UNITS = ("entries", "%", *_BYTES)


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget as asked: entries per KV head after a compression, all in all or beside the prompt, or a cap.

    Attributes
    ----------
    amount : float
        The number written.
    unit : str
        ``entries``, ``%``, or a unit of bytes for the whole cache (``MiB``, ``GB``, ...).
    kind : str
        ``kept``: what stays after a compression, window and sinks included; what is added until the next one
        comes on top. ``peak``, written with ``!``: the most that is held at any decode step, all of that
        included; see ``simulator.engine.cap``. ``on prompt``, written with ``+prompt``: as ``kept``, but of
        what was decoded alone; the prompt is never evicted and comes on top, as TriAttention's and RPC's
        budgets mean it.
    """

    amount: float
    unit: str = "entries"
    kind: str = KEPT

    def __str__(self) -> str:
        amount = int(self.amount) if float(self.amount).is_integer() else self.amount
        unit = "" if self.unit == "entries" else self.unit
        return f"{amount}{unit}{_MARKS[self.kind]}"

    def of_cache(self, shape: ModelShape, total_tokens: int) -> Fraction:
        """Give the entries over all layers and KV heads that the amount comes to, not rounded.

        The prompt is left out where it comes on top.
        """
        # As written: 0.57% of 10,000 is 57, while the nearest float is a little less.
        amount = Fraction(str(self.amount))
        if self.unit in _BYTES:
            return amount * _BYTES[self.unit] / shape.bytes_per_entry
        per_head = amount * total_tokens / 100 if self.unit == "%" else amount
        return per_head * shape.n_layers * shape.n_kv_heads

    def entries(self, shape: ModelShape, total_tokens: int) -> int:
        """Give the whole entries per KV head that the amount comes to for one text.

        Of a cap that is what may be held, and a prompt on top is left out;
        ``simulator.engine.cap.entries_of`` tells what may be kept.

        Raises
        ------
        InfeasibleBudgetError
            If it buys less than one entry per KV head.
        UserError
            If it buys more than any cache could hold.
        """
        entries = int(self.of_cache(shape, total_tokens) / (shape.n_layers * shape.n_kv_heads))
        if entries > _LARGEST:
            raise UserError(f"budget {self} buys {entries} entries; allowed: at most {_LARGEST:.0e}")
        if entries < 1:
            raise InfeasibleBudgetError(
                f"budget {self} buys no entry per KV head of this trace; allowed: {_ALLOWED}"
            )
        return entries


def parse_budgets(texts: Iterable[str]) -> list[Budget]:
    """Read comma lists of budgets; each once, however it is spelled."""
    return list(dict.fromkeys(parse_budget(item) for text in texts for item in text.split(",")))


def parse_budget(text: str | int | Budget) -> Budget:
    """Read a budget as written on the command line.

    Raises
    ------
    UserError
        For anything outside the grammar, and for bare fractions: 0.1 may mean kept or removed.
    """
    if isinstance(text, Budget):
        return text
    if isinstance(text, Real) and not isinstance(text, bool):
        text = str(int(text)) if isinstance(text, Integral) else str(float(text))
    if not isinstance(text, str):
        raise UserError(f"budget {shown(text)} is not a budget; allowed: {_ALLOWED}")
    text = text.strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*(!|\+\s*prompt)?", text, re.ASCII)
    if match is None:
        raise UserError(f"budget {shown(text)} is not a budget; allowed: {_ALLOWED}")
    amount, unit = float(match[1]), match[2]
    if unit == "" and "." in match[1]:
        meant = f"write {amount * 100:g}% to keep that share" if amount <= 1 else "write whole entries"
        raise UserError(
            f"budget {shown(text)} is a bare fraction, which some read as kept and some as removed; {meant}"
        )
    if unit not in ("", "%", *_BYTES):
        raise UserError(
            f"budget {shown(text)} has unknown unit {shown(unit)}{near(unit, _BYTES)}; allowed: {_ALLOWED}"
        )
    if amount <= 0 or amount > (100 if unit == "%" else _LARGEST):
        raise UserError(
            f"budget {shown(text)} is out of range; allowed: {_ALLOWED}, "
            f"above 0, at most 100% or {_LARGEST:.0e}"
        )
    kind = KEPT if match[3] is None else PEAK if match[3] == "!" else ON_PROMPT
    return Budget(amount, unit or "entries", kind)
