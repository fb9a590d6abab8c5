"""How the next token is chosen: greedily, or drawn from a seeded generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from traces.errors import UserError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of a decode run; the same settings and logits give the same text.

    Parameters
    ----------
    do_sample : bool
        False takes the most likely token; the other settings are then without effect.
    temperature : float
        Above 0; divides the logits.
    top_p : float
        In (0, 1]: draw from the fewest most likely tokens whose probabilities reach this sum.
    seed : int
        Of the generator, not negative.

    Raises
    ------
    UserError
        For a setting out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature is {self.temperature}; allowed: above 0, or greedy decoding")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; allowed: above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; allowed: 0 to 2**63 - 1")

    def generator(self) -> torch.Generator:
        """Make the generator of one run; on the CPU, where a seed draws the same everywhere."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Choose the next token id.

        Parameters
        ----------
        logits : Tensor, shape (n_token_ids,), float32, on the CPU
        generator : torch.Generator
            Advanced by one draw when sampling.
        """
        if not self.do_sample:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1:
            # A stable sort, so that equally likely tokens enter the nucleus in order of their id.
            ordered, ids = probabilities.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            probabilities = probabilities.index_fill(0, ids[before >= self.top_p], 0.0)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def as_fields(self) -> dict[str, object]:
        """Give the settings that had an effect, for a trace's manifest."""
        if not self.do_sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
