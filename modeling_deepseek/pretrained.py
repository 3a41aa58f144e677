"""What all our models share towards transformers: loading, saving, initialising, switching implementations."""

import dataclasses
import os
import re
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .adapters import PLACE, tell_what_differs, with_changes
from .attention_compressed import DeepSeekWindowAttention, GroupedLinear
from .checkpoint_files import in_turn, naming_the_broken_file, open_slices, unlisted
from .checkpoint_keys import register_conversions, reversible, without_fusing
from .compressor import DeepSeekCompressor
from .configuration_deepseek import DeepSeekConfig
from .engram import DeepSeekEngram, EngramHash, engram_ids, first_ids, with_engram_ids
from .moe import DeepSeekExperts
from .quantization import DequantizedSlice, dequantized, unpacked, write_packed
from .residual import HyperConnection, HyperStreams
from .routers import DeepSeekTopKRouter, refuse_bad_tables
from .tested_versions import tell_if_untested
from .weight_names import LAYER, CheckpointError, take_mtp_keys, with_our_names
from .whole_folders import current, writing_beside

register_conversions()
logger = logging.get_logger(__name__)
VISION = r"^(?:vision\.|aligner\.|image_(?:start|newline|end)$)"  # V4.1's, which heads for text alone leave


class DeepSeekPreTrainedModel(PreTrainedModel):
    """What all our models share towards transformers: loading, initialising, recording, switching implementations."""

    config_class = DeepSeekConfig
    config: DeepSeekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        *("DeepSeekDecoderLayer", "DeepSeekSharingLayer"),
        *("DeepSeekMTPLayer", "DeepSeekStreamMTPLayer", "DeepSeekDraftStage", "DeepSeekShiftedDraftStage"),
        "DeepSeekVisionBlock",
    ]
    _own_weights: tuple[str, ...] = ()  # beside the trunk's, beginnings of names of what a checkpoint must have
    _keys_to_ignore_on_load_unexpected = [VISION]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = [
        "e_score_correction_bias",
        "e_score_correction_bias_vl",
        "gate.weight",
        "attn_hc",
        "ffn_hc",
        "hc_head",
        "attn_sink",
        "ape",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepSeekTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            for name in ("e_score_correction_bias", "e_score_correction_bias_vl"):
                if isinstance(bias := getattr(module, name, None), torch.Tensor):
                    init.zeros_(bias)
        elif isinstance(module, DeepSeekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, (HyperConnection, HyperStreams)):
            init.normal_(module.fn, mean=0.0, std=std)
            init.zeros_(module.base)
            init.ones_(module.scale)
        elif isinstance(module, GroupedLinear):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, DeepSeekWindowAttention):
            init.zeros_(module.attn_sink)
        elif isinstance(module, DeepSeekCompressor):
            init.zeros_(module.ape)
        elif isinstance(module, DeepSeekEngram):
            init.ones_(module.q_weight)
            init.ones_(module.k_weight)
        elif isinstance(module, EngramHash):
            for name, values in module.numbers.items():
                init.copy_(getattr(module, name), torch.tensor(values))
        elif isinstance(ids := getattr(module, "engram_ids", None), torch.Tensor):
            init.copy_(ids, first_ids(self.config))

    # transformers finds out by reading this file's text whether implementations may be chosen; ours are in siblings.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The implementation asked for; without a wish grouped_mm, or eager for widths that grouped_mm refuses."""
        config = self.config
        # It wants rows of whole 16 bytes: 8 numbers in bfloat16, to which a model may be cast at any time.
        odd = config.n_routed_experts and (config.hidden_size % 8 or (config.moe_intermediate_size or 0) % 8)
        if requested_experts is None and odd:
            requested_experts = "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers', but a damaged file is named, a killed save is seen as done or not begun, and an adapter's
        base is as the adapter's training left it."""
        tell_if_untested()
        source = pretrained_model_name_or_path and current(pretrained_model_name_or_path, "config.json")
        with naming_the_broken_file(source):
            source, kwargs = with_changes(cls, source, kwargs)
            return super().from_pretrained(source, *args, **kwargs)

    def load_engram_ids(self, tokenizer: Any) -> None:
        """Take the ids of n-grams from a tokenizer, as a new model has to; a checkpoint's model has them.

        Raises:
            ValueError: for a model without tables of n-grams, and a tokenizer that does not fit them.
        """
        trunk: Any = self.base_model
        if trunk.engram_ids is None:
            raise ValueError("this model has no tables of n-grams (engram_layer_ids), so it needs no ids of them")
        trunk.engram_ids.copy_(engram_ids(tokenizer, self.config))

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """As transformers', but says so where the adapter was trained on another config of this model."""
        if peft_model_id is not None:
            place = kwargs.get("adapter_kwargs") or {}
            tell_what_differs(self.config, peft_model_id, **{name: place[name] for name in PLACE if name in place})
        return super().load_adapter(peft_model_id, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """As transformers', but weights are read one by one, quantized ones dequantized as they are read.

        An adapter, for which `load_adapter` says the keys, is none of a checkpoint: it lacks all that it leaves as is.
        """
        is_whole = state_dict is None and expected_keys is None
        if is_whole and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            try:
                state_dict = model.official_slices(open_slices(checkpoint_files), load_config)
                state_dict = with_engram_ids(state_dict, model, load_config)
            except CheckpointError as error:
                raise CheckpointError(f"{load_config.pretrained_model_name_or_path}: {error}") from None
            if is_deepspeed_zero3_enabled():  # reads the files itself, on one process for all
                state_dict = None
        if not model.config.fused_experts:
            kept = without_fusing(load_config.weight_mapping or [])
            load_config = dataclasses.replace(load_config, weight_mapping=kept)
        with in_turn():
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )

    def official_slices(self, weights: dict[str, Any], load_config) -> dict[str, Any]:
        """What of a checkpoint's entries, still in their files, is to be loaded into this model."""
        weights = dequantized(with_our_names(unpacked(weights), self.config), self.config)
        reads_elsewhere = is_deepspeed_zero3_enabled() or "disk" in (load_config.device_map or {}).values()
        if reads_elsewhere and any(isinstance(entry, DequantizedSlice) for entry in weights.values()):
            raise CheckpointError(
                "quantized weights cannot be loaded under DeepSpeed ZeRO-3 or with offload to disk; load the model "
                "without, and save it dequantized first"
            )
        if not self._own_weights and any(re.match(VISION, name) for name in weights):
            logger.warning_once(
                f"{type(self).__name__} reads no images: the vision tower of the checkpoint is left out"
            )
        rest, ahead = take_mtp_keys(weights, self.config)
        return {**rest, **self.slices_ahead(ahead, rest, load_config.pretrained_model_name_or_path)}

    def slices_ahead(self, ahead: dict[str, Any], rest: dict[str, Any], source: str) -> dict[str, Any]:
        """What of the prediction layers' entries is to be loaded: nothing, only the language model has such layers."""
        return {}

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """As transformers', but a save that fails or is killed leaves the folder as it was or as it is to be."""
        tell_if_untested()
        self._weight_conversions = reversible(getattr(self, "_weight_conversions", None))
        if kwargs.get("distributed_checkpoint"):  # all processes write to one folder, and need its true name
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        with writing_beside(save_directory) as beside:
            weights = None if state_dict is None else dict(state_dict)  # transformers empties what it is given
            super().save_pretrained(beside, is_main_process, weights, **kwargs)
            self._pack(beside)
        if push_to_hub:  # apart, so that a failed upload doesn't undo the save
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            with tempfile.TemporaryDirectory() as upload:
                super().save_pretrained(upload, is_main_process, state_dict, push_to_hub, **kwargs)

    def _pack(self, folder: str) -> None:
        """Store 4-bit numbers of torchao's two to a byte."""
        if getattr(self, "hf_quantizer", None) is not None:
            write_packed(folder)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """As transformers', but a trunk weight that the checkpoint lacks or misshapes is an error, not a warning."""
        source = load_config.pretrained_model_name_or_path
        shards = unlisted(source)
        reason = f"the index does not list {shards[0]}" if shards else "the checkpoint is incomplete"
        if loading_info.conversion_errors:
            key = min(loading_info.conversion_errors)
            raise CheckpointError(
                f"{source}: the checkpoint's parts of weight {key} do not fit together (first of "
                f"{len(loading_info.conversion_errors)}); {reason}, or some are misshapen: copy or download it again"
            )
        if loading_info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            key, found, wanted = sorted(loading_info.mismatched_keys)[0]
            raise CheckpointError(
                f"{source}: weight {key} has shape {tuple(found)} but the config asks for {tuple(wanted)} (first of "
                f"{len(loading_info.mismatched_keys)}); mend config.json, or pass ignore_mismatched_sizes=True"
            )
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        missing = sorted(key for key in loading_info.missing_keys if key.startswith((prefix, *model._own_weights)))
        if missing and source is not None:
            others = sorted(loading_info.unexpected_keys)
            found = f" (it has {others[0]})" if others else ""
            raise CheckpointError(
                f"{source}: {len(missing)} weights of the model are not in the checkpoint, the first is {missing[0]}"
                f"{found}; {reason}, or config.json describes another model"
            )
        layers = [(LAYER.match(key), key) for key in sorted(loading_info.unexpected_keys)]
        foreign = [key for layer, key in layers if layer and int(layer[1]) < model.config.num_hidden_layers]
        if foreign and source is not None:
            raise CheckpointError(
                f"{source}: the model has no place for {len(foreign)} weights of the checkpoint, the first is "
                f"{foreign[0]}; config.json describes another model"
            )
        refuse_bad_tables(model)
        return loading_info
