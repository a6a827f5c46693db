"""The structure that architecture decides: imports point down, outside things have one owner, files can travel."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_dspark"

# Top row first; a file may import only from rows below its own.
ROWS = [
    ["__main__"],
    ["cli"],
    ["cli_calibrate", "cli_check", "cli_convert", "cli_eval", "cli_generate", "cli_train"],
    ["doctor", "predictor"],
    ["calibrate", "cards", "costs", "demo", "processes", "request_files", "serving", "train"],
    ["comparison", "eval", "cli_options", "convert", "row_queue"],
    ["modeling_dspark"],
    ["door", "generate", "backbone_qwen3", "backbone_gemma4", "backbone_deepseek_v4", "hub", "loading"],
    ["batch_call"],
    ["candidate_generator", "batch"],
    ["batch_draft"],
    ["captured"],
    ["compiled"],
    ["traced"],
    ["draft", "attention_interface", "rows"],
    ["limits", "layerwise"],
    [
        "features",
        "schedule",
        "verify",
        "accept",
        "rollback",
        "slots",
        "heads",
        "checkpoint",
        "agreement",
        "terms",
        "joined",
    ],
    ["configuration_dspark", "sampling", "attention", "few_rows", "dialects_export", "draft_gate"],
    [
        "dialects",
        "dialects_deepseek_v4",
        "dequantize",
        "state",
        "compat",
        "dispatch",
        "packing",
        "cost_table",
        "graphs",
        "model_state",
        "warpers",
    ],
]
# They stand outside: `dispatch` finds them by name, and they import nothing of the package but records.
KERNELS = sorted(path.stem for path in PACKAGE.glob("kernels/*.py"))
ROW_OF = {name: index for index, row in enumerate(ROWS) for name in row}
# verify.py types its argument with the tap it is given.
SAME_ROW = {("verify", "features")}
# What `save_pretrained` can ship as remote code: modeling_dspark and everything below.
SHIPPED = [name for row in ROWS[ROWS.index(["modeling_dspark"]) :] for name in row]
MAY_IMPORT = {"torch", "transformers", "safetensors", "huggingface_hub"}

# They read tensors after a call, never during a round; the others say at the place why they read.
OUTSIDE_THE_ROUND = {"state", "comparison", "cli", "calibrate", "doctor", "predictor", "serving"}
READERS = {
    "generate",
    "limits",
    "row_queue",
    "batch",
    "batch_call",
    "captured",
    "terms",
    "attention",
    "agreement",
    "candidate_generator",
    "accept",
    "sampling",
    "backbone_deepseek_v4",
}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
FOLDERS = sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"kernels"})


def _source(name):
    return (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def _relative_imports(name):
    for node in ast.walk(ast.parse(_source(name))):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node


def test_every_module_has_a_row():
    assert {*MODULES, *FOLDERS} == set(ROW_OF)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for node in _relative_imports(name):
        imported = node.module.split(".")[0] if node.module else "__init__"
        if imported == "__init__":
            assert ROW_OF[name] == 0, f"{name} imports the package itself"
        elif (name, imported) not in SAME_ROW:
            assert ROW_OF[imported] > ROW_OF[name], f"{name} imports {imported}"


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_stand_outside(name):
    for node in _relative_imports(f"kernels/{name}"):
        names_kernel = node.level == 1 and node.module in KERNELS
        assert names_kernel or (node.level == 2 and node.module == "state"), f"{name} imports {node.module}"


@pytest.mark.parametrize("name", [*MODULES, "__init__"])
def test_nothing_imports_kernels_by_statement(name):
    assert not re.search(r"^\s*(import|from) \.*(\w+\.)*(kernels|triton)\b", _source(name), re.M)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_in_the_form_that_transformers_copies(name):
    for node in _relative_imports(name):
        assert node.level == 1, f"{name}: only `from .name import x`"
        assert node.module, f"{name}: only `from .name import x`"
        assert "." not in node.module, f"{name}: only `from .name import x`"
    for node in ast.walk(ast.parse(_source(name))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for module in names:
            root = module.split(".")[0]
            assert root != "hf_dspark", f"{name} imports the package by its own name"
            is_standard = root in MAY_IMPORT or root in sys.stdlib_module_names
            assert is_standard, f"{name} imports {root}, which a user of remote code may not have"


@pytest.mark.parametrize(
    ("pattern", "owners"),
    [
        (r"GenerationMixin\.generate\b", {"door"}),
        (r"_get_candidate_generator", {"candidate_generator"}),
        (r"perf_counter|cuda\.Event", {"generate", "comparison", "costs"}),
        (r"[\"']past_key_values[\"']", {"compat", "comparison"}),
        (r"\.crop\(|activate_past_recording", {"rollback", "slots"}),
        (r"outputs\.hidden_states|output_hidden_states\"", {"features", "limits", "verify", "batch"}),
        (r"transformers\.models\.", {"backbone_qwen3", "backbone_gemma4", "backbone_deepseek_v4"}),
        (r"\bprint\(", {"cli", "cli_calibrate", "cli_check", "cli_convert", "cli_eval", "cli_generate", "cli_train"}),
        (r"\.tolist\(\)|\.item\(\)", READERS | OUTSIDE_THE_ROUND),
        (r"init_process_group", {"processes"}),
        # Copies that the host waits for, with all that is under way; rounds use `rows.on_device`.
        (r"torch\.tensor\(.*device=", {"dequantize", "packing", "row_queue", "sampling", "schedule"}),
        (r"Qwen3DSparkModel", {"dialects", "dialects_export"}),
    ],
)
def test_outside_things_have_one_owner(pattern, owners):
    found = {name for name in MODULES if re.search(pattern, _source(name))}
    assert found <= owners


def test_triton_is_used_in_its_own_files_alone():
    found = {name for name in KERNELS if "triton" in _source(f"kernels/{name}").replace(".triton_", "")}
    assert all(name.startswith("triton_") for name in found)


def test_no_module_is_longer_than_400_lines():
    names = [*MODULES, *(f"kernels/{name}" for name in KERNELS)]
    assert {name: count for name in names if (count := len(_source(name).splitlines())) > 400} == {}
