"""Compile the kernels ahead of time for one GPU architecture, without a GPU, and print what they need as JSON lines.

    python tests/compile_kernels.py 90

A process of its own: where Triton interprets kernels, it cannot compile them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass
class Build:
    """One kernel with its arguments' types: "*bf16", "i32", "fp32", ..., or a value where it is a constant."""

    name: str
    kernel: triton.JITFunction
    arguments: dict
    num_warps: int = 4
    num_stages: int = 2
    unaligned: tuple[str, ...] = field(default=())  # integers that 16 does not divide; pointers are aligned

    def figures(self, capability: int) -> dict:
        """Registers a thread, spilled words, bytes of shared memory and of stack."""
        constants, signature, attributes = {}, {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            is_type = isinstance(value, str) and re.fullmatch(r"\*?(fp|bf|i|u)\d+", value)
            signature[name] = value if is_type else "constexpr"
            if not is_type:
                constants[index,] = value
            elif name not in self.unaligned and not value.startswith("fp"):
                attributes[index,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        return {"kernel": self.name, "shared": built.metadata.shared, **_read(built.asm["cubin"])}


def _read(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    numbers = {key: int(re.search(rf"{word}:(\d+)", usage)[1]) for key, word in _USAGE.items()}
    # Spilled words are written to the stack and read back.
    return numbers | {"spills": len(re.findall(r"\bSTL\b", code)), "tensor_cores": len(re.findall(r"\b\w*MMA", code))}


_USAGE = {"registers": "REG", "stack": "STACK"}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def builds() -> list[Build]:
    """Every kernel in the configurations that are launched."""
    return []


if __name__ == "__main__":
    for build in builds():
        print(json.dumps(build.figures(int(sys.argv[1]))))
