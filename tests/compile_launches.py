"""Compile for a GPU that need not be there what launches would run: ``python tests/compile_launches.py``.

Interpreted kernels know no types that change in a loop, no shared memory and no assembler; compiled ones do.
Run without ``TRITON_INTERPRET``, which turns the compiler off.
"""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from validate.gpu.kernels.importance import window_importance
from validate.gpu.kernels.redundancy import redundancy
from validate.gpu.kernels.scores import combine_scores

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
    print(kernel.__name__, signature.get("keys", ""), compiled.metadata.shared)


def type_name(argument):
    """Name the type that Triton gives an argument."""
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def main():
    """Compile every kernel of the scores, in the sizes that a launch chooses."""
    JITFunction.run = compile_launch
    # Tensors without memory: a launch looks at types and shapes only.
    torch.set_default_device("meta")
    starts, lengths = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    out, sizes = torch.empty(300), {"longest": 300}
    for dtype in (torch.float32, torch.bfloat16):
        keys, queries = torch.empty((300, 128), dtype=dtype), torch.empty((1, 3, 5, 128), dtype=dtype)
        window_importance(queries, keys, starts, lengths, out, scale=1.0, window=8, **sizes)
        redundancy(keys, starts, lengths, out, threshold=0.5, **sizes)
    for repeated in (out, None):
        combine_scores(out, repeated, starts, lengths, out, alpha=0.1, kernel_size=7, window=8, **sizes)


if __name__ == "__main__":
    main()
