"""How much every prediction hangs on what attention gives it: one backward pass a draw.

At every decode step a token is drawn, and the sum of their log-probabilities is differentiated by the output
of every query head. For an error ``e`` of these outputs let ``z`` be the sum of ``sensitivity . e``. Over
tokens that the model itself would draw, the divergence of its predictions is the logarithm of the mean of
``exp(z)`` if logits move linearly, and half of the mean of ``z^2`` to second order (Fisher information).

A model that is sure draws one token only, whose log-probability cannot move. So tokens are drawn from a
flatter distribution over the most likely ones, and weights make up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from traces.errors import UserError
from validate.models.attention_hook import layer_index, replaced_attention, require_plain, scale_of

_IMPLEMENTATION = "kvbudget_sensitivity"
_ATTRIBUTE = "_kvbudget_outputs"
# Tokens are drawn from so many of the most likely ones, by this power of their probabilities.
_MOST_LIKELY, _POWER = 16, 0.25
# Tokens whose predictions are looked at together: logits of a whole text would be the largest tensor of all.
_TOKENS = 256


def sensitivities(
    model: PreTrainedModel, token_ids: Sequence[int], prompt_tokens: int, n_draws: int, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Differentiate what a model predicts at every decode step by what its query heads give.

    Parameters
    ----------
    model : PreTrainedModel
    token_ids : sequence of int
        The whole text.
    prompt_tokens : int
        Decode steps are the tokens after them.
    n_draws : int
        Tokens that are drawn at every step, at least 1.
    seed : int

    Returns
    -------
    list of Tensor (n_draws, n_query_heads, n_steps, head_dim)
        By layer, in the model's type: the gradient of the sum of all log-probabilities of a draw.
    Tensor (n_draws, n_steps)
        Log-probabilities of the drawn tokens less those that they were drawn with.

    Raises
    ------
    UserError
        For a model whose attention cannot be replaced, or whose predictions are more than a matrix product
        of its last hidden states.
    """
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    ids = torch.tensor([list(token_ids)], device=model.device)
    outputs: dict[int, torch.Tensor] = {}
    were_trained = [own for own in model.parameters() if own.requires_grad]
    try:
        model.requires_grad_(False)
        with (
            torch.inference_mode(False),
            replaced_attention(model, _IMPLEMENTATION, _ATTRIBUTE, outputs),
            torch.enable_grad(),
        ):
            with torch.no_grad():
                expected = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, prompt_tokens:]
            gradients, log_weights = _of_hidden(model, hidden.detach(), expected, n_draws, seed)
            found: list[list[torch.Tensor]] = [[] for _ in outputs]
            for draw, own in enumerate(gradients):
                by_layer = torch.autograd.grad(
                    hidden,
                    [outputs[layer] for layer in sorted(outputs)],
                    own,
                    retain_graph=draw < n_draws - 1,
                )
                for layer, gradient in enumerate(by_layer):
                    found[layer].append(gradient[0, prompt_tokens:].transpose(0, 1))
            return [torch.stack(own) for own in found], log_weights
    finally:
        for own in were_trained:
            own.requires_grad_(True)


@torch.no_grad()
def _of_hidden(
    model: PreTrainedModel, hidden: torch.Tensor, expected: torch.Tensor, n_draws: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens and differentiate their log-probabilities by the last hidden states.

    ``expected`` are the logits that the model itself makes of the last of them.

    Returns
    -------
    Tensor (n_draws, n_steps, width), in the type of ``hidden``
    Tensor (n_draws, n_steps)
        As of `sensitivities`.
    """
    head: Any = model.get_output_embeddings()
    if head is None or not torch.allclose(head(hidden[-1]).float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"model type '{model.config.model_type}' makes more of its last hidden states than a matrix "
            "product; sensitivities cannot be recorded"
        )
    generator = torch.Generator().manual_seed(seed)
    parts, weights = [], []
    for own in hidden.split(_TOKENS):
        logs = head(own).float().log_softmax(-1)
        likely, tokens = logs.topk(min(_MOST_LIKELY, logs.shape[-1]))
        flat = (_POWER * likely).log_softmax(-1)
        drawn = torch.multinomial(flat.exp().cpu(), n_draws, replacement=True, generator=generator)
        drawn = drawn.to(own.device)
        weights.append((likely.gather(1, drawn) - flat.gather(1, drawn)).T.cpu())
        # Of log p(token): the token's row of the matrix, less the mean row under p.
        mean = (logs.exp().to(head.weight.dtype) @ head.weight).float()
        parts.append((head.weight[tokens.gather(1, drawn).T].float() - mean).to(own.dtype))
    return torch.cat(parts, 1), torch.cat(weights, 1)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally and keep the output; registered as ``kvbudget_sensitivity``."""
    require_plain(module, settings, key.shape[2], dropout, "sensitivities cannot be recorded")
    output = scaled_dot_product_attention(
        query,
        key.repeat_interleave(query.shape[1] // key.shape[1], 1),
        value.repeat_interleave(query.shape[1] // key.shape[1], 1),
        is_causal=True,
        scale=scale_of(module, query, scaling),
    ).transpose(1, 2)
    if not output.requires_grad:
        # Of the first layer, since no weight asks for a gradient.
        output.requires_grad_(True)
    getattr(module, _ATTRIBUTE)[layer_index(module)] = output
    return output, None
