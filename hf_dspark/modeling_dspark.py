"""DSparkDraftModel: the context projection, the block's backbone, and the heads; how it is loaded and saved.

Decoder layers are a backbone's, the sequential stage is in `heads.py` and `draft.py`, the decoding in `generate.py`.
"""

import os
import re
import tempfile
import weakref
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .attention import draft_masks
from .backbone_deepseek_v4 import DeepseekV4Backbone
from .backbone_gemma4 import Gemma4Backbone
from .backbone_qwen3 import Qwen3Backbone
from .checkpoint import DeepseekV4Checkpoint
from .configuration_dspark import DSparkConfig
from .dialects import UNUSED
from .door import UnpatchedDoor, install
from .generate import SpeculativeDecoding
from .heads import SelectedRows, build_heads, is_readable
from .hub import HUB_ARGUMENTS, PUSH_ARGUMENTS, find_checkpoint, upload, write_custom_generate
from .loading import (
    check_draft_tokens,
    check_target,
    check_tensors,
    check_values,
    device_of,
    equals_targets,
    with_experts,
)
from .slots import window_cache
from .state import GenerationStats

logger = logging.get_logger(__name__)

BACKBONES = {"qwen3": Qwen3Backbone, "gemma4": Gemma4Backbone, "deepseek_v4": DeepseekV4Backbone}


class DSparkPreTrainedModel(PreTrainedModel):
    """What transformers' loading, saving and dispatch need to know of a draft."""

    config_class = DSparkConfig
    base_model_prefix = "model"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["DraftDecoderLayer"]
    # Copies of the target's that the draft does not use when it shares the target's own.
    _keys_to_ignore_on_load_unexpected = [rf"^(model\.)?{re.escape(name)}$" for name in UNUSED]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_own_weights"):
            module.init_own_weights()
        if module is self.rotary_emb and hasattr(module, "draft_config"):
            # Frequencies, which no checkpoint holds; transformers' general rule does not know these modules.
            with torch.device("cpu"):
                fresh = type(module)(module.draft_config)
            for name, buffer in fresh.named_buffers():
                module.get_buffer(name).copy_(buffer)


class DSparkDraftModel(SpeculativeDecoding, UnpatchedDoor, DSparkPreTrainedModel):
    """A DSpark draft (paper section 2): the `assistant_model` for generate() of the target it was trained for."""

    def __init__(self, config: DSparkConfig):
        super().__init__(config)
        if config.target_layer_ids is None:
            raise ValueError("A draft needs `target_layer_ids` and `mask_token_id` in its config.")
        backbone = BACKBONES[config.backbone_type]
        hidden_size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden_size) if config.has_embed_tokens else None
        num_tokens = config.draft_vocab_size or config.vocab_size
        self.lm_head = nn.Linear(hidden_size, num_tokens, bias=False) if config.has_lm_head else None
        self.fc = nn.Linear(len(config.target_layer_ids) * hidden_size, hidden_size, bias=False)
        self.hidden_norm = backbone.RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(backbone.DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = backbone.RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = backbone.RotaryEmbedding(config)
        # DeepSeek-V4's layers work on several residual streams, which this collapses behind the last one.
        self.hc_head = backbone.HyperHead(config) if hasattr(backbone, "HyperHead") else None
        self._keep_in_fp32_modules_strict = set(getattr(backbone, "in_fp32", ()))
        self.markov_head, self.confidence_head = build_heads(config)
        if config.draft_vocab_size is not None:  # draft token i is token i + d2t[i] of the target
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.generation_config = GenerationConfig()
        self.last_stats: GenerationStats | None = None
        self._borrowed = _Borrowed()
        self.contexts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # target cache -> its DraftContext
        self.compiled_rounds: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # target -> its CompiledRound
        self.post_init()

    def forward(
        self,
        features: torch.Tensor,  # [B, new, m*H]  of newly committed positions
        block_ids: torch.Tensor,  # [B, g]  anchor, then masks
        position_ids: torch.Tensor,  # [B, new+g]
        cache: Cache | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        kv_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, g, H] of the block, which the heads read; the new context and the block enter `cache`.

        They have passed the final norm, but for DeepSeek-V4's, which `compute_logits` norms. `attention_mask` is
        [B, 1, g, keys], True where seen, for all layers or by their type; None: as the config says. `kv_lengths` [B]
        stand in place of masks where all layers see the whole context: keys of each row, the block's included.
        Training packs many blocks behind one context, without a cache: then g counts them all and the mask parts them.
        """
        hidden_states = self._embed(block_ids)
        config = self.config
        masks = attention_mask
        if not isinstance(attention_mask, dict):
            masks = dict.fromkeys(config.layer_types, attention_mask)
        if attention_mask is None and kv_lengths is None:
            num_keys = position_ids.shape[1]
            if cache is not None:
                num_keys, _ = cache.get_mask_sizes(num_keys, 0)
            settings = {"causal": config.causal, "window": config.sliding_window, "device": hidden_states.device}
            masks = draft_masks(config.layer_types, block_ids.shape[1], num_keys, **settings)
        lengths = {} if kv_lengths is None else {"kv_lengths": kv_lengths}
        context = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        if self.hc_head is not None:
            hidden_states = hidden_states.unsqueeze(2).expand(-1, -1, self.hc_head.hc_mult, -1).contiguous()
        for layer, layer_type in zip(self.layers, config.layer_types, strict=True):
            hidden_states = layer(hidden_states, context, position_embeddings, cache, masks[layer_type], **lengths)
        return self.norm(hidden_states) if self.hc_head is None else self.hc_head(hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Base logits U_k [..., V] of the draft's tokens in fp32, by the draft's own lm_head or the target's."""
        head = self.lm_head if self.lm_head is not None else self._borrowed.get("lm_head")
        weight = getattr(head, "weight", None)  # SelectedRows moves its inputs itself
        like = weight if weight is not None and weight.is_floating_point() and weight.device.type != "meta" else None
        inputs = hidden_states if self.hc_head is None else self.norm(hidden_states)
        inputs = inputs if like is None else inputs.to(like.device, like.dtype)
        logits = head(inputs).to(hidden_states.device, torch.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """The target's ids [V] of the draft's tokens; None where the draft proposes from the whole vocabulary."""
        if self.config.draft_vocab_size is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_draft_tokens(self, token_ids: torch.Tensor) -> None:
        """Make `token_ids` [V], ids of the target in rising order, the draft's vocabulary."""
        self.d2t.copy_(token_ids.to(self.d2t.device) - torch.arange(len(self.d2t), device=self.d2t.device))
        if self._borrowed.lm_head is not None:
            self._borrowed.lm_head.select(self.draft_token_ids)

    def refresh_head(self) -> None:
        """Take anew what is copied of the target's lm_head, before graphs read it."""
        if isinstance(self._borrowed.lm_head, SelectedRows):
            self._borrowed.lm_head.refresh()

    def to_target_vocabulary(self, draft_logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] over the target's vocabulary from logits of the draft's tokens: -inf elsewhere."""
        if self.config.draft_vocab_size is None:
            return draft_logits
        ids = self.draft_token_ids.to(draft_logits.device)
        everywhere = draft_logits.new_full((draft_logits.shape[0], self.config.vocab_size), -torch.inf)
        return everywhere.index_copy_(1, ids, draft_logits)

    @property
    def context_window(self) -> int | None:
        """Positions of the context before the anchor that any layer sees; None: all of them."""
        return None if "full_attention" in self.config.layer_types else self.config.sliding_window

    def new_cache(self) -> Cache:
        """An empty cache for the draft's context, which keeps no more of it than the layers see."""
        if self.context_window is None:
            return DynamicCache()
        return window_cache(self.context_window, self.config.num_hidden_layers)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def bind_target(self, target: PreTrainedModel) -> None:
        """Check that the draft belongs to `target`, and use the target's embedding and lm_head where it has none.

        Raises ValueError where hidden size, vocabulary or layers do not fit.
        """
        check_target(self.config, target)
        if self.embed_tokens is None:
            self._borrowed.embed_tokens = target.get_input_embeddings()
        if self.lm_head is None:
            head = target.get_output_embeddings()
            ids = self.draft_token_ids
            if ids is None:
                self._borrowed.lm_head = head
            elif self._borrowed.lm_head is None or self._borrowed.lm_head.source is not head:
                self._borrowed.lm_head = SelectedRows(head, ids)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embedding = self.embed_tokens if self.embed_tokens is not None else self._borrowed.get("embed_tokens")
        weight = embedding.weight
        if is_readable(weight):
            # The table itself: what some targets' embedding modules do to it, a draft may not have been trained with.
            embedded = nn.functional.embedding(token_ids.to(weight.device), weight)
            if self.config.embed_scale is not None:
                embedded = embedded * torch.tensor(self.config.embed_scale, dtype=weight.dtype)
        else:
            embedded = embedding(token_ids)
        return embedded.to(self.fc.weight.device, self.fc.weight.dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        target: PreTrainedModel | None = None,
        config: DSparkConfig | None = None,
        experts: str | None = None,
        **kwargs: Any,
    ) -> "DSparkDraftModel":
        """Load a draft from a folder or the Hub, in our own layout or the authors'.

        Args:
            target: the model it drafts for. Its embedding and lm_head are shared where the draft has none of its own
                or equal ones, and the draft is placed on its device unless `device_map` is given. Without it the
                draft uses its own copies, or borrows at the first generate().
            experts: of a DeepSeek-V4 checkpoint: "packed" keeps the routed experts in fp4, dequantised where a block
                hits them, "dequantized" makes them bfloat16, four times as large. Default is the latter where it fits
                into the free memory.
            kwargs: as for any transformers model (dtype, device_map, revision, ...), and fields of DSparkConfig.

        Raises ValueError where config, tensors and target do not fit together.
        """
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        checkpoint = find_checkpoint(pretrained_model_name_or_path, **hub_arguments)
        checkpoint = with_experts(checkpoint, experts, target)
        if config is None:
            decision = checkpoint.decide()
            if decision.is_foreign:
                logger.warning_once(f"{pretrained_model_name_or_path}: DSpark draft in {decision.reason}.")
            overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in DSparkConfig.__annotations__}
            config = DSparkConfig(**decision.fields | overrides)
        if target is not None:
            check_target(config, target)
        if "d2t" in checkpoint.entries:
            check_draft_tokens(config, checkpoint)
        for name in ("embed_tokens", "lm_head"):
            is_own = f"{name}.weight" in checkpoint.entries and not equals_targets(checkpoint, name, target)
            setattr(config, f"has_{name}", is_own)
        check_tensors(cls, config, checkpoint)
        if target is not None and kwargs.get("device_map") is None and device_of(target).type != "cpu":
            kwargs["device_map"] = {"": device_of(target)}
        if checkpoint.is_renamed:
            kwargs["state_dict"] = checkpoint.state_dict()
        source = None if checkpoint.is_renamed else pretrained_model_name_or_path
        loaded = super().from_pretrained(source, *model_args, config=config, **kwargs)
        draft = loaded[0] if isinstance(loaded, tuple) else loaded
        check_values(draft)
        draft.generation_config = GenerationConfig()
        if not isinstance(checkpoint, DeepseekV4Checkpoint):  # beside whose draft lies the target's
            with suppress(OSError):  # most drafts ship none
                name = pretrained_model_name_or_path
                draft.generation_config = GenerationConfig.from_pretrained(name, **hub_arguments)
        if target is not None:
            draft.bind_target(target)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *, include_code: bool = False, **kwargs: Any) -> None:
        """Save config (our own fields, `model_type: dspark`), weights without what is the target's, and the draft's
        generation config.

        With `include_code` the folder also holds the code: `AutoModel.from_pretrained(folder, trust_remote_code=True)`
        loads it where hf_dspark is not installed, and `generate(assistant_model=draft)` works there; the folder also
        serves as `custom_generate=`.
        """
        push_to_hub = kwargs.pop("push_to_hub", False)
        hub_arguments = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        with _shipping_code(self) if include_code else nullcontext():
            super().save_pretrained(save_directory, **kwargs)
        self.generation_config.save_pretrained(save_directory)
        if include_code:
            write_custom_generate(save_directory)
        if push_to_hub:
            hub_arguments.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            upload(save_directory, **hub_arguments)

    def push_to_hub(self, repo_id: str, *, include_code: bool = False, **kwargs: Any) -> str:
        """Save the draft as `save_pretrained` does and upload it to `repo_id`, which is made where it is missing.

        Args:
            kwargs: `token`, `private`, `revision`, `commit_message`, `create_pr`, as in transformers; others are
                save_pretrained's.

        Returns the address of the commit.
        """
        hub_arguments = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_code=include_code, **kwargs)
            return upload(folder, repo_id=repo_id, **hub_arguments)


@contextmanager
def _shipping_code(draft: DSparkDraftModel):
    """What `register_for_auto_class` sets on the two classes, for one save."""
    names = {type(draft): "AutoModel", type(draft.config): "AutoConfig"}
    before = {cls: cls._auto_class for cls in names}
    had_map = hasattr(draft.config, "auto_map")
    try:
        for cls, name in names.items():
            cls._auto_class = name
        yield
    finally:
        for cls, name in before.items():
            cls._auto_class = name
        if not had_map and hasattr(draft.config, "auto_map"):
            del draft.config.auto_map


class _Borrowed:
    """The target's embedding and lm_head: no modules of the draft, so `.to()`, saving and copies leave them alone."""

    embed_tokens: nn.Module | None = None
    lm_head: nn.Module | None = None

    def get(self, name: str) -> nn.Module:
        module = getattr(self, name)
        if module is None:
            raise ValueError(
                f"This draft has no `{name}` of its own and is not bound to a target yet. Load it with "
                "`DSparkDraftModel.from_pretrained(..., target=target)`, or call `draft.bind_target(target)`; "
                "generate(assistant_model=draft) does it by itself."
            )
        return module

    def __deepcopy__(self, memo: dict) -> "_Borrowed":
        copied = _Borrowed()
        copied.__dict__.update(self.__dict__)
        return copied


AutoConfig.register("dspark", DSparkConfig, exist_ok=True)
AutoModel.register(DSparkConfig, DSparkDraftModel, exist_ok=True)
install()
