"""Compile the kernels ahead of time for one GPU architecture, without a GPU, and print what they need as JSON lines.

    python tests/compile_kernels.py 90 232448

The second number is the part's bytes of shared memory for a program, by which some launches are chosen.
A process of its own: where Triton interprets kernels, it cannot compile them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_dspark.kernels import triton_acceptance as acceptance
from hf_dspark.kernels import triton_attention as attention
from hf_dspark.kernels import triton_linear as linear
from hf_dspark.kernels import triton_sampling as sampling

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass
class Build:
    """One kernel with its arguments' types: "*bf16", "i32", "fp32", ..., or a value where it is a constant."""

    name: str
    kernel: triton.JITFunction
    arguments: dict
    options: dict  # of the launch

    def figures(self, capability: int) -> dict:
        """Registers a thread, spilled words, bytes of shared memory and of stack."""
        constants, signature, attributes = {}, {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            is_type = isinstance(value, str) and re.fullmatch(r"\*?(fp|bf|i|u)\d+", value)
            signature[name] = value if is_type else "constexpr"
            if not is_type:
                constants[index,] = value
            elif value.startswith("*") or (value == "i32" and name not in self.kernel.do_not_specialize):
                attributes[index,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return {"kernel": self.name, "shared": built.metadata.shared, **_read(built.asm["cubin"])}


def _read(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    numbers = {key: int(re.search(rf"{word}:(\d+)", usage)[1]) for key, word in _USAGE.items()}
    # Spilled words are written to the stack and read back.
    return numbers | {
        "spills": len(re.findall(r"\bSTL\b", code)),
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)),
    }


_USAGE = {"registers": "REG", "stack": "STACK"}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _attention(name: str, shared_memory: int, head_dim: int, dtype: str = "bf16", **flags) -> Build:
    size = 4 if dtype == "fp32" else 2
    arguments = dict.fromkeys(attention.split_attention_kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("query", "key", "value"), f"*{dtype}")
    arguments |= {"lengths": "*i32", "partial": "*fp32", "statistics": "*fp32", "scaling": "fp32", "softcap": "fp32"}
    arguments |= {"NUM_KEY_HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim, "IS_CAUSAL": True, "HAS_LENGTHS": True}
    arguments |= {"HAS_WINDOW": False, "HAS_SOFTCAP": False}
    arguments |= attention.block_sizes(head_dim, size) | flags
    options = attention.options(head_dim, size, shared_memory)
    return Build(f"attention {name}", attention.split_attention_kernel, arguments, options)


def _merge(head_dim: int, num_splits: int) -> Build:
    arguments = dict.fromkeys(("num_splits", "num_rows"), "i32")
    arguments |= {"partial": "*fp32", "statistics": "*fp32", "sinks": "*bf16", "output": "*bf16"}
    arguments |= {"NUM_HEADS": 32, "HEAD_DIM": head_dim, "HAS_SINKS": True}
    options = attention.merge_options(head_dim, num_splits)
    arguments["BLOCK_SPLITS"] = options.pop("BLOCK_SPLITS")
    return Build(f"merge of {num_splits} splits, {head_dim}", attention.merge_splits_kernel, arguments, options)


def _sampler(name: str, dtype: str = "bf16", token_ids: str | None = None, uniforms: str | None = "*fp64"):
    """Both kernels for a vocabulary of 151,936 tokens and rank 256."""
    arguments = dict.fromkeys(sampling.add_bias_kernel.arg_names, "i32")
    arguments |= {"base_logits": "*fp32", "w1": f"*{dtype}", "w2": f"*{dtype}", "draft_logits": "*fp32"}
    arguments |= {
        "token_ids": token_ids,
        "largest": "*fp32",
        "masses": "*fp64",
        "tokens": "*i64",
        "uniforms": uniforms,
    }
    arguments |= {"temperature": "fp32", "RANK": 256, "BLOCK_TILES": 2048, "BLOCK_B": sampling.BLOCK_B}
    arguments |= {"BLOCK_V": sampling.BLOCK_V, "BLOCK_R": sampling.BLOCK_BYTES // (4 if dtype == "fp32" else 2)}
    for kernel in (sampling.add_bias_kernel, sampling.choose_kernel):
        yield Build(f"{kernel.fn.__name__} {name}", kernel, arguments, sampling.OPTIONS)


def _acceptance():
    """The three kernels for the same vocabulary."""
    arguments = dict.fromkeys(("target_stride", "draft_stride", "length", "num_columns"), "i32")
    arguments |= dict.fromkeys(("target_logits", "draft_logits", "norms", "largest"), "*fp32")
    arguments |= {"temperature": "fp32", "masses": "*fp64", "shares": "*fp64", "uniforms": "*fp64"}
    arguments |= dict.fromkeys(("draft_ids", "limits", "num_accepted", "token_ids"), "*i64")
    arguments |= {"BLOCK_V": acceptance.BLOCK_V, "BLOCK_TILES": 128, "BLOCK_LINES": 16}
    decide = arguments | {"uniforms": "*fp32"}
    yield Build("summarise_kernel", acceptance.summarise_kernel, arguments, acceptance.OPTIONS)
    yield Build("decide_kernel", acceptance.decide_kernel, decide, acceptance.OPTIONS)
    yield Build("draw_kernel", acceptance.draw_kernel, arguments, acceptance.OPTIONS)


def _linear(name: str, shared_memory: int, dtype: str = "bf16", bias: str | None = None) -> Build:
    arguments = dict.fromkeys(("num_rows", "num_columns", "num_channels"), "i32")
    arguments |= dict.fromkeys(("states", "weight", "output"), f"*{dtype}")
    arguments |= {"bias": bias, **linear.BLOCKS}
    return Build(f"linear {name}", linear.few_rows_kernel, arguments, linear.options(shared_memory))


def builds(shared_memory: int) -> list[Build]:
    """Every kernel in the configurations that are launched."""
    attend = partial(_attention, shared_memory=shared_memory)
    return [
        attend("64", head_dim=64),
        attend("128", head_dim=128),
        attend("256", head_dim=256),
        attend("128, group of 5", head_dim=128, GROUP=5),
        attend("128, bidirectional", head_dim=128, IS_CAUSAL=False, HAS_LENGTHS=False, lengths=None),
        attend("64, window", head_dim=64, GROUP=8, HAS_WINDOW=True),
        attend("256, window, soft-cap", head_dim=256, GROUP=2, HAS_WINDOW=True, HAS_SOFTCAP=True),
        attend("128, fp16", head_dim=128, dtype="fp16"),
        attend("128, fp32", head_dim=128, dtype="fp32"),
        attend("256, fp32", head_dim=256, dtype="fp32"),
        *(_merge(head_dim, num_splits) for head_dim in (128, 256) for num_splits in (1, 8, 100)),
        *_sampler("bf16"),
        *_sampler("bf16, draft vocabulary", token_ids="*i64"),
        *_sampler("fp32, greedy", "fp32", uniforms=None),
        *_acceptance(),
        _linear("bf16", shared_memory),
        _linear("bf16, bias", shared_memory, bias="*bf16"),
        _linear("fp16", shared_memory, dtype="fp16"),
    ]


if __name__ == "__main__":
    for build in builds(int(sys.argv[2])):
        print(json.dumps(build.figures(int(sys.argv[1]))))
