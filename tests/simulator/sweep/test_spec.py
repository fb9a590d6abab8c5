"""A sweep's file: what it stands for, and one line for everything that is wrong with it."""

from __future__ import annotations

import pytest
from sweeps import write_spec

from simulator.sweep.spec import read_spec
from traces.errors import UserError

FINE = {"traces": ["sample"], "policies": ["rkv"], "budgets": [128]}

WRONG = [
    ({"traces": []}, "traces is empty"),
    ({"traces": 3}, "traces is 3; allowed: a list of text"),
    ({"traces": [""]}, "allowed: a list of text"),
    ({"budget": [12]}, "key 'budget' is unknown; allowed: out, traces"),
    ({"sampling": {"queries": 3}}, "sampling queries is 3; allowed: a share above 0, up to 1"),
    ({"sampling": {"layers": "4"}}, "sampling layers is '4'; allowed: a whole number"),
    ({"sampling": {"heads": 4}}, "sampling key 'heads' is unknown; allowed: queries, layers, kv_heads"),
    ({"sampling": "1/8"}, "sampling is '1/8'; allowed: a table"),
    ({"policies": []}, "policies is empty"),
    ({"policies": ["rvk"]}, "policy 'rvk': 'rvk' is unknown"),
    ({"policies": ["rkv:alpha=x"]}, "alpha is 'x'"),
    ({"budgets": []}, "budgets is empty"),
    ({"budgets": [0.1]}, "bare fraction"),
    ({"budgets": ["7 parsecs"]}, "unknown unit 'parsecs'"),
    ({"budgets": [True]}, "budget True is not a budget"),
    ({"seeds": []}, "seeds is empty"),
    ({"seeds": [-1]}, "seeds is -1; allowed: a whole number from 0"),
    ({"seeds": ["a"]}, "seeds is 'a'"),
    ({"out": ""}, "out is ''; allowed: the name of a folder"),
    ({"out": 7}, "out is 7"),
    ({"waves": [1]}, "waves is [1]"),
    ({"parameters": 4}, "parameters is 4; allowed: a table"),
    (
        {"parameters": {"alpa": [0.1]}},
        "parameters has 'alpa', which no policy of the sweep has; allowed: alpha",
    ),
    ({"parameters": {"alpha": []}}, "parameters alpha is empty"),
    ({"parameters": {"alpha": [[1]]}}, "parameters alpha has [1]; allowed: numbers, text"),
    ({"parameters": {"alpha": ["x"]}}, "policy 'rkv': alpha is 'x'; allowed: a float"),
    ({"grid": 3}, "grid is 3; allowed: tables [[grid]]"),
    ({"grid": [{}]}, "grid policy is None; allowed: one policy"),
    (
        {"grid": [{"policy": "rkv", "budgte": [1]}]},
        "grid key 'budgte' is unknown; allowed: policy,",
    ),
    (
        {"grid": [{"policy": "rkv", "parameters": {"alpa": [1]}}]},
        "parameter 'alpa' is unknown; did you mean 'alpha'?; allowed:",
    ),
    ({"grid": [{"policy": "rkv:alpha=1", "parameters": {"alpha": [1]}}]}, "'alpha' is given twice"),
    ({"grid": [{"policy": "rkv", "parameters": {"alpha": ["1,2"]}}]}, "allowed: text without a comma"),
    ({"grid": [{"policy": "rkv", "budgets": []}]}, "budgets is empty"),
    (
        {"parameters": {"alpha": list(range(1001)), "buffer": list(range(1000))}},
        "1001000 combinations of policy, parameters, budget and seed; allowed",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_every_mistake_is_one_line_that_names_it(change, message, tmp_path, run_sim):
    code, out, err = run_sim("sweep", write_spec(tmp_path, **FINE | change))
    assert (code, out) == (2, "")
    assert err.startswith(f"sim: {tmp_path / 'spec.toml'}: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(("text", "message"), [("traces = [", "not valid TOML"), ("\xff", "not UTF-8 text")])
def test_what_is_no_toml_is_refused(text, message, tmp_path):
    path = tmp_path / "spec.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_spec(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_spec(tmp_path)


def test_a_missing_list_is_named(tmp_path):
    for key in ("traces", "policies", "budgets"):
        spec = write_spec(tmp_path, **{name: value for name, value in FINE.items() if name != key})
        with pytest.raises(UserError, match=f"{key} is (empty|missing)"):
            read_spec(spec)


def test_policies_then_parameters_budgets_and_seeds_in_the_order_of_the_file(tmp_path):
    spec = read_spec(
        write_spec(
            tmp_path,
            traces=["sample"],
            policies=["fullkv", "rkv", "snapkv:buffer=7"],
            budgets=["10%", 128],
            seeds=[0, 5],
            parameters={"buffer": [16, 32]},
        )
    )
    found = [
        (each.policy.name, each.policy.parameters.get("buffer"), str(each.budget), each.seed)
        for each in spec.settings
    ]
    # A parameter in a policy's own text goes before the shared ones; fullkv has no buffer, and runs once.
    named = [("fullkv", None), ("rkv", 16), ("rkv", 32), ("snapkv", 7)]
    assert found == [(*own, budget, seed) for own in named for budget in ("10%", "128") for seed in (0, 5)]


def test_a_grid_is_the_product_of_its_own_parameters_and_may_have_its_own_budgets(tmp_path):
    spec = read_spec(
        write_spec(
            tmp_path,
            traces=["sample"],
            budgets=[128],
            parameters={"buffer": 32},
            grid=[
                {"policy": "rkv:window=4", "parameters": {"alpha": [0.1, 0.5], "kernel_size": 3}},
                {"policy": "h2o", "parameters": {"buffer": [4]}, "budgets": ["5%", "9%"]},
            ],
        )
    )
    rkv = [each.policy for each in spec.settings if each.policy.name == "rkv"]
    assert [policy.scorer.alpha for policy in rkv] == [0.1, 0.5]
    assert {(p.scorer.kernel_size, p.scorer.window, p.parameters["buffer"]) for p in rkv} == {(3, 4, 32)}
    others = [(str(s.budget), s.policy.parameters["buffer"]) for s in spec.settings if s.policy.name == "h2o"]
    assert others == [("5%", 4), ("9%", 4)]


def test_what_is_asked_twice_is_asked_once(tmp_path):
    spec = write_spec(
        tmp_path,
        traces=["sample"],
        policies=["rkv", " rkv", "rkv:alpha=0.1"],
        budgets=[128, "128"],
        seeds=[0, 0],
        grid=[{"policy": "rkv", "parameters": {"alpha": [0.1]}}],
    )
    assert len(read_spec(spec).settings) == 1  # 0.1 is the default


def test_a_folder_for_the_results_is_needed(tmp_path, run_sim, make_trace):
    path = tmp_path / "spec.toml"
    path.write_text(f"traces = ['{make_trace().path}']\npolicies = ['rkv']\nbudgets = [50]\n")
    assert "out is missing; allowed: the name of a folder, or --out FOLDER" in run_sim("sweep", path)[2]
    code, _, err = run_sim("sweep", path, "--out", path)
    assert (code, err) == (2, f"sim: out is {path}, a file; allowed: a folder\n")
