"""Record the rows of a prompts file; rows that are already recorded are left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from traces.errors import TraceError, UserError
from traces.store import SUFFIX, open_trace
from traces.trace import Trace
from validate.models.load import LoadedModel, dtype_name
from validate.models.next_token import Sampling
from validate.problems.prompts import Prompt, encode_completion, encode_prompt
from validate.record.decode import (
    record_decode,
    record_rescore,
    refuse_length_dependent_rope,
    require_full_cache,
)
from validate.record.texts import complete


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How each row is recorded: decoded, or with ``rescore`` from the completion that it holds.

    Raises
    ------
    UserError
        For ``max_new_tokens`` below 1.
    """

    rescore: bool = False
    max_new_tokens: int = 1024
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    use_chat_template: bool = True
    with_values: bool = False
    n_draws: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; allowed: 1 or more")


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one prompt: ``recorded``, ``kept`` (it was there already) or ``failed`` with an error.

    ``name`` is the trace's file name without its ending; ``correct`` is None where answers of its family
    cannot be read.
    """

    name: str
    status: str
    prompt_tokens: int | None = None
    total_tokens: int | None = None
    correct: bool | None = None
    error: str = ""


def record_row(
    loaded: LoadedModel,
    prompt: Prompt,
    out: Path,
    settings: RowSettings,
    completion_ids: Sequence[int] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Row:
    """Record one prompt as ``out/NAME.kvtrace``, or report why not; an interrupt passes through.

    ``completion_ids`` are what the model has written already, of `complete_rows`.
    """
    name = prompt.file_stem
    try:
        status, trace = _record(loaded, prompt, out / f"{name}{SUFFIX}", settings, completion_ids, on_tokens)
    except UserError as error:
        return Row(name, "failed", error=str(error))
    except Exception as error:  # a full disk or a full device: the other rows may still fit
        return Row(name, "failed", error=_reason(error))
    correct = trace.manifest.task.get("correct")
    return Row(name, status, trace.prompt_tokens, trace.total_tokens, correct)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def complete_rows(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    out: Path,
    settings: RowSettings,
    on_tokens: Callable[[int], None] | None = None,
) -> dict[str, list[int]]:
    """Let the model write the texts of several rows together.

    Returns
    -------
    dict of str to list of int
        New tokens by the row's id. Rows that are recorded already are left out, and so are all where one
        cannot be decoded: recorded by itself, each tells what is wrong with it.

    Raises
    ------
    UserError
        Where they cannot be decoded together for another reason, such as too little memory.
    """
    missing = [
        prompt
        for prompt in prompts
        if settings.overwrite or _open_if_there(out / f"{prompt.file_stem}{SUFFIX}") is None
    ]
    if not missing:
        return {}
    try:
        encoded = [
            encode_prompt(loaded.tokenizer, own.text, settings.use_chat_template, own.system)
            for own in missing
        ]
        longest = max(map(len, encoded)) + settings.max_new_tokens
        refuse_length_dependent_rope(loaded.model, longest)
        require_full_cache(loaded.model, longest)
        texts = complete(loaded, encoded, settings.max_new_tokens, settings.sampling, on_tokens)
    except UserError:
        return {}
    except Exception as error:
        raise UserError(
            f"{len(missing)} texts cannot be decoded together: {_reason(error)}; each is decoded by itself"
        ) from error
    return {prompt.id: text for prompt, text in zip(missing, texts, strict=True)}


def _record(
    loaded: LoadedModel,
    prompt: Prompt,
    path: Path,
    settings: RowSettings,
    written_ids: Sequence[int] | None,
    on_tokens: Callable[[int], None] | None,
) -> tuple[str, Trace]:
    prompt_ids = encode_prompt(loaded.tokenizer, prompt.text, settings.use_chat_template, prompt.system)
    completion_ids = encode_completion(loaded.tokenizer, prompt.completion or "") if settings.rescore else []
    if not settings.overwrite and (kept := _open_if_there(path)) is not None:
        _refuse_other_recording(kept, loaded, [*prompt_ids, *completion_ids], settings)
        return "kept", kept
    sampling = settings.sampling
    if settings.rescore:
        record = partial(
            record_rescore, loaded.model, prompt_ids, completion_ids, path, tokenizer=loaded.tokenizer
        )
    elif written_ids is not None:
        record = partial(
            record_rescore,
            loaded.model,
            prompt_ids,
            written_ids,
            path,
            tokenizer=loaded.tokenizer,
            sampling=sampling.as_fields() | {"max_new_tokens": settings.max_new_tokens},
            seed=sampling.seed if sampling.do_sample else None,
        )
    else:
        record = partial(
            record_decode,
            loaded.model,
            loaded.tokenizer,
            prompt_ids,
            path,
            max_new_tokens=settings.max_new_tokens,
            **asdict(sampling),
        )
    trace = record(
        with_values=settings.with_values,
        n_draws=settings.n_draws,
        overwrite=settings.overwrite,
        model_name=loaded.name,
        model_revision=loaded.revision,
        task=prompt.task,
        on_tokens=on_tokens,
    )
    return "recorded", trace


def _open_if_there(path: Path) -> Trace | None:
    try:
        return open_trace(path)
    except TraceError:
        # Missing or unfinished: record it. What the writer must not touch, it refuses itself.
        return None


def _refuse_other_recording(
    trace: Trace, loaded: LoadedModel, token_ids: list[int], settings: RowSettings
) -> None:
    """Refuse to take a finished trace for this row when it was recorded from something else.

    It has to begin with ``token_ids``: the prompt, and the completion when rescoring.
    """
    manifest, sampling = trace.manifest, settings.sampling
    asked: dict[str, object] = {
        "model": loaded.name,
        "model_revision": loaded.revision,
        "dtype": dtype_name(loaded.model.dtype),
    }
    if settings.rescore:
        asked["origin"] = "rescored"
    else:
        asked["seed"] = sampling.seed if sampling.do_sample else None
        asked["sampling"] = sampling.as_fields() | {"max_new_tokens": settings.max_new_tokens}
    if settings.with_values:
        asked["has_values"] = True
    if settings.n_draws:
        asked["n_draws"] = settings.n_draws
    for name, value in asked.items():
        found = getattr(manifest, name)
        if found != value:
            raise UserError(
                f"{trace.path} is another recording: its {name} is {found!r}, asked {value!r}; "
                "allowed: --overwrite, or another --out"
            )
    if trace.token_ids[: len(token_ids)].tolist() != token_ids:
        raise UserError(
            f"{trace.path} is a recording of another text; allowed: --overwrite, or another --out"
        )
