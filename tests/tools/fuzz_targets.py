"""What is read from outside: a sound file of each kind, how it is changed and read, and what it then means.

A target's ``expected`` is an independent reading. Files that carry a checksum have to mean what they meant
before; those that people write have to mean what they say.
"""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import mutations as change
import naive_traces as naive
import numpy as np
from fuzz_kind import Target, only_json
from fuzz_tables import beside_targets, live_target, sweep_folder_targets, table_targets


def make_targets(folder: Path) -> list[Target]:
    """Write a sound file of every kind and give the targets."""
    trace = naive.small_trace(
        folder / "t.kvtrace", n_tokens=12, prompt_tokens=5, vocabulary={0: "a", 4: "b"},
        task={"id": "p1", "family": "walk", "answer": "ka"}, model="tiny",
    )  # fmt: skip
    return [
        *_trace_targets(trace.path),
        _wave_target(folder, trace),
        _sweep_target(folder, trace.path),
        _configs_target(folder),
        _prompts_target(folder),
        _shares_target(folder, trace),
        *table_targets(folder, trace.path),
        *beside_targets(folder, trace.path),
        *sweep_folder_targets(folder, trace.path),
        live_target(folder),
    ]


def _replay_of(trace: Path, policies: str) -> list[str]:
    asked = ["--budget", "50%", "--buffer", "2", "--format", "json", "--jobs", "1"]
    return ["replay", "--trace", str(trace), "--policy", policies, *asked]


def _trace_targets(path: Path) -> list[Target]:
    """Give targets for the manifest, for a file of arrays, and for one whose checksums were made to fit."""
    from traces import check_trace, open_trace

    sound = {file: file.read_bytes() for file in path.iterdir() if file.is_file()}

    def meaning(_: Path) -> Any:
        trace = open_trace(path)
        check_trace(trace)
        arrays = [
            [read(layer).tobytes() for read in (trace.queries, trace.keys, trace.lse, trace.values)]
            for layer in range(trace.shape.n_layers)
        ]
        return trace.manifest.to_json(), trace.text(), arrays

    before = meaning(path)
    commands = [["trace", "validate", str(path)], _replay_of(path, "expected-attention,random")]

    def resealed(content: bytes, rng: random.Random) -> bytes:
        """Change the header or the numbers, and make every checksum fit."""
        length = int.from_bytes(content[:8], "little")
        header, numbers = content[8 : 8 + length], content[8 + length :]
        if rng.random() < 0.7:
            header = change.changed_json(header, rng)
            content = len(header).to_bytes(8, "little") + header + numbers
        else:
            content = content[: 8 + length] + change.changed_bytes(numbers, rng)
        (path / "layer_000.safetensors").write_bytes(content)
        (path / "manifest.json").write_bytes(sound[path / "manifest.json"])
        naive.reseal(path)
        return content

    def plausible(_: bytes) -> Any:
        # Whoever can make all checksums fit has written another trace; that it holds together, `check_trace`
        # and the replays of the commands say.
        return meaning(path)

    targets = [
        Target("manifest", path / "manifest.json", change.changed_json, meaning, lambda _: before, commands),
        Target(
            "tensors",
            path / "layer_001.safetensors",
            change.changed_bytes,
            meaning,
            lambda _: before,
            commands,
        ),
        Target(
            "tokens", path / "tokens.safetensors", change.changed_bytes, meaning, lambda _: before, commands
        ),
        Target("tensors, resealed", path / "layer_000.safetensors", resealed, meaning, plausible, commands),
    ]
    for target in targets:
        target.beside = dict(sound)
    return targets


def _wave_target(folder: Path, trace: Any) -> Target:
    from simulator.engine.demand import calibrate
    from simulator.policies.wave import read_wave

    path = folder / "wave.json"
    other = naive.small_trace(folder / "calibration.kvtrace", seed=5, model="tiny")
    calibrate([other], steps_per_trace=8).write(path)

    def expected(content: bytes) -> Any:
        document = only_json(content)
        return (
            document["model"],
            [float(value) for value in document["demand"]],
            [[float(value) for value in row] for row in document["head_demand"]],
            document["trace_ids"],
        )

    def meaning(place: Path) -> Any:
        wave = read_wave(place)
        assert len({len(row) for row in wave.head_demand}) == 1
        assert len(wave.head_demand) == len(wave.demand)
        assert 0 < wave.rho < 1
        assert type(wave.n_steps) is int
        return wave.model, [*wave.demand], [[*row] for row in wave.head_demand], [*wave.trace_ids]

    return Target(
        "wave",
        path,
        change.changed_json,
        meaning,
        expected,
        [[*_replay_of(trace.path, "streamingllm+wave"), "--wave", str(path)]],
    )


def _sweep_target(folder: Path, trace: Path) -> Target:
    from simulator.budget import parse_budget
    from simulator.policies.language import parse_policy
    from simulator.sweep.spec import read_spec

    path = folder / "sweep.toml"
    path.write_text(
        f"out = '{folder / 'sweep-out'}'\ntraces = ['{trace}']\npolicies = ['streamingllm', 'random']\n"
        "budgets = ['50%', 6]\nseeds = [0, 3]\n"
        "parameters = { buffer = [2] }\nsampling = { queries = '1/2' }\n"
        "[[grid]]\npolicy = 'recency'\nparameters = { buffer = [3, 4] }\n"
    )

    def listed(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    def expected(content: bytes) -> Any:
        # Only what can be said without knowing policies: seeds, budgets as numbers and units, traces, count.
        document = tomllib.loads(content.decode("utf-8-sig"))
        budgets = [str(parse_budget(value)) for value in listed(document.get("budgets", []))]
        own = [
            [str(parse_budget(value)) for value in listed(grid.get("budgets", budgets))]
            for grid in document.get("grid", [])
        ]
        policies = [parse_policy(text).name for text in listed(document.get("policies", []))]
        policies += [parse_policy(grid["policy"]).name for grid in document.get("grid", [])]
        return (
            set(listed(document.get("seeds", 0))),
            set(sum(own, budgets if document.get("policies") else [])),
            set(policies),
            listed(document["traces"]),
        )

    def meaning(place: Path) -> Any:
        spec = read_spec(place)
        return (
            {setting.seed for setting in spec.settings},
            {str(setting.budget) for setting in spec.settings},
            {setting.policy.name for setting in spec.settings},
            [*spec.traces],
        )

    return Target("sweep", path, change.changed_toml, meaning, expected, [["sweep", str(path), "--dry-run"]])


def _configs_target(folder: Path) -> Target:
    from simulator.budget import parse_budget
    from simulator.policies.language import parse_policy
    from validate.cli.options import asked_cells

    path = folder / "winners.json"
    rows = [
        {"policy": "rkv+cake:window=30,kernel_size=1", "budget": "20%", "role": "winner", "held_out": 0.01},
        {"policy": "rkv:buffer=32", "budget": "512KiB"},
        {"policy": "random", "budget": 64},
    ]
    path.write_text(json.dumps(rows))

    def expected(content: bytes) -> Any:
        return [(parse_policy(row["policy"]), parse_budget(row["budget"])) for row in only_json(content)]

    def meaning(place: Path) -> Any:
        return asked_cells(None, None, place, None)

    return Target(
        "configs", path, change.changed_json, meaning, lambda content: [*dict.fromkeys(expected(content))]
    )


def _prompts_target(folder: Path) -> Target:
    from validate.problems.prompts import read_prompts

    path = folder / "prompts.jsonl"
    rows = [
        {"id": "p1", "prompt": "walk ka gi ;", "answer": "ka", "family": "walk"},
        {"id": 7, "problem": "What is 1 + 1?", "answer": 2, "completion": "It is \\boxed{2}."},
        {"question": "Où?", "answer": "là", "level": 5},
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def text(value: Any) -> str | None:
        return None if value is None else str(value)

    def expected(content: bytes) -> Any:
        found = []
        for line in content.decode("utf-8-sig").split("\n"):
            if line.strip():
                row = only_json(line.encode())
                prompt = next(
                    row[name] for name in ("prompt", "problem", "question") if row.get(name) is not None
                )
                found.append((prompt, text(row.get("answer")), row.get("completion"), row.get("family")))
        return found

    def meaning(place: Path) -> Any:
        prompts = read_prompts(place)
        assert len({prompt.file_stem for prompt in prompts}) == len(prompts)
        return [(prompt.text, prompt.answer, prompt.completion, prompt.family) for prompt in prompts]

    return Target("prompts", path, change.changed_lines, meaning, expected)


def _shares_target(folder: Path, trace: Any) -> Target:
    from simulator.policies.parts import LayerRequest
    from simulator.policies.tables import head_shares

    path = folder / "shares.json"
    path.write_text("[[1, 2.5], [0.5, 1]]")
    request = LayerRequest(2, 8, 0, trace.model, "", trace.trace_id, {}, n_kv_heads=2)

    def expected(content: bytes) -> Any:
        return np.array(only_json(content), dtype=float).tolist()

    return Target(
        "head shares",
        path,
        change.changed_json,
        lambda place: head_shares(str(place), request).tolist(),
        expected,
    )
