"""Compile the GPU kernels for an H100, which needs none; write what they become to the folder given."""

from __future__ import annotations

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from validate.gpu.kernels import append, attention, compaction, selection

HOPPER = GPUTarget("cuda", 90, 32)
# Pointers by their names; all other arguments are integers.
TYPES = {
    "starts": "*i64",
    "new_starts": "*i64",
    "source_starts": "*i64",
    "survivor_starts": "*i64",
    "lengths": "*i32",
    "quotas": "*i32",
    "totals": "*i32",
    "counts": "*i32",
    "kept": "*i32",
    "survivors": "*i32",
    "positions": "*i32",
    "n_tokens": "*i32",
    "scores": "*fp32",
    "partials": "*fp32",
    "lse": "*fp32",
    "scale": "fp32",
}
ENTRIES = ("queries", "keys", "values", "output", "ring", "source_keys", "source_values")
NEW = ("new_keys", "new_values", "new_queries")

SPLIT = {"GROUP": 4, "GROUP_BLOCK": 16, "HEAD_DIM": 128, "BLOCK": 64, "FEWEST": 4}
MERGE = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_SPLITS": 16}
APPEND = {"N_KV_HEADS": 8, "GROUP": 3, "GROUP_BLOCK": 4, "WINDOW": 16, "HEAD_DIM": 128}
DEMAND = {"N_KV_HEADS": 8, "HEADS_BLOCK": 8, "BLOCK": 512}
MOVE = {"N_KV_HEADS": 8, "WORDS": 64, "SLICE": 8, "N_SLICES": 8, "CHUNK": 512}
FILL = {"HAS_SURVIVORS": True, "HEAD_DIM": 128, "BLOCK": 64}
KERNELS = {
    "attend_bfloat16": (attention._attend_split, "bf16", SPLIT),
    "attend_float32": (attention._attend_split, "fp32", SPLIT | {"GROUP_BLOCK": 4, "BLOCK": 32}),
    "attend_one": (attention._attend_split, "fp32", SPLIT | {"GROUP": 1, "GROUP_BLOCK": 1, "BLOCK": 32}),
    "attend_undivided": (attention._attend_split, "fp16", SPLIT | {"n_splits": 1}),
    "merge": (attention._merge_splits, "bf16", MERGE),
    "append": (append._append, "bf16", APPEND),
    "append_without_ring": (append._append, "fp32", APPEND | {"WINDOW": 0}),
    "select": (selection._select, "bf16", {"BLOCK": 4096}),
    "demand": (selection._demand, "bf16", DEMAND),
    "compact": (compaction._compact, "i32", MOVE),
    "fill": (compaction._fill, "fp16", FILL),
    "fill_all": (compaction._fill, "fp16", FILL | {"HAS_SURVIVORS": False}),
}


def compile_kernel(kernel, dtype, constants):
    types = TYPES | dict.fromkeys(ENTRIES + NEW, f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=HOPPER).asm["ptx"]


if __name__ == "__main__":
    for name, arguments in KERNELS.items():
        (Path(sys.argv[1]) / f"{name}.ptx").write_text(compile_kernel(*arguments))
