"""The user's door: generate(assistant_model=draft) becomes a public custom_generate=<callable> call.

The only patch of transformers: `GenerationMixin.generate` is wrapped once. Calls without a DSpark draft pass through.
"""

import functools
import inspect
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from .compat import rename_cache_argument

_OUR_ARGUMENTS = ("schedule", "generator")


def install() -> None:
    """Wrap GenerationMixin.generate, unless this or another copy of it already did."""
    original = GenerationMixin.generate
    if getattr(original, "_draft_protocol", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self, *args, **kwargs):
        arguments = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        draft = arguments.get("assistant_model")
        if arguments.get("custom_generate") is not None or not hasattr(draft, "speculative_decode"):
            _check_assistant(draft)
            return original(self, *args, **kwargs)
        del arguments["self"], arguments["assistant_model"]
        arguments |= arguments.pop("kwargs", {})
        return original(self, **_with_draft(self, draft, rename_cache_argument(arguments)))

    generate._draft_protocol = True
    GenerationMixin.generate = generate


def _with_draft(target, draft, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of generate() that run `draft` as a decoding method, with what generate() would drop on the way."""
    tokenizer = arguments.pop("tokenizer", None)
    arguments.pop("assistant_tokenizer", None)
    bound = {name: arguments.pop(name) for name in _OUR_ARGUMENTS if name in arguments}
    bound |= {"streamer": arguments.get("streamer"), "synced_gpus": bool(arguments.get("synced_gpus"))}
    stop_strings = _generation_parameter(target, arguments, "stop_strings")
    if stop_strings is not None:
        # generate() would build this criterion, but it hands no tokenizer to a callable and then refuses.
        from transformers import StoppingCriteriaList, StopStringCriteria

        if tokenizer is None:
            raise ValueError("`stop_strings` are compared with text: pass `tokenizer=` to generate(), too.")
        criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
        arguments |= {"stopping_criteria": criteria, "stop_strings": None}

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return draft.speculative_decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config, **bound, **model_kwargs
        )

    return arguments | {"custom_generate": decode}


def _generation_parameter(target, arguments: dict[str, Any], name: str) -> Any:
    """The value generate() would use: its own argument, else the call's generation config, else the target's."""
    if name in arguments:
        return arguments[name]
    config: GenerationConfig | None = arguments.get("generation_config")
    value = getattr(config, name, None)
    return value if value is not None else getattr(target.generation_config, name, None)


def _check_assistant(assistant: Any) -> None:
    """A DSpark checkpoint that AutoModel took for a plain model of its `model_type` must not run as one."""
    config = getattr(assistant, "config", None)
    if hasattr(config, "markov_rank") and hasattr(config, "target_layer_ids"):
        raise ValueError(
            f"The assistant is a {type(assistant).__name__} built from a DSpark draft's checkpoint "
            f"({config.name_or_path!r}): AutoModel takes the draft for an ordinary model. Load it with "
            "`hf_dspark.DSparkDraftModel.from_pretrained(...)`."
        )
