"""What a DeepSeek model is: `DeepSeekConfig`, with the field names of the published config.json files.

A generation is a choice of values here, never a branch in the model: each layer is described by a `LayerSpec`
(which attention, which feed-forward), derived from the fields or given in `layer_specs`. The file travels to the Hub
with every saved model.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.configuration_utils import PreTrainedConfig

from .fields import DeepSeekFields
from .heads import (
    FILES_BY_CLASS,
    HEADS_BY_AUTO_CLASS,
    HEADS_BY_OWN_AUTO_CLASS,
    IMAGE_HEADS_BY_AUTO_CLASS,
    VISION_HEADS_BY_AUTO_CLASS,
)
from .official import from_official
from .validation import require, validate


@strict
class DeepSeekConfig(DeepSeekFields, PreTrainedConfig):
    """Configuration of every DeepSeek generation; its fields are those of `DeepSeekFields` and of transformers.

    Raises:
        ValueError: for fields that cannot work together; the line names both values and what to change.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "mtp_loss", "draft_states"]
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan: ClassVar[dict[str, Any]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __post_init__(self, **kwargs):
        self.refuse_misspelled(kwargs)
        kwargs.pop("auto_map", None)  # derived, see the property
        self.derive()  # before transformers asks for layer_types
        labels = self.id2label
        require(labels is None or isinstance(labels, dict), f"id2label={labels!r:.60} must map numbers to labels")
        super().__post_init__(**kwargs)
        self.rope_parameters.pop("type", None)  # the spelling before transformers 4.45; rope_type says the same
        self.validate_architecture()  # transformers calls it too, but wraps what it raises in an error of its own

    @property
    def auto_map(self) -> dict[str, str]:
        """Where a process without this package finds the classes in the files beside config.json.

        A saved class brings the files that it needs: a text head those of all text heads, others none of these.
        """
        saved = next((name for name in self.architectures or [] if name in FILES_BY_CLASS), None)
        trunk = saved if saved in HEADS_BY_OWN_AUTO_CLASS.values() else "DeepSeekModel"
        of_images = {auto: name for auto, name in IMAGE_HEADS_BY_AUTO_CLASS.items() if name == saved}
        seeing = VISION_HEADS_BY_AUTO_CLASS if saved in VISION_HEADS_BY_AUTO_CLASS.values() else {}
        heads = {} if saved == trunk else of_images or HEADS_BY_AUTO_CLASS | seeing
        classes = {"AutoModel": trunk, **heads}
        return {
            "AutoConfig": "configuration_deepseek.DeepSeekConfig",
            **{auto_class: f"{FILES_BY_CLASS[name]}.{name}" for auto_class, name in classes.items()},
        }

    @auto_map.setter
    def auto_map(self, value: dict[str, str]) -> None:
        # transformers assigns a partial map on every save; the derived one is complete, so the assignment is moot.
        pass

    # Reading and writing ---------------------------------------------------------------------------------------------

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json, ours or any published one, as keyword arguments of this class."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        try:
            return from_official(config_dict), kwargs
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build a config from a dictionary in our form or in any published one."""
        return super().from_dict(from_official(config_dict), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary, with the derived `auto_map`."""
        return {**super().to_dict(), "auto_map": self.auto_map}

    # Validation ------------------------------------------------------------------------------------------------------

    def validate_layer_type(self) -> None:
        """Part of transformers' strict validation: our cache words are not in its closed list, so it is replaced."""

    def validate_architecture(self) -> None:
        """Part of transformers' strict validation: refuse what cannot work, naming the values that clash."""
        validate(self)


class FieldTypeError(StrictDataclassFieldValidationError, ValueError):
    """A value of another type than the field has, in one line."""

    def __init__(self, name: str, value: Any, wanted: Any, cause: Exception):
        super().__init__(name, cause)
        wanted = getattr(wanted, "__name__", None) if isinstance(wanted, type) else str(wanted)
        self.args = (f"DeepSeekConfig: {name}={value!r:.60} is a {type(value).__name__} that does not fit {wanted}",)


_set_checked = DeepSeekConfig.__setattr__


def _set_in_one_line(config: DeepSeekConfig, name: str, value: Any) -> None:
    try:
        _set_checked(config, name, value)
    except StrictDataclassFieldValidationError as error:
        wanted = DeepSeekConfig.__dataclass_fields__[name].type
        raise FieldTypeError(name, value, wanted, error) from None


DeepSeekConfig.__setattr__ = _set_in_one_line  # type: ignore[method-assign,assignment]  # as `strict` does
