"""How far the next-token distribution moves away from the full cache's, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from traces.errors import UserError
from traces.trace import Trace
from validate.models.next_token import forward_settings

# Tokens of one pass: the logits of a whole trace would be the largest tensor of all.
_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """Next-token distributions under eviction, beside the full cache's, at every decode step of a trace.

    Attributes
    ----------
    kl : float64 (n_steps,)
        Kullback-Leibler divergence from the full cache's distribution, in nats.
    top_changed : bool (n_steps,)
        Whether another token is the most likely one.
    log_likelihood_change : float64 (n_steps - 1,)
        Of the trace's own next token, in nats; below 0 where it became less likely. The last step has none.
    agrees : bool (n_steps - 1,)
        Whether the trace's next token is the most likely one under eviction, which for a greedy trace means
        that the model would have written it.
    """

    kl: np.ndarray
    top_changed: np.ndarray
    log_likelihood_change: np.ndarray
    agrees: np.ndarray

    def columns(self) -> dict[str, float | None]:
        """Reduce to the numbers of a row; ``perplexity_ratio`` is above 1 where the text is less likely."""
        change = self.log_likelihood_change.mean() if len(self.log_likelihood_change) else None
        return {
            "agreement": float(self.agrees.mean()) if len(self.agrees) else None,
            "kl_mean": float(self.kl.mean()),
            "kl_p95": float(np.quantile(self.kl, 0.95)),
            "kl_worst": float(self.kl.max()),
            "top_changed": float(self.top_changed.mean()),
            "log_likelihood_change": None if change is None else float(change),
            "perplexity_ratio": None if change is None else float(np.exp(-change)),
        }


class FullPredictions:
    """What a model with its full cache predicts after every decode step of a trace; run once, compared often.

    Parameters
    ----------
    model : PreTrainedModel
        The trace's own.
    trace : Trace
        It is fed again in passes of many tokens.

    Notes
    -----
    It holds a float32 probability for every decode step and token id in main memory: 1.8 GB for 3,000 steps
    of a vocabulary of 152,000; and the keys and values of the whole text, where the model is.
    """

    def __init__(self, model: PreTrainedModel, trace: Trace) -> None:
        self._next_ids = token_ids(model, trace)[0, trace.prompt_tokens + 1 :].cpu()
        n_steps = trace.total_tokens - trace.prompt_tokens
        self._probabilities = torch.empty(0)
        self._entropy = torch.empty(n_steps, dtype=torch.float64)
        self._top = torch.empty(n_steps, dtype=torch.int64)
        self._own = torch.empty(len(self._next_ids), dtype=torch.float64)
        self._cache = DynamicCache()
        start = 0
        for logits in decode_logits(model, trace, self._cache):
            found = logits.float().log_softmax(-1)
            _require_numbers(found[:, 0])
            if not start:
                self._probabilities = torch.empty(n_steps, found.shape[1])
            steps = slice(start, start + len(found))
            known = self._next_ids[steps, None].to(found.device)
            self._top[steps] = logits.argmax(-1).cpu()
            self._own[steps] = found[: len(known)].gather(1, known)[:, 0].double().cpu()
            probabilities = found.exp_()
            self._entropy[steps] = torch.special.entr(probabilities).sum(-1, dtype=torch.float64).cpu()
            self._probabilities[steps] = probabilities.cpu()
            start += len(found)

    def cache(self, n_tokens: int) -> DynamicCache:
        """Give the keys and values of the first tokens, to go on from."""
        begun = DynamicCache()
        for index, (keys, values, *_) in enumerate(self._cache):
            begun.update(keys[:, :, :n_tokens], values[:, :, :n_tokens], index)
        return begun

    def compare(self, logits: Iterator[torch.Tensor], first: int = 0) -> Divergence:
        """Compare with what the same tokens led to under eviction.

        Parameters
        ----------
        logits : iterator of Tensor, shape (n_tokens, n_vocabulary)
            Of the decode steps in order, cut into passes in any way; they may be written over.
        first : int
            The decode step that they begin with; before it nothing differs.

        Raises
        ------
        UserError
            For a logit that is no number.
        """
        step = first
        kl = [torch.zeros(first, dtype=torch.float64)]
        top, own = [self._top[:first]], [self._own[:first]]
        with torch.inference_mode():
            for block in logits:
                steps = slice(step, step + len(block))
                known = self._next_ids[steps]
                # One step at a time: its numbers stay near the processor, however many pass over them.
                found = [self._compared(row, step + i, known[i : i + 1]) for i, row in enumerate(block)]
                likeliest, expected, sums, chosen = (
                    torch.stack(part).cpu() for part in zip(*found, strict=True)
                )
                _require_numbers(expected)
                sums = sums.double().log()
                kl.append(sums - expected.double() - self._entropy[steps])
                top.append(likeliest)
                own.append((chosen.double() - sums)[: len(known)])
                step += len(block)
        tops = torch.cat(top)
        return Divergence(
            kl=torch.cat(kl).clamp(min=0).numpy(),
            top_changed=(tops != self._top).numpy(),
            log_likelihood_change=(torch.cat(own) - self._own).numpy(),
            agrees=(tops[: len(self._next_ids)] == self._next_ids).numpy(),
        )

    def _compared(self, row: torch.Tensor, step: int, known: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Reduce a step's logits, (n_vocabulary,), to four numbers.

        They are the likeliest token, what the full cache expects of the logits, the sum of their exponents
        and the logit of the trace's own token, all against the likeliest one's: there numbers are small, and
        so is what rounding makes of sums.
        """
        relative = row.float()
        largest, likeliest = relative.max(-1)
        relative.sub_(largest)
        full = self._probabilities[step].to(row.device)
        # A dot product of vectors; one of matrices adds up in an order that loses three digits.
        expected = torch.dot(full, relative)
        if expected.isnan():
            # What has no chance in either must not become 0 times infinity.
            expected = torch.dot(full, relative.masked_fill(full == 0, 0.0))
        # The last step has no token after it.
        chosen = relative[int(known)].clone() if len(known) else torch.zeros_like(largest)
        return likeliest, expected, relative.exp_().sum(), chosen


def _require_numbers(values: torch.Tensor) -> None:
    if values.isnan().any():
        raise UserError("the model's logits hold a value that is no number; allowed: another --dtype perhaps")


def token_ids(model: PreTrainedModel, trace: Trace) -> torch.Tensor:
    """Give a trace's tokens where the model is; int64 (1, total_tokens)."""
    return torch.from_numpy(np.array(trace.token_ids, np.int64))[None].to(model.device)


def decode_logits(
    model: PreTrainedModel, trace: Trace, cache: DynamicCache, first: int = 0
) -> Iterator[torch.Tensor]:
    """Feed a trace to a model, prompt and decoded tokens in passes of their own.

    Parameters
    ----------
    model : PreTrainedModel
    trace : Trace
    cache : DynamicCache
        Of the ``first`` tokens; filled.
    first : int

    Yields
    ------
    Tensor, shape (n_tokens, n_vocabulary)
        Logits of decode steps, in order.
    """
    settings = forward_settings(model)
    with torch.inference_mode():
        for at, new in _passes(token_ids(model, trace), first, trace.prompt_tokens):
            if at < trace.prompt_tokens:
                model(input_ids=new, past_key_values=cache, **settings)
            else:
                yield model(input_ids=new, past_key_values=cache).logits[0]


def _passes(ids: torch.Tensor, begin: int, prompt_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Cut a text into passes, of which none holds both prompt and decoded tokens; first token, and ids."""
    for start, stop in ((begin, prompt_tokens), (max(begin, prompt_tokens), ids.shape[1])):
        for first in range(start, stop, _TOKENS):
            yield first, ids[:, first : min(stop, first + _TOKENS)]
