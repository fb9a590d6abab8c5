"""Run a model with its full cache and write what attention saw as a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from traces.errors import UserError
from traces.shape import ModelShape
from traces.trace import Trace
from traces.writer import TraceWriter
from validate.models.attention_hook import recording
from validate.models.load import LENGTH_DEPENDENT_ROPE, rope_parameters, stop_token_ids
from validate.models.next_token import Sampling, forward_settings
from validate.models.vocabulary import n_token_ids, vocabulary_of
from validate.problems.grading import graded
from validate.record.recorder import TraceRecorder, observed_shape, to_numpy
from validate.record.sensitivity import sensitivities

CHUNK = 512
# Decoded tokens of a layer that wait to be written together. A write per layer and step costs a
# third of a small model's time on a CPU; a transfer per layer and step costs more on a device, which
# therefore holds a whole chunk.
HOLD_ON_HOST = 16


def record_decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt_ids: Sequence[int],
    path: str | Path,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
    with_values: bool = False,
    n_draws: int = 0,
    chunk: int = CHUNK,
    overwrite: bool = False,
    model_name: str = "custom",
    model_revision: str = "",
    task: Mapping[str, object] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Trace:
    """Decode with the full cache and record queries, keys and log-sum-exp of every token.

    The last token is fed to the model as well, so that every token of the trace has attended.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase or None
        For the trace's vocabulary and the answer; None leaves both out.
    prompt_ids : sequence of int
        At least one token; read in passes of ``chunk`` tokens.
    path : str or Path
        ``NAME.kvtrace``; it appears only when the recording is complete.
    max_new_tokens : int
        At least 1.
    do_sample, temperature, top_p, seed
        As `Sampling`.
    stop_ids : iterable of int, optional
        Token ids that end the text; by default the model's own.
    with_values : bool
        As `TraceWriter`.
    n_draws : int
        Of sensitivities that are recorded as well; 0 for none. See `sensitivities`.
    chunk : int
    overwrite : bool
        As `TraceWriter`.
    model_name, model_revision : str
    task : mapping, optional
        Problem id, family and answer. The answer is graded.
    on_tokens : callable, optional
        Told how many tokens have been run so far.

    Raises
    ------
    UserError
        For settings out of range and for a model that cannot be recorded.
    """
    sampling = Sampling(do_sample, temperature, top_p, seed)
    if not 1 <= max_new_tokens < 2**31:
        raise UserError(f"max_new_tokens is {max_new_tokens}; allowed: 1 to 2,147,483,647")
    stops = set(stop_token_ids(model, tokenizer) if stop_ids is None else stop_ids)
    generator = sampling.generator()
    longest = len(prompt_ids) + max_new_tokens
    with _open_run(model, path, longest, with_values, n_draws, chunk, overwrite, on_tokens) as run:
        logits = run.read(prompt_ids)
        for _ in range(max_new_tokens):
            token = sampling.choose(logits, generator)
            logits = run.read([token])
            if token in stops:
                break
        return run.finish(
            tokenizer,
            len(prompt_ids),
            task,
            model=model_name,
            model_revision=model_revision,
            origin="decoded",
            sampling=sampling.as_fields() | {"max_new_tokens": max_new_tokens},
            seed=seed if do_sample else None,
        )


def record_rescore(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_values: bool = False,
    n_draws: int = 0,
    chunk: int = CHUNK,
    overwrite: bool = False,
    model_name: str = "custom",
    model_revision: str = "",
    task: Mapping[str, object] | None = None,
    sampling: Mapping[str, object] | None = None,
    seed: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Trace:
    """Record a given completion without decoding it, in passes of ``chunk`` tokens.

    In exact arithmetic this is the trace that decoding the same tokens would give. Parameters are
    those of `record_decode`; ``sampling`` and ``seed`` are what the trace says of how the completion was
    decoded, if it was.

    Raises
    ------
    UserError
        For an empty completion, for a text longer than a length-dependent RoPE treats alike, and
        for a model that cannot be recorded.
    """
    if len(completion_ids) < 1:
        raise UserError("the completion has 0 tokens; allowed: 1 or more")
    longest = len(prompt_ids) + len(completion_ids)
    refuse_length_dependent_rope(model, longest)
    with _open_run(model, path, longest, with_values, n_draws, chunk, overwrite, on_tokens) as run:
        # Attention does not see where one pass over the text ends and the next begins.
        run.read(prompt_ids)
        run.read(completion_ids)
        return run.finish(
            tokenizer,
            len(prompt_ids),
            task,
            model=model_name,
            model_revision=model_revision,
            origin="rescored",
            sampling=sampling,
            seed=seed,
        )


class _FullCacheRun:
    """One sequence through a model, its growing cache and its recording."""

    def __init__(
        self,
        model: PreTrainedModel,
        recorder: TraceRecorder,
        n_draws: int,
        chunk: int,
        on_tokens: Callable[[int], None] | None,
    ) -> None:
        self.model = model
        self.recorder = recorder
        self.n_draws = n_draws
        self.chunk = chunk
        self.on_tokens = on_tokens
        self.token_ids: list[int] = []
        self.cache = DynamicCache()
        self._settings = forward_settings(model)

    def read(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Feed tokens to the model and return the logits after the last, on its device."""
        if len(token_ids) < 1:
            raise UserError("the prompt has 0 tokens; allowed: 1 or more")
        n_known = n_token_ids(self.model)
        unknown = [token for token in token_ids if not 0 <= token < n_known]
        if unknown:
            raise UserError(f"token id {unknown[0]} found; the model knows 0 to {n_known - 1}")
        for start in range(0, len(token_ids), self.chunk):
            ids = [int(token) for token in token_ids[start : start + self.chunk]]
            batch = torch.tensor([ids], device=self.model.device)
            output = self.model(input_ids=batch, past_key_values=self.cache, **self._settings)
            self.token_ids += ids
            if self.on_tokens is not None:
                self.on_tokens(len(self.token_ids))
        # A copy, since a view would keep those of a whole pass alive.
        return output.logits[0, -1].clone()

    def finish(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_tokens: int,
        task: Mapping[str, object] | None,
        *,
        model: str,
        model_revision: str,
        origin: str,
        sampling: Mapping[str, object] | None = None,
        seed: int | None = None,
    ) -> Trace:
        """Grade the answer, where it can be read, and complete the trace."""
        task = dict(task or {})
        if tokenizer is not None:
            (text,) = tokenizer.batch_decode([self.token_ids[prompt_tokens:]], skip_special_tokens=True)
            task = graded(task, text)
        self.recorder.flush()
        if self.n_draws:
            found, weights = sensitivities(self.model, self.token_ids, prompt_tokens, self.n_draws)
            self.recorder.writer.write_draws(weights.numpy())
            for layer, own in enumerate(found):
                self.recorder.writer.write_sensitivity(layer, to_numpy(own))
        return self.recorder.writer.finish(
            self.token_ids,
            prompt_tokens=prompt_tokens,
            rope=rope_parameters(self.model.config),
            task=task,
            vocabulary=vocabulary_of(tokenizer, self.token_ids),
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            model=model,
            model_revision=model_revision,
            origin=origin,
            sampling=sampling,
            seed=seed,
        )


@contextmanager
def _open_run(
    model: PreTrainedModel,
    path: str | Path,
    longest: int,
    with_values: bool,
    n_draws: int,
    chunk: int,
    overwrite: bool,
    on_tokens: Callable[[int], None] | None,
) -> Iterator[_FullCacheRun]:
    """Check that ``longest`` tokens can be recorded, then open writer and recorder around a run."""
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; allowed: 1 or more")
    shape, scale = require_full_cache(model, longest)
    hold = HOLD_ON_HOST if model.device.type == "cpu" else chunk
    with TraceWriter(path, shape, scale=scale, with_values=with_values, overwrite=overwrite) as writer:
        recorder = TraceRecorder(writer, hold)
        with torch.inference_mode(), recording(model, recorder.observe):
            yield _FullCacheRun(model, recorder, n_draws, chunk, on_tokens)


def require_full_cache(model: PreTrainedModel, longest: int) -> tuple[ModelShape, float]:
    """Refuse texts that leave a sliding window; give the model's shape and scale; raises UserError."""
    shape, scale, window = observed_shape(model)
    if window is not None and longest > window:
        raise UserError(
            f"{longest} tokens of prompt and completion asked for; the model has a sliding window; "
            f"allowed: at most its {window} tokens, so that it never leaves the full cache"
        )
    return shape, scale


def refuse_length_dependent_rope(model: PreTrainedModel, longest: int) -> None:
    """Refuse a text of so many tokens that one pass would rotate unlike decoding it; raises UserError."""
    config = model.config.get_text_config()
    parameters = rope_parameters(config)
    # Models with several kinds of layers have one set of parameters for each.
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE and longest > limit:
            raise UserError(
                f"{longest} tokens given; RoPE of type '{rope['rope_type']}' changes beyond "
                f"{limit} and one pass would differ from decoding; allowed: decoding, or fewer tokens"
            )
