"""What a user may ask for as a budget, and what it is in entries per KV head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real

from traces.errors import InfeasibleBudgetError, UserError
from traces.shape import ModelShape

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
_ALLOWED = "entries per KV head (128), a share of the full cache (5%) or bytes of the whole cache (64MiB)"


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget as asked: entries per KV head after a compression, window and sinks included.

    Attributes
    ----------
    amount : float
        The number written.
    unit : str
        ``entries``, ``%``, or a unit of bytes for the whole cache (``MiB``, ``GB``, ...).
    """

    amount: float
    unit: str = "entries"

    def __str__(self) -> str:
        amount = int(self.amount) if float(self.amount).is_integer() else self.amount
        return f"{amount}" + ("" if self.unit == "entries" else self.unit)

    def entries(self, shape: ModelShape, total_tokens: int) -> int:
        """Give the whole entries per KV head that the budget buys for one trace.

        Raises
        ------
        InfeasibleBudgetError
            If it buys less than one entry per KV head.
        UserError
            If it buys more than any cache could hold.
        """
        # As written: 0.57% of 10,000 is 57, while the nearest float is a little less.
        amount = Fraction(str(self.amount))
        if self.unit == "entries":
            entries = int(amount)
        elif self.unit == "%":
            entries = int(amount * total_tokens / 100)
        else:
            heads = shape.n_layers * shape.n_kv_heads
            entries = int(amount * _BYTES[self.unit] / (heads * shape.bytes_per_entry))
        if entries > _LARGEST:
            raise UserError(f"budget {self} buys {entries} entries; allowed: at most {_LARGEST:.0e}")
        if entries < 1:
            raise InfeasibleBudgetError(
                f"budget {self} buys no entry per KV head of this trace; allowed: {_ALLOWED}"
            )
        return entries


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
        raise UserError(f"budget {text!r} is not a budget; allowed: {_ALLOWED}")
    text = text.strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z%]*)", text, re.ASCII)
    if match is None:
        raise UserError(f"budget '{text}' is not a budget; allowed: {_ALLOWED}")
    amount, unit = float(match[1]), match[2]
    if unit == "" and "." in match[1]:
        meant = f"write {amount * 100:g}% to keep that share" if amount <= 1 else "write whole entries"
        raise UserError(
            f"budget '{text}' is a bare fraction, which some read as kept and some as removed; {meant}"
        )
    if unit not in ("", "%", *_BYTES):
        raise UserError(f"budget '{text}' has unknown unit '{unit}'; allowed: {_ALLOWED}")
    if amount <= 0 or amount > (100 if unit == "%" else _LARGEST):
        raise UserError(
            f"budget '{text[:40]}' is out of range; allowed: {_ALLOWED}, "
            f"above 0, at most 100% or {_LARGEST:.0e}"
        )
    return Budget(amount, unit or "entries")
