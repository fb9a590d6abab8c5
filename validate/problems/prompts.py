"""Read prompts from a JSONL file and turn them into tokens."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from traces.documents import parse_json, read_document, shown
from traces.errors import UserError

PROMPT_FIELDS = ("prompt", "problem", "question")
ID_FIELDS = ("id", "unique_id")
_MOST_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompts file, in its ``line``, counted from 1.

    The ``id`` is the file's, or ``row-LINE``; ``system`` is the message before it in a chat, ``completion`` a
    text to rescore.
    """

    line: int
    id: str
    text: str
    completion: str | None = None
    family: str | None = None
    answer: str | None = None
    system: str | None = None

    @property
    def file_stem(self) -> str:
        """Give the id as a file name: letters, digits and ``. _ -`` stay, others become ``-``."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.id).strip(".-")[:120] or f"row-{self.line}"

    @property
    def task(self) -> dict[str, object]:
        """Give what a trace's manifest says of the problem."""
        known = {"id": self.id, "family": self.family, "answer": self.answer}
        return {name: value for name, value in known.items() if value is not None}


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts, at most ``limit``, one JSON object per line with ``prompt``, ``problem`` or ``question``.

    Raises
    ------
    UserError
        Naming file, line and what is wrong; also for two rows that would share a file name.
    """
    content = read_document(path, f"prompts file {path}", UserError, _MOST_BYTES)
    return parse_prompts(content, str(path), limit)


def parse_prompts(content: bytes, path: str, limit: int | None = None) -> list[Prompt]:
    """Read prompts from what a file holds; ``path`` is what messages call it.

    Raises
    ------
    UserError
        As `read_prompts`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; allowed: 1 or more")
    try:
        # Not splitlines: JSON strings may hold the other characters that it takes for line ends.
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts file {path} is not UTF-8 text: {error}") from error
    prompts: list[Prompt] = []
    lines_by_stem: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if limit is not None and len(prompts) == limit:
            break
        prompt = parse_prompt(line, f"{path}, line {number}", number)
        # Compared without case: some file systems do not tell A from a.
        stem = prompt.file_stem.lower()
        if stem in lines_by_stem:
            raise UserError(
                f"{path}, line {number}: id '{prompt.id}' gives the same file name as line "
                f"{lines_by_stem[stem]}; allowed: a different id on each line"
            )
        lines_by_stem[stem] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompts file {path} has no rows; allowed: one JSON object per line")
    return prompts


def parse_prompt(line: str, where: str, number: int) -> Prompt:
    """Read one row.

    Raises
    ------
    UserError
        Beginning with ``where``.
    """
    row: dict[str, object] = parse_json(line, where, dict[str, Any])
    name = next((name for name in PROMPT_FIELDS if row.get(name) is not None), None)
    if name is None:
        raise UserError(f"{where}: no prompt; allowed fields: {', '.join(PROMPT_FIELDS)}")
    given = next((row[name] for name in ID_FIELDS if row.get(name) is not None), f"row-{number}")
    return Prompt(
        line=number,
        id=_as_text(given, where, "id"),
        text=_as_text(row[name], where, name),
        **{
            name: _as_text(row[name], where, name)
            for name in ("system", "completion", "family", "answer")
            # Datasets have an empty system message where there is none.
            if row.get(name) is not None and not (name == "system" and row[name] == "")
        },
    )


def _as_text(value: object, where: str, name: str) -> str:
    """Read a string, or a number as its digits; files give answers and ids as either."""
    if isinstance(value, int | float) and not isinstance(value, bool) and name in ("id", "answer"):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is a {type(value).__name__}; allowed: a string")
    if not value.strip():
        raise UserError(f"{where}: {name} is empty; allowed: a string with text")
    if name in ("id", "family") and not value.isprintable():
        raise UserError(f"{where}: {name} is {shown(value)}; allowed: a string without control characters")
    return value


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, use_chat_template: bool = True, system: str | None = None
) -> list[int]:
    """Turn a prompt into token ids, as one user message where the tokenizer has a chat template.

    Without a template the tokenizer adds its own special tokens; a template writes them itself.

    Raises
    ------
    UserError
        For a ``system`` message that no template takes.
    """
    if not (use_chat_template and getattr(tokenizer, "chat_template", None)):
        if system is not None:
            why = "the tokenizer has none" if use_chat_template else "it is not to be applied"
            raise UserError(
                f"a system message needs a chat template, and {why}; allowed: prompts without one"
            )
        return list(tokenizer(text).input_ids)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses the prompt: {error}") from None
    return list(tokenizer(written, add_special_tokens=False).input_ids)


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Turn a completion into token ids, nothing added in front or behind."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def require_known_words(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, path: str | Path, completions: bool = False
) -> None:
    """Refuse text of which a model would read nothing: words that its tokenizer does not know.

    A tokenizer of whole words has to know all of them; of another one, half of the tokens have to be known.
    With ``completions`` these are read as well.

    Raises
    ------
    UserError
        Naming the first such line, some of its words and some that are known.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or not tokenizer.is_fast:
        return
    most = 0.0 if type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel" else 0.5
    texts = [(prompt.line, prompt.text) for prompt in prompts]
    if completions:
        texts += [(prompt.line, prompt.completion or "") for prompt in prompts]
    for line, text in texts:
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(read.input_ids, read.offset_mapping, strict=True)
        words = [text[slice(*span)] for token, span in pairs if token == unknown]
        if len(words) <= most * len(read.input_ids):
            continue
        some = list(dict.fromkeys(words))
        told = ", ".join(map(shown, some[:3])) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
        vocabulary = tokenizer.get_vocab()
        known = sorted(set(vocabulary) - set(tokenizer.all_special_tokens), key=vocabulary.__getitem__)
        raise UserError(
            f"{path}, line {line}: the model's tokenizer does not know {told}; allowed: text made of the "
            f"{len(known)} pieces that it knows, such as {', '.join(map(shown, known[:3]))}"
        )


def tell_limit(n_prompts: int, limit: int | None, path: str | Path) -> None:
    """Say on standard error that a file has fewer rows than were asked for."""
    if limit is not None and n_prompts < limit:
        print(f"sim: --limit is {limit}, and {path} has {n_prompts} rows: all are taken", file=sys.stderr)


def require_completions(prompts: list[Prompt], path: str | Path) -> None:
    """Refuse prompts without a completion to rescore.

    Raises
    ------
    UserError
        Naming the first such line.
    """
    _require(prompts, path, "completion", "--rescore needs one in each")


def require_answers(prompts: list[Prompt], path: str | Path) -> None:
    """Refuse prompts without an answer to grade by.

    Raises
    ------
    UserError
        Naming the first such line.
    """
    _require(prompts, path, "answer", "a live run grades answers")


def _require(prompts: list[Prompt], path: str | Path, field: str, why: str) -> None:
    for prompt in prompts:
        if getattr(prompt, field) is None:
            raise UserError(f"{path}, line {prompt.line}: no {field}; {why}")
