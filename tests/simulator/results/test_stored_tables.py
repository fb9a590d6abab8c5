"""Tables in files: damage is noticed before it is read, and columns are held against a schema."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import polars as pl
import pytest

from simulator.results.output import write_parquet
from simulator.results.store import parse_table, read_table, scan_table, sealed_parquet
from traces.errors import UserError

SCHEMA = {"policy": pl.String, "n": pl.Int64, "mass": pl.Float64}
TABLE = pl.DataFrame({"policy": ["rkv", "h2o"], "n": [3, None], "mass": [0.5, 0.25]}, schema=SCHEMA)


def test_what_was_written_comes_back_whatever_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(TABLE, path)
    assert read_table(path, "rows", SCHEMA).equals(TABLE)
    assert scan_table(path, "rows", SCHEMA).filter(pl.col("n") == 3).collect().height == 1
    assert pl.read_parquet(path).equals(TABLE)
    assert capsys.readouterr() == ("", "")


def test_a_seal_is_found_among_other_digests() -> None:
    digests = pl.DataFrame({"trace_id": ["0" * 64, "f" * 64]})  # both stand in the footer as least and most
    assert parse_table(sealed_parquet(digests), ".parquet", "rows", {"trace_id": pl.String}).equals(digests)


def test_every_flipped_bit_is_noticed() -> None:
    sound = sealed_parquet(TABLE)
    rng = random.Random(3)
    for _ in range(400):
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        with pytest.raises(UserError, match="damaged"):
            parse_table(bytes(damaged), ".parquet", "rows", SCHEMA)


@pytest.mark.slow
def test_cut_and_lengthened_files_are_noticed() -> None:
    sound = sealed_parquet(TABLE)
    for damaged in (sound[:-1], sound[:100], b"", sound + b"x", b"PAR1" + sound):
        with pytest.raises(UserError, match="damaged"):
            parse_table(damaged, ".parquet", "rows", SCHEMA)


def test_a_file_without_a_seal_is_read_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    buffer = BytesIO()
    TABLE.write_parquet(buffer)
    assert parse_table(buffer.getvalue(), ".parquet", "rows", SCHEMA).equals(TABLE)
    assert "rows has no checksum" in capsys.readouterr().err


def test_text_takes_the_types_of_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("policy,n,mass\nrkv,,1\nh2o,,0\n")
    table = read_table(path, "rows", SCHEMA)
    assert table.schema == pl.Schema(SCHEMA)
    assert table["mass"].to_list() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (TABLE.drop("mass"), "rows has no column 'mass'; allowed: policy, n, mass"),
        (TABLE.with_columns(n=pl.lit("3")), "rows: column 'n' is String; allowed: Int64"),
        (TABLE.with_columns(n=pl.lit(1.5)), "rows: column 'n' is Float64; allowed: Int64"),
        (TABLE.with_columns(n=pl.lit(2**63, pl.UInt64)), "rows: column 'n' is UInt64; allowed: Int64"),
        (TABLE.with_columns(mass=pl.lit([1.0])), "rows: column 'mass' is List(Float64); allowed: Float64"),
    ],
)
def test_other_columns_and_types_are_one_line(table: pl.DataFrame, told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_table(sealed_parquet(table), ".parquet", "rows", SCHEMA)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ('[{"policy": 3, "n": 1, "mass": 1}]', "rows: [0].policy is 3; allowed: str | null"),
        ('[{"policy": "x", "n": true, "mass": 1}]', "rows: [0].n is True; allowed: int | null"),
        ('[{"policy": "x", "n": 1, "mass": "1"}]', "rows: [0].mass is '1'; allowed: float | null"),
        ('{"policy": "x"}', "rows: the whole is {'policy': 'x'}; allowed: array"),
        ('[{"policy": "x", "policy": "y"}]', "rows: 'policy' stands twice in one object; allowed: once"),
    ],
)
def test_json_of_other_types_is_one_line(rows: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_table(rows.encode(), ".json", "rows", SCHEMA)
    assert str(caught.value) == told


def test_other_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").touch()
    for path, told in [(tmp_path / "rows.xlsx", "suffix"), (tmp_path / "no.csv", "No such file")]:
        with pytest.raises(UserError, match=told):
            read_table(path, "rows", SCHEMA)
    (tmp_path / "rows.csv").write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(UserError, match="rows"):
        read_table(tmp_path / "rows.csv", "rows", SCHEMA)
