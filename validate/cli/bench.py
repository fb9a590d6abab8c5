"""The verb ``sim validate bench``: what eviction costs and gains on this device."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import shared
from traces.errors import NoDeviceError, UserError
from validate.cli import options
from validate.models.shapes import PREFIX, asked_model

if TYPE_CHECKING:
    from rich.console import Console

# What is measured on a GPU, and what a CPU can do in seconds to show how it goes.
_GPU_SHAPE, _CPU_SHAPE = "R1-Llama-8B", "tiny"
_GPU_BUDGET, _CPU_BUDGET = 1024, 64
_GPU_LENGTHS, _CPU_LENGTHS = "8192,16384", "512,1024"
_GPU_BATCH, _CPU_BATCH = 1024, 4


def bench(
    gpu: Annotated[bool, typer.Option("--gpu", help="Refuse to run without a GPU.")] = False,
    device: options.Device = "auto",
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="Shape to run with random weights.", show_default=f"{_GPU_SHAPE}, {_CPU_SHAPE} on a CPU"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead: a folder with a saved model, or a hub id.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16.", show_default="bfloat16, float32 on a CPU"),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            "-b",
            help="Entries per KV head.",
            show_default=f"{_GPU_BUDGET}, {_CPU_BUDGET} on a CPU",
        ),
    ] = None,
    buffer: Annotated[int, typer.Option(help="Entries added between compressions.")] = 128,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens to write, comma list.", show_default=f"{_GPU_LENGTHS}; {_CPU_LENGTHS} on a CPU"
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="Batches that kernels are timed at, comma list.")] = "1,64",
    most_batch: Annotated[
        int | None,
        typer.Option(
            help="Decode no larger batch than this, even where it would fit.",
            show_default=f"{_GPU_BATCH}, {_CPU_BATCH} on a CPU",
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
    on_gpu = target.type == "cuda"
    source = asked_model(model, random_weights, PREFIX + (_GPU_SHAPE if on_gpu else _CPU_SHAPE))
    if budget is None:
        budget = _GPU_BUDGET if on_gpu else _CPU_BUDGET
    if most_batch is None:
        most_batch = _GPU_BATCH if on_gpu else _CPU_BATCH
    if lengths is None:
        lengths = _GPU_LENGTHS if on_gpu else _CPU_LENGTHS
    shared.require_counts(budget=budget, buffer=buffer, most_batch=most_batch)
    if not minutes > 0:
        raise UserError(f"--minutes is {minutes:g}; allowed: above 0")
    if out is not None:
        options.make_folder(out)
    from validate.bench.run import BenchPlan, require_measurable, run_bench

    plan = BenchPlan(
        entries=budget,
        buffer=buffer,
        lengths=_numbers("--lengths", lengths),
        kernel_batches=_numbers("--batches", batches),
        most_batch=most_batch,
        minutes=minutes,
    )
    require_measurable(plan)
    kind = dtype or ("bfloat16" if on_gpu else "float32")

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    tell(f"{source} on {target}")
    loaded = load_model(source, kind, str(target))
    place: list[Path] = []

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            place[:] = [_write(result, out)]

    result = run_bench(loaded.model, loaded.name, plan, tell=tell, keep=keep)
    if json:
        from json import dumps

        print(dumps(result, indent=1))
    else:
        print_device_bench(result)
    for path in place:
        tell(f"written to {path}")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} is '{text}'; allowed: a comma list of numbers of 1 or more")
    return tuple(sorted({int(part) for part in parts}))


def _write(result: dict[str, Any], folder: Path) -> Path:
    from json import dumps

    from traces.atomic import write_text

    name = re.sub(r"[^a-z0-9]+", "-", f"{result['machine']['device']}-{result['model']['name']}".lower())
    path = folder / f"{name.strip('-')}.json"
    write_text(path, dumps(result, indent=1) + "\n")
    return path


def print_device_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the device, its kernels, its decode steps and what was aimed at, as ``run_bench`` gives them."""
    from simulator.results.layout import plain_console

    console = console or plain_console(120)
    machine, model, settings = result["machine"], result["model"], result["settings"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "transformers", "triton") if machine[name]
    )
    lines = [
        f"{machine['device']}: {machine['copy_gbs']:,.0f} GB/s copied within its memory ({versions}).",
        f"{model['name']}: {model['n_layers']} layers, {model['n_query_heads']} query and "
        f"{model['n_kv_heads']} KV heads, {model['dtype']}, {model['weight_bytes'] / 1e9:.3g} GB of weights. "
        f"Budget {settings['entries']:,}, buffer {settings['buffer']}.",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if machine["device"] == "cpu":
        console.print("A CPU shows how the measurement goes. Its times say nothing of a GPU.")
    if result["checks"]:
        share = max(check["error"] / check["allowed"] for check in result["checks"] if check["allowed"])
        console.print(
            f"{len(result['checks'])} checks of kernels against torch passed: decisions equal, numbers within"
            f" {share:.1%} of the error allowed.",
            highlight=False,
        )
    if result["kernels"]:
        console.print(_kernel_table(result["kernels"]))
    if result["decode"]:
        console.print(_decode_table(result["decode"]))
    for aim in result["aims"]:
        word = "holds" if aim["holds"] else "MISSED"
        console.print(
            f"{word:7}{aim['aim']}: {aim['seen']:.3g} (asked {aim['asked']:g})",
            highlight=False,
            soft_wrap=True,
        )
    for skipped in result["skipped"]:
        console.print(f"not measured: {skipped['what']}: {skipped['why']}", highlight=False, soft_wrap=True)


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
