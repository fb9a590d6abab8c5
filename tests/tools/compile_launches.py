"""Compile for a GPU that need not be there what launches run: ``python tests/tools/compile_launches.py``.

Interpreted kernels know no types that change in a loop, no shared memory and no assembler; compiled ones do.
Run without ``TRITON_INTERPRET``, which turns the compiler off.
"""

from __future__ import annotations

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from validate.eviction.kernels.append import append
from validate.eviction.kernels.attention import attend
from validate.eviction.kernels.compaction import compact, fill
from validate.eviction.kernels.importance import window_importance
from validate.eviction.kernels.redundancy import redundancy
from validate.eviction.kernels.scores import combine_scores
from validate.eviction.kernels.selection import demand, select

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_launch(kernel, *arguments, grid, warmup, **options):
    """Compile instead of running; stands for ``JITFunction.run``."""
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    given |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or given[p.name] is None}
    signature = {
        name: "constexpr" if name in constants else type_name(argument) for name, argument in given.items()
    }
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if signature[name][0] == "*"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=HOPPER, options=options)
    entries = next((signature[name] for name in ("keys", "slots") if name in signature), "*fp32")
    found = {"kernel": kernel.__name__, "dtype": entries[1:], "shared": compiled.metadata.shared}
    print(json.dumps(found | {"ptx": compiled.asm["ptx"]}))


def type_name(argument):
    """Name the type that Triton gives an argument."""
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def main():
    """Compile every kernel, in the sizes that launches choose."""
    JITFunction.run = compile_launch
    # Tensors without memory: a launch looks at types and shapes only.
    torch.set_default_device("meta")
    compile_scores()
    for dtype in (torch.float32, torch.bfloat16):
        compile_step(dtype, n_rows=2, group_size=4, window=8)
    compile_step(torch.bfloat16, n_rows=64, group_size=5, window=0)
    compile_moves(torch.bfloat16)
    # One split alone needs no merging.
    attend(*heads(torch.float16, 2, 4), scale=0.1, longest=60)


def heads(dtype, n_rows, group_size):
    """Give queries, keys, values, layout and output of 8 KV heads."""
    queries, keys = torch.empty(n_rows, 8 * group_size, 128, dtype=dtype), torch.empty(9000, 128, dtype=dtype)
    return queries, keys, keys, *layout(8 * n_rows), queries


def layout(n_segments):
    """Give starts and lengths."""
    return torch.zeros(n_segments, dtype=torch.int64), torch.zeros(n_segments, dtype=torch.int32)


def compile_step(dtype, n_rows, group_size, window):
    """Compile what a decode step launches."""
    queries, keys, values, starts, lengths, output = heads(dtype, n_rows, group_size)
    attend(queries, keys, values, starts, lengths, output, scale=0.1, longest=1152)
    new, counts = torch.empty(n_rows, 8, 128, dtype=dtype), torch.zeros(n_rows, dtype=torch.int32)
    ring = torch.empty(n_rows, 8 * group_size, window, 128, dtype=dtype)
    positions = torch.zeros(len(keys), dtype=torch.int32)
    append(new, new, queries, keys, values, positions, starts, lengths, counts, ring)


def compile_scores():
    """Compile what a compression launches to judge entries."""
    (starts, lengths), scores, sizes = layout(8), torch.empty(9000), {"longest": 1152}
    for dtype in (torch.float32, torch.bfloat16):
        keys, queries = torch.empty(9000, 128, dtype=dtype), torch.empty(8, 3, 5, 128, dtype=dtype)
        window_importance(queries, keys, starts, lengths, scores, scale=1.0, window=8, **sizes)
        redundancy(keys, starts, lengths, scores, threshold=0.5, **sizes)
    for repeated in (scores, None):
        combine_scores(scores, repeated, starts, lengths, scores, alpha=0.1, kernel_size=7, window=8, **sizes)


def compile_moves(dtype):
    """Compile what a compression launches to choose entries and move them."""
    (starts, lengths), scores, keys = layout(8), torch.empty(9000), torch.empty(9000, 128, dtype=dtype)
    survivors = torch.zeros(9000, dtype=torch.int32)
    for longest in (60, 1152, 20_000):
        demand(scores, starts, lengths, lengths[:1], lengths, n_kv_heads=8, longest=longest)
        select(scores, starts, lengths, lengths, survivors, lengths, longest=longest)
    compact(keys, keys, survivors, survivors, starts, lengths, starts, n_kv_heads=8)
    for chosen in (survivors, None):
        fill(keys, keys, starts, chosen, starts, lengths, keys, keys, survivors, starts, longest=1152)


if __name__ == "__main__":
    main()
