"""The user's two doors: generate(assistant_model=draft), and the unpatched custom_generate=draft.as_custom_generate().

The first is the only patch of transformers: `GenerationMixin.generate` is wrapped once, and rewrites a call that has a
draft for `assistant_model` into the public form of the second. All other calls pass through.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from .compat import rename_cache_argument

# Arguments of generate() that only a draft understands.
_OUR_ARGUMENTS = ("schedule", "generator")


class UnpatchedDoor:
    """Gives a draft `as_custom_generate`."""

    def as_custom_generate(
        self,
        *,
        streamer=None,
        stop_strings: str | list[str] | None = None,
        tokenizer=None,
        schedule=None,
        generator: torch.Generator | None = None,
        loop: str = "dspark",
    ) -> Callable:
        """A callable for `target.generate(..., custom_generate=...)`: the same loop without the patched door.

        generate() hands no `streamer`, `tokenizer` or `stop_strings` to such a callable, so they are given here.
        `loop="transformers"` runs transformers' own assisted loop with our candidates: batch 1, and within its limits.
        """
        criterion = None if stop_strings is None else _stop_string_criterion(stop_strings, tokenizer)
        decode = _decoding_method(self, streamer=streamer, schedule=schedule, generator=generator, loop=loop)

        def decode_from_prompt(
            model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
        ):
            if criterion is not None:
                stopping_criteria.append(criterion)
            if streamer is not None:  # generate() puts the prompt only to a streamer of its own
                streamer.put(input_ids.cpu())
            return decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

        return decode_from_prompt


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
        if not hasattr(draft, "speculative_decode"):
            _check_assistant(draft)
            return original(self, *args, **kwargs)
        if arguments.get("custom_generate") is not None:
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
        # generate() would build this criterion itself, but it hands no tokenizer to a callable and then refuses.
        criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
        criteria.append(_stop_string_criterion(stop_strings, tokenizer))
        arguments |= {"stopping_criteria": criteria, "stop_strings": None}
    return arguments | {"custom_generate": _decoding_method(draft, **bound)}


def _decoding_method(draft, *, streamer=None, **bound: Any) -> Callable:
    """`draft.speculative_decode` in the form generate() calls, with beam search left to transformers."""

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if generation_config.num_beams == 1:
            return draft.speculative_decode(model, *arguments, streamer=streamer, **bound, **model_kwargs)
        if streamer is not None:
            raise ValueError("`streamer` cannot be used with beam search: set `num_beams` to 1 or leave it out.")
        warnings.warn(
            f"`num_beams={generation_config.num_beams}`: beam search takes no draft, so this call runs "
            "transformers' plain beam search.",
            stacklevel=4,
        )
        return type(model)._beam_search(model, *arguments, **model_kwargs)

    return decode


def _stop_string_criterion(stop_strings: str | list[str], tokenizer) -> StopStringCriteria:
    if tokenizer is None:
        raise ValueError("`stop_strings` are compared with text: pass `tokenizer=`, too.")
    return StopStringCriteria(tokenizer, stop_strings)


def _generation_parameter(target, arguments: dict[str, Any], name: str) -> Any:
    """The value generate() would use: its own argument, else the call's generation config, else the target's."""
    if name in arguments:
        return arguments[name]
    value = getattr(arguments.get("generation_config"), name, None)
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
