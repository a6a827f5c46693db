"""Load a draft that `hf-dspark convert --to speculators` wrote with the speculators package itself.

Run it in an environment of its own (speculators pins an older transformers than hf_dspark needs):

    python -m venv speculators_env && speculators_env/bin/pip install speculators==0.9.0
    hf-dspark convert DRAFT --to speculators --output EXPORT --target TARGET
    speculators_env/bin/python examples/read_speculators_export.py EXPORT

TARGET must still lie where the export names it. Every tensor of the file must be in its place in the loaded model.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig


def main(folder: str) -> None:
    config = DSparkSpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = DSparkDraftModel.from_pretrained(folder, config=config)
    loaded, stored = model.state_dict(), load_file(Path(folder) / "model.safetensors")
    wrong = [name for name, tensor in stored.items() if not torch.equal(loaded[name].to(tensor.dtype), tensor)]
    assert not wrong, f"not in place: {wrong}"
    theirs = sorted(loaded.keys() - stored.keys())
    print(f"{len(stored)} tensors in place; taken from the target: {', '.join(theirs)}")
    tokens = config.speculators_config.proposal_methods[0].speculative_tokens
    print(f"block size {config.block_size}, {tokens} tokens, anchor drafts: {config.sample_from_anchor}")


if __name__ == "__main__":
    main(sys.argv[1])
