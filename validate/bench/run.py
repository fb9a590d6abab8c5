"""The whole measurement of a device, within a time limit, and what it says against the aims."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from simulator.policies.language import Policy, parse_policy
from simulator.policies.wave import Wave
from traces.errors import NoDeviceError, UserError
from validate.bench.check import check_kernels
from validate.bench.clock import copy_bandwidth, device_facts
from validate.bench.decode import LEAST_BUFFER, PROMPT_TOKENS, Case, measure
from validate.bench.kernels import WINDOW, Setting, kernel_cases
from validate.bench.stock import LABEL as STOCK
from validate.bench.stock import measure_stock
from validate.eviction.device.plan import memory_plan
from validate.eviction.device.steps import is_out_of_memory
from validate.eviction.kernels.ops import ops_for, require_shape, torch_ops
from validate.models.load import model_shape

POLICIES = {"full cache": "fullkv", "snapkv": "snapkv", "rkv": "rkv", "reasonalloc": "reasonalloc"}
# Of the device's free memory, for activations, logits and what the allocator cannot use.
_RESERVE = 0.08
_ROUND_TO = 8
_TRIES = 6
# What results say of a model's shape.
_SHAPE_FIELDS = ("n_layers", "n_query_heads", "n_kv_heads", "head_dim", "dtype")
# Measured on no model: the shape the paper draws, high in shallow layers, low in the middle, rising at last.
_ASSUMED_WAVE = (2.0, 1.2, 0.7, 0.6, 0.8, 1.0, 1.2, 1.4)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is measured: texts of ``lengths`` tokens, and each kernel by ``repeat`` calls.

    No batch above ``most_batch`` is tried, and nothing is begun after ``minutes``.
    """

    entries: int = 1024
    buffer: int = 128
    lengths: tuple[int, ...] = (8192, 16384)
    kernel_batches: tuple[int, ...] = (1, 64)
    most_batch: int = 1024
    repeat: int = 30
    minutes: float = 9.0


Tell = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


def run_bench(
    model: PreTrainedModel,
    name: str,
    plan: BenchPlan,
    *,
    tell: Tell = lambda line: None,
    keep: Keep = lambda result: None,
) -> dict[str, Any]:
    """Measure kernels, then decoding, on the model's device.

    ``tell`` is given a line for everything that begins, ``keep`` the result so far whenever it has grown.

    Returns
    -------
    dict
        ``machine``, ``model``, ``settings``, ``checks``, ``kernels``, ``decode``, ``aims`` and ``skipped``:
        what did not fit into the time or the memory, with the reason.

    Raises
    ------
    NoDeviceError
        When a kernel gives wrong results on this device or cannot be compiled for it, or the device is too
        small for anything.
    UserError
        For a model whose heads the kernels are not made for.
    """
    try:
        return _Bench(model, name, plan, tell, keep).run()
    except Exception as error:
        # Whatever Triton finds wrong has a type of its own, some outside its public modules.
        if type(error).__module__.startswith("triton"):
            reason = " ".join(str(error).split())[:300]
            raise NoDeviceError(f"a kernel cannot be compiled for this device: {reason}") from error
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise NoDeviceError(
                f"the kernels' measurement does not fit into the memory of device '{model.device}'; allowed: "
                "a smaller model, budget or --batches"
            ) from error
        raise


class _Bench:
    def __init__(self, model: PreTrainedModel, name: str, plan: BenchPlan, tell: Tell, keep: Keep) -> None:
        self._model, self._plan, self._tell, self._keep = model, plan, tell, keep
        self._device, self._shape = model.device, model_shape(model.config, model.dtype)
        require_shape(self._shape.head_dim, self._shape.n_query_heads // self._shape.n_kv_heads)
        self._ends = time.monotonic() + 60 * plan.minutes
        self._waves = {"bench": _assumed_wave(self._shape.n_layers, self._shape.n_kv_heads)}
        self._policies = {label: parse_policy(text, buffer=plan.buffer) for label, text in POLICIES.items()}
        self.result: dict[str, Any] = {
            "machine": device_facts(self._device),
            "model": {"name": name}
            | {field: getattr(self._shape, field) for field in _SHAPE_FIELDS}
            | {"weight_bytes": sum(parameter.nbytes for parameter in model.parameters())},
            "settings": {"entries": plan.entries, "buffer": plan.buffer, "assumed_wave": _ASSUMED_WAVE},
        }
        self.result |= {section: [] for section in ("checks", "kernels", "decode", "aims", "skipped")}

    def run(self) -> dict[str, Any]:
        self._tell("copy bandwidth")
        n_bytes = 2**30 if self._device.type == "cuda" else 2**26
        self.result["machine"]["copy_gbs"] = copy_bandwidth(self._device, n_bytes) * 1e-9
        for dtype in dict.fromkeys((torch.float32, self._model.dtype)):
            for ragged in (False, True):
                self._check(dtype, ragged)
        for batch in self._plan.kernel_batches:
            for ragged in (False, True):
                self._kernels(batch, ragged)
        if self._device.type == "cuda":
            # First, since a capture that fails may spoil what comes after it.
            self._decode("rkv", 1, self._plan.lengths[-1], graph=False)
        for label in self._policies:
            self._decode(label, 1, self._plan.lengths[-1])
        if self._may_begin(f"{STOCK} at batch 1, {self._plan.lengths[-1]:,} tokens"):
            self._add("decode", measure_stock(self._model, 1, self._plan.lengths[-1]))
            self._free()
        for length in self._plan.lengths:
            for label in self._policies:
                self._decode_largest(label, length)
        return self.result

    def _setting(self, batch: int, dtype: torch.dtype, ragged: bool) -> Setting:
        shape, plan = self._shape, self._plan
        group_size = shape.n_query_heads // shape.n_kv_heads
        heads = (shape.n_kv_heads, group_size, shape.head_dim)
        return Setting(batch, *heads, plan.entries, plan.buffer, dtype, self._device, ragged)

    def _check(self, dtype: torch.dtype, ragged: bool) -> None:
        if self._may_begin(f"kernels against torch, {dtype}, heads {_of_length(ragged)}"):
            setting = self._setting(2, dtype, ragged)
            for check in check_kernels(ops_for(self._device), torch_ops(), setting):
                self._add("checks", check)

    def _kernels(self, batch: int, ragged: bool) -> None:
        what = f"kernels at batch {batch}, heads {_of_length(ragged)}"
        if not self._may_begin(what):
            return
        setting = self._setting(batch, self._model.dtype, ragged)
        peak = self.result["machine"]["copy_gbs"]
        try:
            for case in kernel_cases(ops_for(self._device), setting, self._plan.repeat):
                gbs = case["bytes"] * 1e-9 / case["seconds"]
                self._add("kernels", case | {"gbs": gbs, "of_copy": gbs / peak})
        except torch.OutOfMemoryError:
            self._skip(what, "out of memory")
        finally:
            self._free()

    def _decode(self, label: str, batch: int, new_tokens: int, graph: bool = True) -> bool:
        """Measure a case and say whether it fitted."""
        what = f"{label} at batch {batch}, {new_tokens:,} tokens{'' if graph else ', without a graph'}"
        if not self._may_begin(what):
            return True
        case = Case(label, self._policies[label], batch, new_tokens, self._plan.entries, graph)
        try:
            self._add("decode", measure(self._model, case, self._waves))
        except NoDeviceError as error:
            self._skip(what, str(error))
            return False
        finally:
            self._free()
        return True

    def _decode_largest(self, label: str, new_tokens: int) -> None:
        policy = self._policies[label]
        large = [case for case in self.result["decode"] if case["policy"] == label and case["batch"] > 1]
        if policy.evicts and large:
            # Its memory and its steps do not depend on the length of the text.
            self._add("decode", large[-1] | {"new_tokens": new_tokens, "same_as": large[-1]["new_tokens"]})
            return
        batch = min(self._plan.most_batch, self._fitting(policy, new_tokens))
        for _ in range(_TRIES):
            if batch < 1:
                break
            if self._decode(label, batch, new_tokens):
                return
            batch = round_down(int(0.9 * batch))
        why = f"{_TRIES} batches did not fit" if batch else "not even one sequence fits"
        self._skip(f"{label} at the largest batch, {new_tokens:,} tokens", why)

    def _fitting(self, policy: Policy, new_tokens: int) -> int:
        """Estimate the largest batch from what the device has free."""
        if self._device.type != "cuda":
            return self._plan.most_batch
        self._free()
        free, _ = torch.cuda.mem_get_info(self._device)
        shape, entries = self._shape, np.full((self._shape.n_layers, 1), self._plan.entries)
        stretches, _ = memory_plan(policy, entries, np.array([PROMPT_TOKENS]), new_tokens, shape.n_kv_heads)
        per_slot = 2 * shape.head_dim * self._model.dtype.itemsize + 4
        window = policy.scorer.window if policy.evicts else 0
        ring = shape.n_layers * shape.n_query_heads * window * shape.head_dim * self._model.dtype.itemsize
        # Logits of a step, in the model's type and while they are copied.
        logits = 3 * self._model.config.get_text_config().vocab_size * self._model.dtype.itemsize
        per_row = int(stretches.sum()) * per_slot + ring + logits
        return round_down(int((1 - _RESERVE) * free / per_row))

    def _may_begin(self, what: str) -> bool:
        if time.monotonic() > self._ends:
            self._skip(what, f"{self._plan.minutes:g} minutes were over")
            return False
        self._tell(what)
        return True

    def _add(self, section: str, entry: dict[str, Any]) -> None:
        self.result[section].append(entry)
        self.result["aims"] = aims(self.result, self._plan)
        self._keep(self.result)

    def _skip(self, what: str, why: str) -> None:
        self.result["skipped"].append({"what": what, "why": why})
        self._keep(self.result)

    def _free(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _of_length(ragged: bool) -> str:
    return f"of {'unequal' if ragged else 'equal'} length"


def round_down(batch: int) -> int:
    """Give the next batch size below that is round, as far as there is one."""
    return batch // _ROUND_TO * _ROUND_TO or batch


def aims(result: dict[str, Any], plan: BenchPlan) -> list[dict[str, Any]]:
    """Set what was measured against what was aimed at, as far as both sides are there.

    Returns
    -------
    list of dict
        ``aim``, ``asked`` (a bound), ``seen`` and ``holds``.
    """
    found: list[dict[str, Any]] = []

    def add(aim: str, asked: float, seen: float | None, at_least: bool = True) -> None:
        if seen is not None:
            holds = seen >= asked if at_least else seen <= asked
            found.append({"aim": aim, "asked": asked, "seen": seen, "holds": bool(holds)})

    decode, longest = result["decode"], plan.lengths[-1]
    bounded = [case for case in decode if case["entries"] and "same_as" not in case]
    for what in ("bytes", "entries"):
        ratios = [case[f"{what}_measured"] / case[f"{what}_planned"] for case in bounded]
        # An allocator gives whole blocks.
        bound = 1.001 if what == "bytes" else 1.0
        add(f"{what} held over those planned, at most", bound, max(ratios, default=None), at_least=False)
    if result["machine"]["device"] == "cpu":
        # The twins' times say nothing of a GPU's.
        return found

    def rate(label: str, large: bool) -> float | None:
        for case in decode:
            is_asked = case["policy"] == label and case["new_tokens"] == longest
            if is_asked and (case["batch"] > 1) == large and (label == STOCK or not case["without_graph"]):
                return case["tokens_per_second"]
        return None

    for large, words in ((False, "batch 1"), (True, "the largest batches")):
        own = rate("reasonalloc", large)
        if own and (plain := rate("rkv", large)):
            add(f"time of reasonalloc over rkv, {words}", 1.02, plain / own, at_least=False)
        for label, of in (("full cache", ""), (STOCK, " of transformers")):
            if own and (full := rate(label, large)):
                what = f"tokens/s of reasonalloc over the full cache{of}, {longest:,} tokens, {words}"
                add(what, 5.0 if large else 1.15, own / full)
    for case in result["kernels"]:
        if case["kernel"] == "attention" and case["batch"] == max(plan.kernel_batches):
            words = f"heads {_of_length(case['ragged'])}"
            add(f"attention's share of copy bandwidth, {words}", 0.7, case["of_copy"])
    return found


def _assumed_wave(n_layers: int, n_kv_heads: int) -> Wave:
    knots = np.linspace(0, 1, len(_ASSUMED_WAVE))
    demand = np.interp(np.linspace(0, 1, n_layers), knots, _ASSUMED_WAVE)
    heads = tuple((float(own),) * n_kv_heads for own in demand)
    return Wave("bench", "", 0.93, tuple(map(float, demand)), heads, (), 0)


def require_measurable(plan: BenchPlan) -> None:
    """Refuse a plan whose budget, buffer or texts are too small for what is timed.

    Raises
    ------
    UserError
    """
    # A quarter of the budget is the least that a head holds beside its buffer.
    for name, value, least in (("budget", plan.entries, 4 * WINDOW), ("buffer", plan.buffer, LEAST_BUFFER)):
        if value < least:
            raise UserError(f"--{name} is {value}; allowed: {least} or more")
    shortest = 2 * (plan.entries + plan.buffer)
    if min(plan.lengths) < shortest:
        raise UserError(
            f"--lengths holds {min(plan.lengths)}; allowed: {shortest} or more, twice what is held at most"
        )
