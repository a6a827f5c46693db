"""Whether a checkpoint, a config and a target belong together: the checks and choices of `from_pretrained`."""

import importlib

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoint import Checkpoint, DeepseekV4Checkpoint
from .configuration_dspark import DSparkConfig
from .dialects import UNUSED
from .features import num_target_layers
from .heads import is_readable

logger = logging.get_logger(__name__)


def check_target(config: DSparkConfig, target: PreTrainedModel) -> None:
    """Raise ValueError where a draft of this config cannot have been trained for `target`."""
    theirs = target.config.get_text_config(decoder=True)
    name = target.config.name_or_path or type(target).__name__
    remedy = f"Load the draft that belongs to {name!r}, or the target named in the draft's model card."
    for field, meaning in (("hidden_size", "hidden size"), ("vocab_size", "vocabulary size")):
        ours, their = getattr(config, field), getattr(theirs, field)
        if ours != their:
            raise ValueError(f"This draft was trained for {meaning} {ours}, but the target has {their}. {remedy}")
    layers = num_target_layers(target)
    if max(config.target_layer_ids) >= layers or (config.num_target_layers or layers) != layers:
        expected = config.num_target_layers or f"more than {max(config.target_layer_ids)}"
        raise ValueError(
            f"This draft reads layers {config.target_layer_ids} of a target with {expected} layers, but this target "
            f"has {layers}. {remedy}"
        )


def equals_targets(checkpoint: Checkpoint, name: str, target: PreTrainedModel | None) -> bool:
    """Whether the draft's copy of the target's embedding or lm_head can be dropped for the target's own."""
    if target is None:
        return False
    module = target.get_input_embeddings() if name == "embed_tokens" else target.get_output_embeddings()
    weight = module.weight
    if not is_readable(weight):
        reason = "offloaded, quantised or sharded"
        logger.warning_once(f"The target's `{name}` cannot be read ({reason}); the draft keeps its own.")
        return False
    ours, theirs = checkpoint.tensor(f"{name}.weight"), weight.detach()
    if name == "lm_head" and "d2t" in checkpoint.entries:
        offsets = checkpoint.tensor("d2t")
        theirs = theirs[(offsets + torch.arange(len(offsets))).to(theirs.device)]
    if ours.shape == theirs.shape and torch.equal(ours, theirs.to("cpu", ours.dtype)):
        return True
    logger.warning_once(
        f"The draft's `{name}` differs from the target's, so the draft keeps its own. If it was trained with the "
        "target's, this is another version of the target."
    )
    return False


def check_tensors(
    draft_class: type[PreTrainedModel], config: DSparkConfig, checkpoint: Checkpoint | DeepseekV4Checkpoint
) -> None:
    """Compare names and shapes with what the config asks for, before anything is loaded."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in draft_class(config).state_dict().items()}
    found = checkpoint.shapes
    not_used = set(UNUSED)
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys() - not_used),
        "of another shape": [
            f"{name} {found[name]} (the config asks for {shape})"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in problems.items() if names)
        raise ValueError(
            f"The draft's tensors do not fit its config - {listed}. Get the complete checkpoint, or correct the field "
            "of config.json that they depend on."
        )


def check_values(draft: PreTrainedModel) -> None:
    """Raise ValueError where loaded tensors cannot be a draft's."""
    broken = [
        name
        for name, parameter in draft.named_parameters()
        if parameter.is_floating_point() and parameter.device.type != "meta" and not _is_finite(parameter)
    ]
    if broken:
        raise ValueError(
            f"The draft's weights hold NaN or infinity ({', '.join(broken[:5])}): the training or the conversion "
            "failed. Take an earlier checkpoint, or another dtype where bfloat16 weights were read as float16."
        )


def _is_finite(parameter: torch.Tensor) -> bool:
    """Checked in pieces: a mask of a whole stage of experts would be gigabytes."""
    return all(bool(piece.isfinite().all()) for piece in parameter.detach().flatten().split(2**20))


def with_experts(
    checkpoint: Checkpoint | DeepseekV4Checkpoint, experts: str | None, target: PreTrainedModel | None
) -> Checkpoint | DeepseekV4Checkpoint:
    """The checkpoint with the routed experts that were asked for, or packed where memory is short."""
    if not isinstance(checkpoint, DeepseekV4Checkpoint):
        if experts is not None:
            raise ValueError(
                f"`experts={experts!r}` is for the files of a DeepSeek-V4 target; other drafts' experts, if any, are "
                "loaded as they were saved. Leave it out, or load the original repository."
            )
        return checkpoint
    if experts not in (None, "packed", "dequantized"):
        raise ValueError(f'`experts` must be "packed" or "dequantized", got {experts!r}.')
    if experts is None:
        device = None if target is None else device_of(target)
        experts = "packed" if checkpoint.num_bytes > 0.8 * free_memory(device) else "dequantized"
    return checkpoint.with_experts(is_packed=experts == "packed")


def check_draft_tokens(config: DSparkConfig, checkpoint: Checkpoint) -> None:
    offsets = checkpoint.tensor("d2t")
    ids = offsets + torch.arange(len(offsets))
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or not (ids.diff() > 0).all():
        raise ValueError(
            f"The draft's `d2t` does not name {len(ids)} tokens of a vocabulary of {config.vocab_size} in rising "
            "order: the file belongs to another tokenizer, or is damaged. Get the complete checkpoint."
        )


def free_memory(device: torch.device | None) -> float:
    """Bytes that are free on `device` (None: the CPU); infinite where nothing tells."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return importlib.import_module("psutil").virtual_memory().available
    except ImportError:  # it comes with accelerate
        return float("inf")


def device_of(target: PreTrainedModel) -> torch.device:
    """Where the target's last step happens: the draft belongs beside it."""
    device = target.get_output_embeddings().weight.device
    return target.device if device.type == "meta" else device
