"""Prompts files: fields, errors with file and line, tokens."""

import json

import pytest
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from traces.errors import UserError
from validate.problems.prompts import (
    Prompt,
    encode_completion,
    encode_prompt,
    read_prompts,
    require_completions,
    require_known_words,
)
from validate.reasoner.tokenizer import build_tokenizer

ROWS = [
    # As competition problems are published: a number as id, two texts, much that is not needed.
    {
        "id": 7,
        "problem": "How many $n<10$ are prime?",
        "question": "other",
        "answer": "4",
        "url": "x",
    },
    {"problem": "Find $\\frac{1}{2}+1$.", "answer": 1.5, "unique_id": "test/algebra/12.json"},
    {"question": "Is 7 odd?", "id": None, "answer": None},
    {"prompt": "walk on", "completion": "done", "family": "walk", "id": "w 1"},
]


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_fields_of_published_files_are_understood(tmp_path):
    found = read_prompts(write(tmp_path / "p.jsonl", ROWS))
    assert [prompt.text for prompt in found] == [
        "How many $n<10$ are prime?",
        "Find $\\frac{1}{2}+1$.",
        "Is 7 odd?",
        "walk on",
    ]
    assert [prompt.id for prompt in found] == ["7", "test/algebra/12.json", "row-3", "w 1"]
    assert [prompt.file_stem for prompt in found] == ["7", "test-algebra-12.json", "row-3", "w-1"]
    assert [prompt.answer for prompt in found] == ["4", "1.5", None, None]
    assert found[2].task == {"id": "row-3"}
    assert found[3].task == {"id": "w 1", "family": "walk"}
    assert found[3].completion == "done"


def test_blank_lines_count_but_hold_nothing(tmp_path):
    found = read_prompts(write(tmp_path / "p.jsonl", ["", *ROWS, "", ""]), limit=3)
    assert [prompt.line for prompt in found] == [2, 3, 4]


def test_limit_stops_before_a_broken_row(tmp_path):
    path = write(tmp_path / "p.jsonl", [*ROWS, "{"])
    assert len(read_prompts(path, limit=4)) == 4
    with pytest.raises(UserError, match="line 5: not valid JSON"):
        read_prompts(path, limit=5)
    with pytest.raises(UserError, match="limit is 0"):
        read_prompts(path, limit=0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", "line 2: not valid JSON"),
        ("[1, 2]", r"line 2: the whole is \[1, 2\]; allowed: object"),
        ({"text": "x"}, "line 2: no prompt; allowed fields: prompt, problem, question"),
        ({"prompt": None}, "line 2: no prompt"),
        ({"prompt": " "}, "line 2: prompt is empty"),
        ({"prompt": ["a"]}, "line 2: prompt is a list; allowed: a string"),
        ({"prompt": 5}, "line 2: prompt is a int"),
        ({"prompt": "x", "answer": ["a"]}, "line 2: answer is a list"),
        ({"prompt": "x", "id": True}, "line 2: id is a bool"),
        ({"prompt": "x", "id": 7}, "line 2: id '7' gives the same file name as line 1"),
        ({"prompt": "x", "completion": ""}, "line 2: completion is empty"),
    ],
)
def test_errors_name_file_and_line(tmp_path, row, words):
    path = write(tmp_path / "p.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_that_differ_only_in_case_or_signs_are_refused(tmp_path):
    rows = [{"prompt": "x", "id": "a/1"}, {"prompt": "y", "id": "A 1"}]
    with pytest.raises(UserError, match="same file name as line 1"):
        read_prompts(write(tmp_path / "p.jsonl", rows))


@pytest.mark.parametrize("name", ["..", "/", ".hidden", "a" * 300, "→", "../../up"])
def test_file_names_stay_inside_the_folder(tmp_path, name):
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "x", "id": name}]))
    assert 0 < len(prompt.file_stem) <= 120
    assert (tmp_path / prompt.file_stem).resolve().parent == tmp_path.resolve()
    assert not prompt.file_stem.startswith(".")


def test_files_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="has no rows"):
        read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(tmp_path / "bytes.jsonl")


def test_line_separators_inside_a_string_do_not_split_a_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}\r\n', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["a\u2028b\u0085c", "d"]


def test_rescoring_needs_a_completion_in_each_row(tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    with pytest.raises(UserError, match="line 1: no completion"):
        require_completions(read_prompts(path), path)
    require_completions(read_prompts(path)[3:], path)


def test_chat_template_writes_its_own_special_tokens():
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    ids = encode_prompt(tokenizer, "step by step")
    assert tokenizer.decode(ids) == "<bos><user>step by step<think>"
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(encode_prompt(tokenizer, "step by step", False)) == "step by step"


def test_a_system_message_stands_before_the_prompt():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer(chat_template=template)
    ids = encode_prompt(tokenizer, "go", system="be brief")
    assert tokenizer.decode(ids) == "<system>be brief<user>go"
    with pytest.raises(UserError, match="needs a chat template, and it is not to be applied"):
        encode_prompt(tokenizer, "go", False, system="be brief")
    with pytest.raises(UserError, match="needs a chat template, and the tokenizer has none"):
        encode_prompt(byte_tokenizer(), "go", system="be brief")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(UserError, match="chat template refuses the prompt: no system role"):
        encode_prompt(byte_tokenizer(chat_template=refusing), "go", system="be brief")


def test_without_a_template_the_tokenizer_adds_its_own():
    tokenizer = build_tokenizer()
    assert encode_prompt(tokenizer, "walk so")[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in encode_completion(tokenizer, "walk so")
    assert len(encode_completion(tokenizer, "walk so")) == 2


def test_of_a_tokenizer_of_pieces_half_the_tokens_have_to_be_known():
    pieces = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>")
    known, unknown = Prompt(1, "x", "a b c"), Prompt(7, "y", "c d a")
    require_known_words([known], tokenizer, "p.jsonl")
    with pytest.raises(UserError, match=r"p\.jsonl, line 7: .* does not know 'c', 'd'; allowed.*'a', 'b'"):
        require_known_words([known, unknown], tokenizer, "p.jsonl")
    assert byte_tokenizer().unk_token_id is None
    require_known_words([Prompt(1, "x", "任何文字 🙂")], byte_tokenizer(), "p.jsonl")
