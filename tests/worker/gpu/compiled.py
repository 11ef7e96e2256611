"""``python -m tests.worker.gpu.compiled``: compile each kernel for GPUs, of which none is needed.

The interpreter, which the tests run kernels with, takes more than the compiler does.
"""

import itertools
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from worker.gpu import kernels

CAPABILITIES = (80, 90)
DTYPES = ("bf16", "fp16", "fp32")
FLOAT32, INT64, BOOL = "*fp32", "*i64", "*i1"
# Arguments that are not tensors of the layer's dtype.
OTHERS = {
    "factors": FLOAT32,
    "losses": FLOAT32,
    "labels": INT64,
    "hits": BOOL,
    "epsilon": "fp32",
    **dict.fromkeys(("d", "n_heads", "half"), "i32"),
    **dict.fromkeys(("by_gate", "by_value", "by_result", "result_by_head"), "i32"),
    **dict.fromkeys(("by_token", "by_head"), "i32"),
}
BLOCKS = {"block": 1024, "heads": 32}


def variants() -> Any:
    """Return each kernel with each choice of what it is compiled for."""
    for kernel in vars(kernels).values():
        if not isinstance(kernel, triton.runtime.JITFunction) or kernel.__name__.startswith("_"):
            continue
        constants = [kernel.arg_names[at] for at in kernel.constexprs]
        flags = [name for name in constants if name not in BLOCKS]
        sizes = {name: BLOCKS[name] for name in constants if name in BLOCKS}
        for chosen in itertools.product((False, True), repeat=len(flags)):
            yield kernel, sizes | dict(zip(flags, chosen, strict=True))


def main() -> None:
    for capability, dtype in itertools.product(CAPABILITIES, DTYPES):
        target = GPUTarget("cuda", capability, 32)
        for kernel, constants in variants():
            signature = {
                name: "constexpr" if name in constants else OTHERS.get(name, f"*{dtype}")
                for name in kernel.arg_names
            }
            places = {(kernel.arg_names.index(name),): each for name, each in constants.items()}
            made = triton.compile(ASTSource(kernel, signature, places), target=target)
            sys.stdout.write(f"{kernel.__name__} {capability} {dtype} {len(made.asm['cubin'])}\n")


if __name__ == "__main__":
    main()
