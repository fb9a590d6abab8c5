"""Protocols in TOML: the one that is shipped, and what is refused in another."""

from __future__ import annotations

import pytest
from places import ROOT

from simulator.budget import Budget
from traces.errors import InfeasibleBudgetError, UserError
from validate.models.next_token import Sampling
from validate.protocol.file import read_protocol

SHIPPED = ROOT / "validate" / "configs" / "reasonalloc_paper.toml"
# As the tables of the paper stand: columns, then percent by budget, None where there is a dash.
COLUMNS = ("snapkv", "rkv", "pyramid-rkv", "rkv+wave", "rkv+utility", "reasonalloc")
PAPER = {
    "math-500": {
        128: (33.8, 51.8, None, None, None, 61.4),
        512: (63.62, 76.48, 79.40, None, None, 82.50),
        1024: (75.68, 81.64, 83.64, None, None, 86.20),
    },
    "aime-2024": {
        256: (1.25, 10.42, 9.17, 13.32, 17.50, 20.00),
        512: (None, 28.33, None, 30.83, 31.66, 32.08),
        1024: (26.25, 45.42, 39.17, 42.50, 45.82, 49.17),
        2560: (None, 51.67, None, 55.00, 52.50, 53.34),
    },
}
FULL = {"math-500": 89.20, "aime-2024": 50.42}

SMALL = """
source = "a paper"
model = "a"
policies = ["fullkv", "rkv", "reasonalloc:mu=0.5"]

[parameters]
buffer = 4

[decoding]
temperature = 0.6
samples = 2
prompt = "solve {problem} now"

[models.a]
id = "org/a"
wave = "a.json"

[models.b]
id = "org/b"

[benchmarks.one]
prompts = "one.jsonl"
max_new_tokens = 10
budgets = [20, "30%"]

[[published]]
model = "a"
benchmark = "one"
budget = 20
accuracy = { rkv = 50.5 }
note = "read off a chart"
"""


@pytest.fixture
def written(tmp_path):
    """Write a file, perhaps with one part of ``SMALL`` replaced; give its path."""

    def write(old="", new=""):
        assert SMALL.count(old) == 1 or not old
        (tmp_path / "protocol.toml").write_text(SMALL.replace(old, new) if old else new or SMALL)
        return tmp_path / "protocol.toml"

    return write


def test_the_shipped_file_has_the_papers_protocol():
    found = read_protocol(SHIPPED)
    assert found.sampling == Sampling(True, 0.6, 0.95)
    assert (found.samples, found.stretch, found.model) == (8, None, "R1-Llama-8B")
    assert {name: own.id for name, own in found.models.items()} == {
        "R1-Llama-8B": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "R1-Qwen-14B": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        "AceReason-14B": "nvidia/AceReason-Nemotron-14B",
    }
    assert {name: own.max_new_tokens for name, own in found.benchmarks.items()} == {
        "math-500": 16384,
        "aime-2024": 32768,
    }
    assert [policy.name for policy in found.policies] == ["fullkv", *COLUMNS]
    reasonalloc = found.policies[-1].parameters
    paper = {"alpha": 0.1, "delta": 128, "buffer": 128, "gamma": 0.5, "beta": 0.5, "mu": 0.25}
    paper |= {"layer_floor": 0.25, "layer_cap": 2.0, "pooling": "none"}
    assert {name: reasonalloc[name] for name in paper} == paper
    assert "2606.11164" in found.source
    for name, table in PAPER.items():
        budgets = [int(own.amount) for own in found.benchmarks[name].budgets]
        assert [own.unit for own in found.benchmarks[name].budgets] == ["entries"] * len(budgets)
        assert set(budgets) - {3072} == set(table)


def test_the_shipped_file_has_the_papers_numbers():
    expected = {(name, "fullkv", None): percent for name, percent in FULL.items()}
    for name, table in PAPER.items():
        for budget, row in table.items():
            for policy, percent in zip(COLUMNS, row, strict=True):
                if percent is not None:
                    expected[name, policy, Budget(budget)] = percent
    found = read_protocol(SHIPPED)
    assert {own.model for own in found.published} == {"R1-Llama-8B"}
    assert {
        (own.benchmark, own.policy.name, own.budget): own.accuracy for own in found.published
    } == pytest.approx({key: percent / 100 for key, percent in expected.items()})
    # Every number belongs to a cell that is run, and the doubtful ones say so.
    for own in found.published:
        assert own.policy in found.policies
        assert own.budget is None or own.budget in found.benchmarks[own.benchmark].budgets
        assert bool(own.note) == (own.budget == Budget(128))


def test_a_file_is_read_as_it_is_written(written):
    found = read_protocol(written())
    assert [(own.name, own.parameters["trigger"]) for own in found.policies] == [
        ("fullkv", "never"),
        ("rkv", "buffer-full"),
        ("reasonalloc", "buffer-full"),
    ]
    assert [own.parameters.get("buffer") for own in found.policies] == [None, 4, 4]
    assert found.policies[2].parameters["mu"] == 0.5
    assert (found.models["a"].wave, found.models["b"].wave) == ("a.json", None)
    benchmark = found.benchmarks["one"]
    assert (benchmark.prompts, benchmark.batch) == ("one.jsonl", 1)
    assert benchmark.budgets == (Budget(20), Budget(30, "%"))
    (own,) = found.published
    assert (own.policy, own.budget, own.accuracy, own.note) == (
        found.policies[1],
        Budget(20),
        0.505,
        "read off a chart",
    )


def test_budgets_of_a_file_may_be_caps(written):
    found = read_protocol(written('"30%"', '"30%!"'))
    assert found.benchmarks["one"].budgets == (Budget(20), Budget(30, "%", "peak"))


def test_what_may_be_left_out_has_a_default(written):
    text = SMALL[: SMALL.index("[[published]]")].replace('prompts = "one.jsonl"', "")
    start, end = text.index("[decoding]"), text.index("[models.a]")
    found = read_protocol(written(new=text[:start] + text[end:]))
    assert (found.sampling, found.samples, found.prompt, found.published) == (Sampling(), 1, "{problem}", ())
    assert found.benchmarks["one"].prompts is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('model = "a"\npol', 'model = "c"\npol', "model is 'c'; allowed: a, b"),
        ('model = "a"\npol', "pol", "model is None; allowed: text"),
        ('source = "a paper"', "source = 3", "source is 3; allowed: text"),
        ('source = "a paper"', "extra = 3", "key 'extra' is unknown; allowed: source, model"),
        ('"rkv", "rea', '"rvk", "rea', "rvk"),
        ('["fullkv", "rkv", "reasonalloc:mu=0.5"]', "[]", "policies is []; allowed: a list"),
        ('["fullkv", "rkv", "reasonalloc:mu=0.5"]', '"rkv"', "policies is 'rkv'; allowed: a list"),
        (
            "buffer = 4",
            "bufer = 4",
            "parameters has 'bufer', which no policy of the file has; allowed: alpha",
        ),
        ("buffer = 4", "buffer = [4]", "parameters buffer is [4]; allowed: a number"),
        ("buffer = 4", "buffer = 0", "buffer"),
        ("temperature = 0.6", "temperature = 'hot'", "decoding temperature is 'hot'; allowed: a number"),
        ("temperature = 0.6", "temperature = 0", "decoding temperature is 0.0; allowed: above 0"),
        ("temperature = 0.6", "temperature = 1\ntop_p = 2", "decoding top_p is 2.0"),
        ("temperature = 0.6", "top_p = 0.5", "decoding has top_p without temperature"),
        ("temperature = 0.6", "", "decoding has samples = 2 without temperature"),
        ("temperature = 0.6", "temperatur = 0.6", "decoding key 'temperatur' is unknown"),
        ("samples = 2", "samples = 0", "decoding samples is 0; allowed: a whole number, 1 or more"),
        ("samples = 2", "samples = true", "decoding samples is True"),
        ("samples = 2", "stretch = 0.5", "decoding stretch is 0.5; allowed: 1 or more"),
        ("solve {problem} now", "solve", "decoding prompt is 'solve'; allowed: text with {problem}"),
        ('id = "org/a"', "", "models.a id is None; allowed: text"),
        ('id = "org/a"', "id = 3", "models.a id is 3"),
        ('wave = "a.json"', "wave = 3", "models.a wave is 3"),
        ('wave = "a.json"', 'waves = "a.json"', "models.a key 'waves' is unknown; allowed: id, wave"),
        ("[models.b]", '[models."b/c"]', "models has 'b/c'; allowed: names of letters"),
        ("[benchmarks.one]", '[benchmarks."../one"]', "benchmarks has '../one'; allowed: names"),
        ("[benchmarks.one]", "[benchmark.one]", "key 'benchmark' is unknown"),
        ("max_new_tokens = 10", "", "benchmarks.one max_new_tokens is None"),
        ("max_new_tokens = 10", "max_new_tokens = 1.5", "benchmarks.one max_new_tokens is 1.5"),
        ("max_new_tokens = 10", "max_new_tokens = 10\nbatch = 0", "benchmarks.one batch is 0"),
        ("max_new_tokens = 10", "max_new_tokens = 10\nlimit = 3", "benchmarks.one key 'limit' is unknown"),
        ('[20, "30%"]', "[]", "benchmarks.one budgets is []; allowed: a list"),
        ('[20, "30%"]', "20", "benchmarks.one budgets is 20; allowed: a list"),
        ('[20, "30%"]', "[0.3]", "benchmarks.one budgets: budget '0.3' is a bare fraction"),
        ('prompts = "one.jsonl"', "prompts = 1", "benchmarks.one prompts is 1"),
        ("[[published]]", "[published]", "published is {"),
        ('model = "a"\nbench', 'model = "c"\nbench', "published 1 model is 'c'; allowed: a, b"),
        ('benchmark = "one"', "", "published 1 benchmark is None; allowed: one"),
        ("budget = 20\n", "", "published 1 budget is missing"),
        ("budget = 20\n", 'budget = "none"\n', "budget 'none' is not a budget"),
        ("budget = 20\n", 'budget = "full"\n', "'rkv' at budget 'full'; a policy that evicts has a budget"),
        ("rkv = 50.5", "fullkv = 50.5", "'fullkv' at budget 20; its budget is 'full'"),
        ("rkv = 50.5", "rkv = 101", "published 1 accuracy rkv is 101.0; allowed: percent, 0 to 100"),
        ("rkv = 50.5", "rkv = 'most'", "published 1 accuracy rkv is 'most'; allowed: a number"),
        (
            "rkv = 50.5",
            "rkv = 50, 'rkv:alpha=0.1' = 60",
            "published 1 accuracy rkv:alpha=0.1 is given before",
        ),
        ("accuracy = { rkv = 50.5 }", "", "published 1 accuracy is None; allowed: a table"),
        ('note = "read off a chart"', "source = 3", "published 1 key 'source' is unknown"),
        ('"a paper"', '"a paper', "not valid TOML"),
    ],
)
def test_what_is_not_allowed_is_one_line_with_file_and_key(written, old, new, words):
    path = written(old, new)
    with pytest.raises(UserError) as refused:
        read_protocol(path)
    text = str(refused.value)
    assert refused.value.exit_code == 2
    assert text.startswith(f"{path}: ")
    assert words in text
    assert len(text.splitlines()) == 1


def test_a_budget_that_holds_nothing_but_what_is_protected_is_refused(written):
    path = written('[20, "30%"]', "[20, 8]")
    with pytest.raises(
        InfeasibleBudgetError, match=r"benchmarks.one budgets: budget 8 entries .* 'rkv'"
    ) as refused:
        read_protocol(path)
    assert (refused.value.exit_code, str(refused.value).startswith(f"{path}: ")) == (5, True)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none.toml: cannot be read: No such file"):
        read_protocol(tmp_path / "none.toml")
