"""What a budget leaves a policy to keep: all of it, or, under a cap, what is not needed until compressions.

A budget on top of the prompt adds the prompt, which the policy then never evicts.

Under a cap, what counts is what is held during the attention of a decode step, the new token included, as in
``entries_peak`` and ``bytes_peak``. The pass that reads the prompt sees all of it: of a prompt that is
compressed at its end, only what stays counts.
"""

from __future__ import annotations

from dataclasses import replace

from simulator.budget import KEPT, ON_PROMPT, Budget
from simulator.engine.request import divide_over_layers
from simulator.policies.contract import asked_trigger
from simulator.policies.language import Policy
from simulator.policies.parts import LayerRequest
from simulator.policies.shipped import BufferFull, PerStep, UniformHeads
from traces.errors import InfeasibleBudgetError, MissingDataError
from traces.shape import ModelShape


def entries_of(
    budget: Budget,
    policy: Policy,
    shape: ModelShape,
    prompt_tokens: int,
    total_tokens: int,
    *,
    longest: int | None = None,
) -> int:
    """Give the mean entries per KV head that a policy may keep after a compression.

    Under a cap it is the most that holds for any text: no decode step ever finds more than the cap. Where the
    whole text fits, it is the cap itself. The full cache, which no policy asks to evict, is the reference
    under every budget and may exceed it.

    Parameters
    ----------
    budget : Budget
    policy : Policy
    shape : ModelShape
    prompt_tokens, total_tokens : int
        Of the text; a share is a share of ``total_tokens``.
    longest : int, optional
        Tokens that the text may reach, if more than ``total_tokens``.

    Raises
    ------
    InfeasibleBudgetError
        If the budget buys no entry, or no such cap can be promised.
    UserError
        If it buys more than any cache could hold.
    """
    bought = budget.entries(shape, total_tokens)
    longest = total_tokens if longest is None else longest
    if budget.kind == ON_PROMPT and policy.evicts:
        return bought + prompt_tokens
    if budget.kind == KEPT or not policy.evicts or bought >= longest:
        return bought
    n_heads, n_kv_heads = shape.n_layers * shape.n_kv_heads, shape.n_kv_heads
    most = int(budget.of_cache(shape, total_tokens))
    added = _most_added(budget, policy, n_kv_heads, longest)
    entries = (most - shape.n_layers * added) // n_heads
    if not policy.layers.exact:
        room = most // n_kv_heads - shape.n_layers * added // n_kv_heads
        entries = _most_divided(budget, policy, shape, prompt_tokens, entries, room, longest)
    protected = policy.protected_of(prompt_tokens, entries)
    if entries <= protected:
        per_head = -(-added // n_kv_heads)
        of_prompt = f", {prompt_tokens} of them the prompt" if policy.protection.prompt else ""
        raise InfeasibleBudgetError(
            f"budget {budget} holds {bought} entries per KV head; policy '{policy.name}' adds {per_head} "
            f"between compressions and protects {protected}{of_prompt}; allowed: at least "
            f"{protected + 1 + per_head}!, or a smaller buffer or interval"
        )
    if policy.trigger.prompt == "wait":
        _require_room_for_prompt(budget, policy, prompt_tokens, n_kv_heads, bought)
    return entries


def under_budget(policy: Policy, budget: Budget) -> Policy:
    """Give the policy as a budget makes it: one on top of the prompt protects the prompt too."""
    if budget.kind != ON_PROMPT or not policy.evicts:
        return policy
    return replace(policy, protect=replace(policy.protection, prompt=True))


def _most_added(budget: Budget, policy: Policy, n_kv_heads: int, longest: int) -> int:
    """Give the most entries by which a layer exceeds its budget."""
    trigger, layers = policy.trigger, policy.layers
    # A layer whose budget is cut between two compressions has to give entries up at the next token: until
    # then another may have begun to use them.
    divides_again = layers.dynamic and layers.layer_delta > 0
    if divides_again and not isinstance(trigger, BufferFull | PerStep):
        raise _unbounded(budget, policy, f"layers '{layers.name}' and trigger '{trigger.name}'", longest)
    # One that waits for certain tokens may wait for ever.
    added = None if trigger.reads_tokens else trigger.most_added(n_kv_heads)
    if added is None:
        raise _unbounded(budget, policy, f"trigger '{trigger.name}'", longest)
    if isinstance(policy.heads, UniformHeads):
        # Heads of equal length fill a buffer exactly.
        added -= added % n_kv_heads
    return added + (n_kv_heads if divides_again else 0)


def _most_divided(
    budget: Budget,
    policy: Policy,
    shape: ModelShape,
    prompt_tokens: int,
    entries: int,
    room: int,
    longest: int,
) -> int:
    """Lower a mean budget until layer budgets that do not sum to the total fit into ``room``."""
    by = f"layers '{policy.layers.name}', whose budgets may exceed the total"
    if policy.layers.dynamic:
        raise _unbounded(budget, policy, by, longest)
    request = LayerRequest(
        n_layers=shape.n_layers,
        entries=entries,
        protected=0,
        model="",
        model_revision="",
        trace_id="",
        waves={},
        n_kv_heads=shape.n_kv_heads,
    )
    try:
        while entries > (protected := policy.protected_of(prompt_tokens, entries)):
            asked = replace(request, entries=entries, protected=protected)
            if divide_over_layers(policy, asked)[0].sum() <= room:
                break
            entries -= 1
    except MissingDataError:
        raise _unbounded(budget, policy, by, longest) from None
    return entries


def _require_room_for_prompt(
    budget: Budget, policy: Policy, prompt_tokens: int, n_kv_heads: int, bought: int
) -> None:
    """Refuse a prompt that waits for its first compression and is held whole until then."""
    first = asked_trigger(policy.trigger, prompt_tokens, prompt_tokens * n_kv_heads, 0, n_kv_heads)
    if first is not None and first > bought:
        raise InfeasibleBudgetError(
            f"budget {budget} holds {bought} entries per KV head; the prompt of {prompt_tokens} tokens waits "
            f"until {first} are held; allowed: at least {first}!, or prompt=compress"
        )


def _unbounded(budget: Budget, policy: Policy, by: str, longest: int) -> InfeasibleBudgetError:
    return InfeasibleBudgetError(
        f"budget {budget} is a cap, and nothing bounds what policy '{policy.name}' holds with {by}; allowed: "
        f"{longest}! or more, which the whole text fits into, or a budget without !"
    )
