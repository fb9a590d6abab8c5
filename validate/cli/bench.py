"""The verb ``sim validate bench``: what eviction costs and gains on this device."""

from __future__ import annotations

import re
import sys
from functools import partial
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from simulator.cli import shared
from traces.atomic import write_text
from traces.errors import NoDeviceError, UserError
from validate.cli import options
from validate.models.shapes import PREFIX, asked_model

if TYPE_CHECKING:
    from rich.console import Console


class _Usual(NamedTuple):
    """What is measured unless another is asked for."""

    shape: str
    dtype: str
    budget: int
    lengths: str
    most_batch: int


_GPU = _Usual("R1-Llama-8B", "bfloat16", 1024, "8192,16384", 1024)
# What a CPU can do in seconds to show how it goes.
_CPU = _Usual("tiny", "float32", 64, "512,1024", 4)


def _usually(field: str) -> str:
    gpu, cpu = getattr(_GPU, field), getattr(_CPU, field)
    return f"{gpu}{';' if ',' in str(gpu) else ','} {cpu} on a CPU"


def bench(
    gpu: Annotated[bool, typer.Option("--gpu", help="Refuse to run without a GPU.")] = False,
    device: options.Device = "auto",
    random_weights: Annotated[
        str | None,
        typer.Option(help="Shape to run with random weights.", show_default=_usually("shape")),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead: a folder with a saved model, or a hub id.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16.", show_default=_usually("dtype"))
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option("--budget", "-b", help="Entries per KV head.", show_default=_usually("budget")),
    ] = None,
    buffer: Annotated[int, typer.Option(help="Entries added between compressions.")] = 128,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens to write, comma list.", show_default=_usually("lengths"))
    ] = None,
    batches: Annotated[str, typer.Option(help="Batches that kernels are timed at, comma list.")] = "1,64",
    most_batch: Annotated[
        int | None,
        typer.Option(
            help="Decode no larger batch than this, even where it would fit.",
            show_default=_usually("most_batch"),
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Begin nothing after so many minutes.")] = 9.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results, as JSON named after the device.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    quiet: shared.Quiet = False,
) -> None:
    """Measure what eviction costs and gains on this device.

    That is kernels, decode steps, compressions and memory, with random weights.
    Compares the full cache, SnapKV, R-KV and ReasonAlloc at one budget, at batch 1 and at the largest that
    fits. On a GPU this takes under ten minutes.
    """
    from validate.models.load import load_model, resolve_device

    target = resolve_device("cuda" if gpu and device == "auto" else device)
    if gpu and target.type != "cuda":
        raise NoDeviceError(f"--gpu is given with --device {device}; allowed: cuda, cuda:N")
    usual = _GPU if target.type == "cuda" else _CPU
    source = asked_model(model, random_weights, PREFIX + usual.shape)
    budget = usual.budget if budget is None else budget
    most_batch = usual.most_batch if most_batch is None else most_batch
    shared.require_counts(budget=budget, buffer=buffer, most_batch=most_batch)
    if not minutes > 0:
        raise UserError(f"--minutes is {minutes:g}; allowed: above 0")
    if out is not None:
        options.make_folder(out)
    from validate.bench.run import BenchPlan, require_measurable, run_bench

    plan = BenchPlan(
        entries=budget,
        buffer=buffer,
        lengths=_numbers("--lengths", usual.lengths if lengths is None else lengths),
        kernel_batches=_numbers("--batches", batches),
        most_batch=most_batch,
        minutes=minutes,
    )
    require_measurable(plan)

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    tell(f"{source} on {target}")
    loaded = load_model(source, dtype or usual.dtype, str(target))

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            write_text(_place(result, out), dumps(result, indent=1) + "\n")

    result = run_bench(loaded.model, loaded.name, plan, tell=tell, keep=keep)
    if json:
        print(dumps(result, indent=1))
    else:
        print_device_bench(result)
    if out is not None:
        tell(f"written to {_place(result, out)}")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} is '{text}'; allowed: a comma list of numbers of 1 or more")
    return tuple(sorted({int(part) for part in parts}))


def _place(result: dict[str, Any], folder: Path) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", f"{result['machine']['device']}-{result['model']['name']}".lower())
    return folder / f"{name.strip('-')}.json"


def print_device_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the device, its kernels, its decode steps and what was aimed at, as ``run_bench`` gives them."""
    from simulator.results.layout import plain_console

    console = console or plain_console(120)
    say = partial(console.print, highlight=False, soft_wrap=True)
    machine, model, settings = result["machine"], result["model"], result["settings"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "transformers", "triton") if machine[name]
    )
    say(f"{machine['device']}: {machine['copy_gbs']:,.0f} GB/s copied within its memory ({versions}).")
    say(
        f"{model['name']}: {model['n_layers']} layers, {model['n_query_heads']} query and "
        f"{model['n_kv_heads']} KV heads, {model['dtype']}, {model['weight_bytes'] / 1e9:.3g} GB of weights. "
        f"Budget {settings['entries']:,}, buffer {settings['buffer']}."
    )
    if machine["device"] == "cpu":
        say("A CPU shows how the measurement goes. Its times say nothing of a GPU.")
    if result["checks"]:
        share = max(check["error"] / check["allowed"] for check in result["checks"] if check["allowed"])
        say(
            f"{len(result['checks'])} checks of kernels against torch passed: decisions equal, numbers within"
            f" {share:.1%} of the error allowed."
        )
    if result["kernels"]:
        console.print(_kernel_table(result["kernels"]))
    if result["decode"]:
        console.print(_decode_table(result["decode"]))
    for aim in result["aims"]:
        word = "holds" if aim["holds"] else "MISSED"
        say(f"{word:7}{aim['aim']}: {aim['seen']:.3g} (asked {aim['asked']:g})")
    for skipped in result["skipped"]:
        say(f"not measured: {skipped['what']}: {skipped['why']}")


def _kernel_table(cases: list[dict[str, Any]]) -> Any:
    shown = shared.number_table(
        "\nkernel", "\nbatch", "heads of\nlength", "\nmicroseconds", "\nGB/s", "of\ncopy", "\nTFLOP/s"
    )
    for case in cases:
        tflops = case["gflop"] * 1e-3 / case["seconds"] if case["gflop"] else None
        shown.add_row(
            case["kernel"],
            str(case["batch"]),
            "unequal" if case["ragged"] else "equal",
            f"{case['seconds'] * 1e6:,.0f}",
            f"{case['gbs']:,.0f}",
            f"{case['of_copy']:.0%}",
            "" if tflops is None else f"{tflops:,.1f}",
        )
    return shown


def _decode_table(cases: list[dict[str, Any]]) -> Any:
    shown = shared.number_table(
        "\npolicy", "\nbatch", "\ntokens", "\ntokens/s", "ms a\nstep", "ms a com-\npression", "cache\nMB",
        "peak\nGB", "\ngraph",
    )  # fmt: skip
    for case in cases:
        compression, peak = case["compression_seconds"], case["peak_bytes"]
        shown.add_row(
            case["policy"],
            str(case["batch"]),
            f"{case['new_tokens']:,}",
            f"{case['tokens_per_second']:,.1f}",
            f"{case['step_seconds'] * 1e3:.2f}",
            "" if compression is None else f"{compression * 1e3:.2f}",
            f"{case['bytes_measured'] / 1e6:,.1f}",
            "" if peak is None else f"{peak / 1e9:.1f}",
            "yes" if case["is_captured"] else "no",
        )
    return shown
