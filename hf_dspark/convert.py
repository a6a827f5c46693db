"""Writing a draft in the layout that another engine reads; our own layout is `save_pretrained`'s."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .dialects_export import LAYOUTS, export_config
from .modeling_dspark import DSparkDraftModel


def convert(
    draft: DSparkDraftModel,
    layout: str,
    output: str | os.PathLike,
    *,
    target: PreTrainedModel | None = None,
) -> Path:
    """Write `draft` to the folder `output` as `layout`: "deepspec", "speculators", "specforge" or "dspark".

    `target` is needed where the layout keeps copies of its embedding or lm_head (deepspec; speculators with a
    vocabulary of the draft's own) or names it (speculators). Raises ValueError where it is missing, and where the
    layout cannot describe the draft.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"A draft is written as one of {LAYOUTS}, got {layout!r}.")
    folder = Path(output)
    if layout == "dspark":
        draft.save_pretrained(folder)
        return folder
    if target is not None:
        draft.bind_target(target)
    name = None if target is None else target.config.name_or_path or type(target).__name__
    architectures = [] if target is None else target.config.architectures or [type(target).__name__]
    export = export_config(draft.config, layout, target_name=name, target_architectures=architectures)
    state = {name: tensor.contiguous() for name, tensor in draft.state_dict().items()}
    for name, is_kept in (("embed_tokens", export.keeps_embed_tokens), ("lm_head", export.keeps_lm_head)):
        key = f"{name}.weight"
        if is_kept and key not in state:
            state[key] = _targets(draft, target, name, layout)
        elif not is_kept:
            state.pop(key, None)
    if export.keeps_t2d:
        is_drafted = torch.zeros(draft.config.vocab_size, dtype=torch.bool)
        state["t2d"] = is_drafted.index_fill(0, draft.draft_token_ids.cpu(), True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(export.config, indent=2) + "\n", encoding="utf-8")
    return folder


def _targets(draft: DSparkDraftModel, target: PreTrainedModel | None, name: str, layout: str) -> torch.Tensor:
    if target is None:
        raise ValueError(
            f"The layout {layout!r} keeps a copy of the target's `{name}`, and this draft has none: give `--target` "
            "(or `target=`)."
        )
    module = target.get_input_embeddings() if name == "embed_tokens" else target.get_output_embeddings()
    weight = module.weight.detach()
    if name == "lm_head" and draft.draft_token_ids is not None:
        weight = weight[draft.draft_token_ids.to(weight.device)]
    return weight.to("cpu", draft.dtype).clone()
