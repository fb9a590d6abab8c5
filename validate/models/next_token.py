"""How the next token is chosen: greedily, or drawn from a seeded generator."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from traces.errors import UserError

# Probabilities are counted in steps of this: sums of whole numbers are exact in any order, so neither a
# device's way of adding nor the other rows of a batch can move a draw.
_UNIT = 2**52
# Logits of rows that are sorted together: a sort takes some 40 bytes for each.
_MOST_AT_ONCE = 2**22
_LEAST_LEFT_OUT = 2.0**-17


def forward_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Give what a forward pass of a decode is called with beside tokens and cache.

    Logits of a whole pass would be the largest tensor of all, and only the last row is used; a model that can
    leaves the others out.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"use_cache": True} | ({"logits_to_keep": 1} if keeps else {})


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
        """Choose the next token id of one text: `choose_tokens` on a batch of one.

        Parameters
        ----------
        logits : Tensor, shape (n_token_ids,)
        generator : torch.Generator
            Advanced by one draw when sampling.
        """
        return choose_tokens(logits[None], [self], [generator])[0]

    def as_fields(self) -> dict[str, object]:
        """Give the settings that had an effect, for a trace's manifest."""
        if not self.do_sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


def choose_tokens(
    logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int]:
    """Choose the next token id of every row, on the device of the logits.

    A row is drawn from by inverting its running sum, likeliest token first, at one uniform number of its own
    generator. What it gets does not depend on the other rows.

    Parameters
    ----------
    logits : Tensor, shape (n_rows, n_token_ids)
        Of any floating type, on any device; computed with in float32. Only the ids leave the device.
    samplings : sequence of Sampling, one per row
    generators : sequence of torch.Generator, one per row
        On the CPU; those of rows that sample are advanced by one draw.

    Raises
    ------
    UserError
        If a row to be drawn from holds a logit that is no number.
    """
    n_rows = max(1, _MOST_AT_ONCE // logits.shape[1])
    parts = [
        _chosen(logits[rows], samplings[rows], generators[rows])
        for rows in (slice(start, start + n_rows) for start in range(0, len(logits), n_rows))
    ]
    tokens = torch.cat(parts).tolist()
    if min(tokens) < 0:
        raise UserError("the model's logits hold a value that is no number; allowed: another --dtype perhaps")
    return tokens


def _chosen(
    logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Choose for rows that fit together; int64 (n_rows,), -1 where nothing can be drawn."""
    draws = [own.do_sample for own in samplings]
    if not any(draws):
        return logits.argmax(-1)
    settings = [
        (own.temperature, _nucleus(own), _uniform(generator) if own.do_sample else 0.0)
        for own, generator in zip(samplings, generators, strict=True)
    ]
    temperature, nucleus, uniform = (
        torch.tensor(settings, dtype=torch.float64).to(logits.device).split(1, dim=1)
    )
    probabilities = torch.softmax(logits.float() / temperature.float(), dim=-1)
    ordered, ids = _likeliest(probabilities, nucleus)
    shares = (ordered.double() * _UNIT).long()
    running = shares.cumsum(-1)
    is_inside = (running - shares) < nucleus
    total = running.masked_fill(~is_inside, 0).amax(-1, keepdim=True)
    # Rounding up to the total itself would pass the last token that can be drawn.
    target = torch.minimum((uniform * total).long(), total - 1)
    found = torch.searchsorted(running, target, right=True).clamp(max=ids.shape[1] - 1)
    drawn = ids.gather(-1, found).masked_fill(probabilities[:, :1].isnan(), -1)[:, 0]
    if all(draws):
        return drawn
    return torch.where(torch.tensor(draws).to(drawn.device), drawn, logits.argmax(-1))


def _likeliest(probabilities: torch.Tensor, nucleus: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order the tokens that can be in the nuclei of their rows, likeliest first, equal ones by their id.

    Returns
    -------
    Tensor, shape (n_rows, n)
        Probabilities.
    Tensor, shape (n_rows, n)
        Token ids.
    """
    n_token_ids = probabilities.shape[1]
    # Tokens below this are together less likely than what a nucleus leaves out. Half of it: sums are rounded.
    least = (1 - nucleus / _UNIT) / (2 * n_token_ids)
    # Where it leaves out so little that sums in float32 cannot tell, all are ordered.
    least = torch.where(least * n_token_ids < _LEAST_LEFT_OUT, 0.0, least)
    n_inside = max(1, int((probabilities >= least).sum(-1).max()))
    if n_inside > n_token_ids // 8:  # ordered in less time than picked out
        return probabilities.sort(descending=True, stable=True)
    ids = probabilities.topk(n_inside, sorted=False).indices.sort().values
    ordered, places = probabilities.gather(-1, ids).sort(descending=True, stable=True)
    return ordered, ids.gather(-1, places)


def _nucleus(sampling: Sampling) -> float:
    """Give the sum, in units, that a token must not find reached before it; without a nucleus none is."""
    return math.ceil(sampling.top_p * _UNIT) if sampling.top_p < 1 else math.inf


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator))
