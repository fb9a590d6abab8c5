"""Refuse, before hours of decoding, what a model of this shape cannot run under a protocol."""

from __future__ import annotations

from dataclasses import replace

import torch

from simulator.engine.cap import entries_of
from simulator.engine.request import divide_over_layers
from simulator.policies.contract import checked_table
from simulator.policies.language import Policy
from simulator.policies.parts import LayerRequest
from simulator.policies.wave import Wave
from traces.errors import MissingDataError, UserError
from validate.models.load import DTYPES, KnownModel, know_model, model_shape
from validate.models.shapes import PREFIX
from validate.protocol.file import Protocol
from validate.protocol.options import Asked, Choice

# Enough for any policy: what a share of a text buys is known only with the text.
_AMPLE = 10**6


def require_runnable(protocol: Protocol, model: Choice, asked: Asked, waves: dict[str, Wave]) -> None:
    """Divide every budget over the layers of the model, as its cache will.

    Raises
    ------
    UserError
        If there is no such model or dtype.
    MissingDataError
        Without a wave that a policy needs; the message says how to make it.
    InfeasibleBudgetError
        If a layer would get too little.
    """
    if asked.dtype not in (None, "auto", *DTYPES):
        raise UserError(f"dtype is '{asked.dtype}'; allowed: auto, {', '.join(DTYPES)}")
    known = know_model(model.load, asked.revision)
    own = known.config.dtype
    default = own if isinstance(own, torch.dtype) else torch.float32
    shape = model_shape(known.config, DTYPES.get(asked.dtype or "auto", default))
    request = LayerRequest(
        n_layers=shape.n_layers,
        entries=_AMPLE,
        protected=0,
        model=known.name,
        model_revision=known.revision,
        trace_id="",
        waves=waves,
        n_kv_heads=shape.n_kv_heads,
    )
    for name, benchmark in protocol.benchmarks.items():
        for policy, budget in ((own, each) for each in benchmark.budgets for own in protocol.policies):
            where = f"{asked.config}: benchmarks.{name}, policy '{policy.name}' at budget {budget}"
            try:
                is_share = budget.unit == "%"
                entries = _AMPLE if is_share else entries_of(budget, policy, shape, 0, _AMPLE)
                _divide(policy, replace(request, entries=entries, protected=policy.protected_of(0, entries)))
            except MissingDataError as error:
                reason = f"{where}: {error}"
                if known.name not in waves:
                    reason = _how_to_make_a_wave(policy, model, known, asked, waves)
                raise MissingDataError(reason) from None
            except UserError as error:
                raise type(error)(f"{where}: {error}") from None


def _divide(policy: Policy, request: LayerRequest) -> None:
    if not policy.evicts:
        return
    policy.require_feasible(request.entries)
    checked_table(policy.heads, request)
    # A dynamic allocator divides once it has seen the prompt.
    if not policy.layers.dynamic:
        divide_over_layers(policy, request)


def _how_to_make_a_wave(
    policy: Policy, model: Choice, known: KnownModel, asked: Asked, waves: dict[str, Wave]
) -> str:
    is_random = model.load.startswith(PREFIX)
    source = f"--random-weights {model.load.removeprefix(PREFIX)}" if is_random else f"--model {model.load}"
    key = "" if model.stands_for is None or is_random else f", or models.{model.stands_for} wave"
    return (
        f"{asked.config}: policy '{policy.name}' needs the wave of model '{known.name}' (known: "
        f"{', '.join(sorted(waves))}); make it from problems that nothing is judged on: sim record {source} "
        "--prompts CALIBRATION.jsonl --limit 8 --out runs/calibration, then sim calibrate --trace "
        f"runs/calibration --out wave.json; give it with --wave wave.json{key}"
    )
