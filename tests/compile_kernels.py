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

from hf_dspark.kernels import triton_acceptance as acceptance
from hf_dspark.kernels import triton_sampling as sampling

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
    return [*sampling_builds()]


def sampling_builds() -> list[Build]:
    """The sampler and the acceptance of Qwen3 (V = 151,936, rank 256); fp32 weights, and a draft vocabulary."""
    tiles = {"largest": "*fp32", "masses": "*fp64", "temperature": "fp32"}
    counts = dict.fromkeys(
        ("position", "num_rows", "num_tokens", "num_columns", "num_target_columns", "length"), "i32"
    )
    unaligned = ("position", "num_rows", "num_tokens", "length")
    common = tiles | counts | {"base_logits": "*fp32", "draft_logits": "*fp32", "tokens": "*i64"}
    settings = {
        "bf16": {"w1": "*bf16", "w2": "*bf16", "token_ids": None, "uniforms": "*fp64", "BLOCK_R": 64},
        "fp32, greedy": {"w1": "*fp32", "w2": "*fp32", "token_ids": None, "uniforms": None, "BLOCK_R": 32},
        "bf16, draft vocabulary": {
            "w1": "*bf16",
            "w2": "*bf16",
            "token_ids": "*i64",
            "uniforms": "*fp64",
            "BLOCK_R": 64,
        },
    }
    add_bias = {"RANK": 256, "BLOCK_B": sampling.BLOCK_B, "BLOCK_V": sampling.BLOCK_V}
    choose = {"BLOCK_TILES": 2048, "BLOCK_V": sampling.BLOCK_V}
    built = []
    for name, setting in settings.items():
        arguments = common | setting
        built += [
            Build(f"_add_bias, {name}", sampling._add_bias, arguments | add_bias, 4, 3, unaligned),
            Build(f"_choose, {name}", sampling._choose, arguments | choose, 4, unaligned=unaligned),
        ]
    arguments = common | {"target_logits": "*fp32", "target_stride": "i32", "draft_stride": "i32"}
    arguments |= {"draft_ids": "*i64", "num_accepted": "*i64", "shares": "*fp64", "token_ids": "*i64"}
    arguments |= {"BLOCK_V": acceptance.BLOCK_V, "BLOCK_TILES": 128, "BLOCK_LINES": 16, "norms": "*fp32"}
    for name, uniforms in (("_summarise", None), ("_decide", "*fp32"), ("_draw", "*fp64")):
        kernel = getattr(acceptance, name)
        built.append(Build(name, kernel, arguments | {"uniforms": uniforms}, 8, unaligned=unaligned))
    return built


if __name__ == "__main__":
    for build in builds():
        print(json.dumps(build.figures(int(sys.argv[1]))))
