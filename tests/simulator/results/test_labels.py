"""Names that tell policies apart by what differs."""

from __future__ import annotations

import polars as pl

from simulator.policies.language import parse_policy
from simulator.results.labels import told_apart


def parameters_of(*policies):
    rows = [(own.name, own.parameters_json) for own in map(parse_policy, policies)]
    return pl.DataFrame(rows, schema=["policy", "policy_params"], orient="row")


def test_policies_of_one_name_are_told_apart_by_what_differs():
    own = ["rkv", "rkv:alpha=0.2", "snapkv", "rkv:alpha=0.2,buffer=32"]
    (table,) = told_apart(parameters_of(*own, "rkv"))
    assert table["policy"].to_list() == [
        "rkv:alpha=0.1,buffer=128",
        "rkv:alpha=0.2,buffer=128",
        "snapkv",
        "rkv:alpha=0.2,buffer=32",
        "rkv:alpha=0.1,buffer=128",
    ]
    live, simulated = told_apart(parameters_of("rkv", "snapkv"), parameters_of("rkv:alpha=0.2"))
    assert live["policy"].to_list() == ["rkv:alpha=0.1", "snapkv"]
    assert simulated["policy"].to_list() == ["rkv:alpha=0.2"]


def test_policies_with_other_triggers_are_told_apart():
    own = ["rkv", "rkv:trigger=every-n,interval=16", "rkv:trigger=every-n,interval=32"]
    (table,) = told_apart(parameters_of(*own))
    assert table["policy"].n_unique() == 3
    assert "interval=32" in table["policy"][2]
