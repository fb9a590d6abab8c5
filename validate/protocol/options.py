"""What the command line asks of a protocol: which model, which part of it, and what else than it says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simulator.budget import Budget, parse_budget
from simulator.cli.shared import require_counts
from simulator.policies.language import Policy, parse_policy, split_list
from traces.errors import UserError
from validate.models.shapes import PREFIX
from validate.protocol.file import Benchmark, Protocol


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line adds to a file; None leaves what the file says.

    ``model`` is a name of the file, ``NAME=PLACE``, or any model; ``prompts`` are ``BENCHMARK=FILE`` each.
    Of policies and budgets only these are run, of every benchmark the first ``limit`` problems; waves stand
    beside those of the file; samples, max_new_tokens and batch instead of its own.
    """

    config: Path
    out: Path
    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    device: str = "auto"
    prompts: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    waves: tuple[str, ...] = ()
    samples: int | None = None
    max_new_tokens: int | None = None
    batch: int | None = None
    limit: int | None = None
    use_chat_template: bool = True
    seed: int = 0
    jobs: int = 0
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The model of a run: what `load_model` is given, and what tables call it.

    ``stands_for`` is the model of the file whose published numbers it is set beside, if there is one.
    """

    load: str
    label: str
    stands_for: str | None

    @property
    def folder(self) -> str:
        """Give the label as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.label).strip(".-") or "model"


def asked_lists(policy: Sequence[str] | None, budget: Sequence[str] | None) -> tuple[tuple[str, ...], ...]:
    """Split comma lists of policies and budgets."""
    policies = tuple(name for text in policy or () for name in split_list(text))
    return policies, tuple(item for text in budget or () for item in text.split(","))


def choose_model(protocol: Protocol, asked: str | None) -> Choice:
    """Settle which model is run, and which of the file's models it stands for."""
    if asked is None or asked in protocol.models:
        name = protocol.model if asked is None else asked
        return Choice(protocol.models[name].id, name, name)
    if asked.startswith(PREFIX):
        shape = asked.removeprefix(PREFIX)
        return Choice(asked, asked, shape if shape in protocol.models else None)
    name, equals, place = asked.partition("=")
    if equals and name in protocol.models and place:
        return Choice(place, name, name)
    last = asked.rstrip("/").rpartition("/")[2]
    for name, own in protocol.models.items():
        if own.id == asked or own.id.rpartition("/")[2] == last:
            return Choice(asked, name, name)
    return Choice(asked, asked, None)


def narrowed(protocol: Protocol, asked: Asked) -> tuple[Protocol, list[str]]:
    """Leave out what is not asked for, put in what is asked instead; say in lines what that changed.

    Raises
    ------
    UserError
        For what the file does not hold, and for numbers out of range.
    """
    require_counts(
        samples=asked.samples, max_new_tokens=asked.max_new_tokens, batch=asked.batch, limit=asked.limit
    )
    if asked.samples is not None and asked.samples > 1 and not protocol.sampling.do_sample:
        raise UserError(
            f"--samples is {asked.samples}, and {asked.config} has no temperature: greedy texts are equal"
        )
    changes = [] if asked.limit is None else [f"not all problems: the first {asked.limit} of each benchmark"]
    samples = protocol.samples if asked.samples is None else asked.samples
    if samples != protocol.samples:
        changes.append(f"not the file's protocol: samples {samples} instead of {protocol.samples}")
    benchmarks = {}
    for name, own in _with_budgets(protocol, asked).items():
        longest = own.max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
        if longest != own.max_new_tokens:
            changes.append(
                f"not the file's protocol: max_new_tokens {longest} instead of {own.max_new_tokens} in {name}"
            )
        benchmarks[name] = replace(own, max_new_tokens=longest, batch=asked.batch or own.batch)
    policies = _with_policies(protocol, asked)
    return replace(protocol, policies=policies, benchmarks=benchmarks, samples=samples), changes


def _with_policies(protocol: Protocol, asked: Asked) -> tuple[Policy, ...]:
    if not asked.policies:
        return protocol.policies
    wanted = [parse_policy(text, **protocol.parameters) for text in asked.policies]
    for policy, text in zip(wanted, asked.policies, strict=True):
        if policy not in protocol.policies:
            names = ", ".join(own.name for own in protocol.policies)
            raise UserError(f"--policy {text} is not in {asked.config}; allowed: {names}")
    return tuple(own for own in protocol.policies if own in wanted)


def _with_budgets(protocol: Protocol, asked: Asked) -> dict[str, Benchmark]:
    """Give the benchmarks that have one of the budgets, with these."""
    if not asked.budgets:
        return protocol.benchmarks
    wanted = [parse_budget(text) for text in asked.budgets]
    known: list[Budget] = [own for each in protocol.benchmarks.values() for own in each.budgets]
    for budget in wanted:
        if budget not in known:
            allowed = ", ".join(map(str, dict.fromkeys(known)))
            raise UserError(f"--budget {budget} is not in {asked.config}; allowed: {allowed}")
    found = {
        name: replace(own, budgets=tuple(each for each in own.budgets if each in wanted))
        for name, own in protocol.benchmarks.items()
    }
    return {name: own for name, own in found.items() if own.budgets}


def given_prompts(protocol: Protocol, asked: Asked) -> dict[str, str]:
    """Read ``--prompts BENCHMARK=FILE``.

    Raises
    ------
    UserError
        For another form, or a benchmark that the file does not hold.
    """
    given = {}
    for text in asked.prompts:
        name, _, place = text.partition("=")
        if name not in protocol.benchmarks or not place:
            names = ", ".join(protocol.benchmarks)
            raise UserError(f"--prompts is '{text}'; allowed: BENCHMARK=FILE, of {names}")
        given[name] = place
    return given
