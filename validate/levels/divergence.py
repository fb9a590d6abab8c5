"""How far the next-token distribution moves away from the full cache's, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

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
    It holds a float32 log-probability for every decode step and token id in main memory: 1.8 GB for 3,000
    steps of a vocabulary of 152,000.
    """

    def __init__(self, model: PreTrainedModel, trace: Trace) -> None:
        self._next_ids = token_ids(model, trace)[0, trace.prompt_tokens + 1 :]
        self._log_probabilities = torch.empty(0)
        self._cache = DynamicCache()
        start = 0
        for logits in decode_logits(model, trace, self._cache):
            found = logits.float().log_softmax(-1)
            if not start:
                n_steps = trace.total_tokens - trace.prompt_tokens
                self._log_probabilities = torch.empty(n_steps, found.shape[1])
            self._log_probabilities[start : start + len(found)] = found
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
            Of the decode steps in order, cut into passes in any way.
        first : int
            The decode step that they begin with; before it nothing differs.
        """
        step = first
        before = self._log_probabilities[:first].argmax(-1)
        kl = [torch.zeros(first, dtype=torch.float64)]
        changed = [torch.zeros(first, dtype=torch.bool)]
        agrees = [before[: len(self._next_ids)] == self._next_ids[:first].cpu()]
        likelihood = [torch.zeros(len(agrees[0]), dtype=torch.float64)]
        with torch.inference_mode():
            for block in logits:
                found = block.float().log_softmax(-1)
                full = self._log_probabilities[step : step + len(found)].to(found.device)
                # A token that neither gives any chance adds nothing.
                terms = torch.where(full.isneginf(), 0.0, full.exp() * (full - found))
                kl.append(terms.sum(-1, dtype=torch.float64).cpu())
                top = found.argmax(-1)
                changed.append((full.argmax(-1) != top).cpu())
                known = self._next_ids[step : step + len(found), None]
                agrees.append((top[: len(known)] == known[:, 0]).cpu())
                rows = found[: len(known)] - full[: len(known)]
                likelihood.append(rows.gather(1, known)[:, 0].double().cpu())
                step += len(found)
        return Divergence(
            kl=torch.cat(kl).clamp(min=0).numpy(),
            top_changed=torch.cat(changed).numpy(),
            log_likelihood_change=torch.cat(likelihood).numpy(),
            agrees=torch.cat(agrees).numpy(),
        )


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
