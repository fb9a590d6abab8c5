"""Options that verbs with a model share, and what they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from simulator.cli.completion import policies
from traces.documents import read_json
from traces.errors import UserError
from traces.extras import require_extra
from validate.problems.sets import SETS

if TYPE_CHECKING:
    from simulator.budget import Budget
    from simulator.policies.language import Policy
    from validate.models.next_token import Sampling

SHIPPED_PROMPTS = f"a set that ships: {', '.join(SETS)}"
DEFAULT_POLICIES = "streamingllm,snapkv,rkv,pyramid-rkv,rkv+wave,rkv+utility,reasonalloc,random,random-prompt"
DEFAULT_BUDGETS = "10%,15%,20%,30%,40%,50%"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="'reference', a name of sim models list, a GGUF file, a folder with a saved model, or a hub id.",
        show_default="reference",
    ),
]
RandomWeights = Annotated[
    str | None, typer.Option(help="Instead: random weights of this shape, such as R1-Llama-8B.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, float16 or bfloat16.", show_default="float32 on a CPU")
]
TracesDtype = Annotated[
    str | None, typer.Option(help="auto, float32, float16 or bfloat16.", show_default="the trace's")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
NoChat = Annotated[bool, typer.Option("--no-chat", help="Do not apply the tokenizer's chat template.")]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        help="Comma list.",
        show_default=DEFAULT_POLICIES.replace(",", ", "),
        autocompletion=policies,
    ),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option("--budget", "-b", help="Comma list.", show_default=DEFAULT_BUDGETS.replace(",", ", ")),
]
Configs = Annotated[
    Path | None,
    typer.Option(help='Instead of both: JSON list of {"policy": "rkv:alpha=0.2", "budget": "20%"}.'),
]
Limit = Annotated[int | None, typer.Option(help="Take only the first N problems.")]
Seed = Annotated[int, typer.Option(help="Of sampling and of policies that draw at random.")]
Processes = Annotated[int, typer.Option("--jobs", help="Processes; 0 uses all cores (one on a GPU).")]
RowsOut = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the rows, a file per trace; an interrupted run goes on there."),
]
Report = Annotated[Path | None, typer.Option(help="Write charts and tables to this HTML file.")]


class _Configuration(TypedDict):
    """An entry of --configs; whatever else it says is not read."""

    policy: str
    budget: str | int | float


def asked_cells(
    policy: list[str] | None, budget: list[str] | None, configs: Path | None, buffer: int | None
) -> list[tuple[Policy, Budget]]:
    """Read what is to be run: the product of policies and budgets, or the pairs of a file.

    Raises
    ------
    UserError
        If both are given, or one cannot be read.
    """
    from simulator.budget import parse_budget, parse_budgets
    from simulator.policies.language import parse_policies, parse_policy, require_buffers

    if configs is None:
        policies = parse_policies(policy or [DEFAULT_POLICIES], buffer)
        return [(own, each) for each in parse_budgets(budget or [DEFAULT_BUDGETS]) for own in policies]
    overrides = {} if buffer is None else {"buffer": buffer}
    if policy or budget:
        raise UserError("--configs stands instead of --policy and --budget; give one or the other")
    rows = read_json(configs, f"--configs {configs}", list[_Configuration])
    if not rows:
        raise UserError(f"--configs {configs} holds no configuration; allowed: one or more")
    cells = [(parse_policy(row["policy"], **overrides), parse_budget(row["budget"])) for row in rows]
    require_buffers((own for own, _ in cells), buffer)
    return list(dict.fromkeys(cells))


def asked_sampling(temperature: float | None, top_p: float | None, seed: int) -> Sampling:
    """Give how tokens are chosen: greedily without a temperature."""
    from validate.models.next_token import Sampling

    return Sampling(
        temperature is not None,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
    )


def make_folder(out: Path) -> None:
    """Make the folder that ``--out`` names.

    Raises
    ------
    UserError
        If it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}; allowed: a folder") from None


def require_report(report: Path | None) -> None:
    """Refuse ``--report`` where what draws it is not installed.

    Raises
    ------
    UserError
    """
    if report is not None:
        require_extra("--report", "altair", "vl_convert", "jinja2")
