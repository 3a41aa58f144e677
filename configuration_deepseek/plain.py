"""config.json as fields alone, for whoever asks what a model is and doesn't build it: no torch, which takes seconds.

Read is what needs no second thought. Whatever transformers would change, warn of or refuse (names that it knows, other
rotary scalings, token ids outside the vocabulary) is `Unread`, and left to `DeepSeekConfig`.
"""

from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .fields import FIELD_NAMES, DeepSeekFields
from .validation import validate

if TYPE_CHECKING:
    from .configuration_deepseek import DeepSeekConfig

# What may stand in config.json beside the fields, and says nothing of weights or mechanisms.
BESIDE = {"architectures", "auto_map", "model_type", "transformers_version", "dtype", "torch_dtype", "label2id"}
ROTARY = {"rope_scaling", "rope_theta"}
DEFAULT_THETA = 10_000.0  # transformers'
YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}


class Unread(Exception):
    """A config that `DeepSeekConfig` has to read."""


@strict
@dataclass(kw_only=True, repr=False)
class PlainConfig(DeepSeekFields):
    """`DeepSeekFields`, and what transformers' configs have that says something of the weights."""

    architectures: list[str] | None = None
    id2label: dict[str, str] | None = None

    @property
    def num_labels(self) -> int:
        """As transformers counts them."""
        return 2 if self.id2label is None else len(self.id2label)

    def whole(self) -> "DeepSeekConfig":
        """The config of which a model can be built."""
        from .configuration_deepseek import DeepSeekConfig

        return DeepSeekConfig(**{field.name: getattr(self, field.name) for field in dataclass_fields(self)})


def plain_config(config_dict: dict[str, Any]) -> PlainConfig:
    """The fields of a config.json in our form, as `from_official` gives it.

    Raises:
        Unread: if `DeepSeekConfig` has to be asked.
    """
    names = {*FIELD_NAMES, "architectures", "id2label"}
    if foreign := config_dict.keys() - names - BESIDE - ROTARY:
        raise Unread(min(foreign))
    fields = {name: value for name, value in config_dict.items() if name in names}
    try:
        config = PlainConfig(**fields)
        config.derive()
        config.rope_parameters = _rotary(config_dict, config.max_position_embeddings)
        validate(config)
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise Unread(str(error)) from error
    tokens = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    if any(isinstance(token, int) and not 0 <= token < config.vocab_size for token in tokens):
        raise Unread("token ids")
    return config


def _rotary(config_dict: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """The rotary dictionary in its present spelling."""
    rope = dict(config_dict.get("rope_scaling") or config_dict.get("rope_parameters") or {})
    word = rope.setdefault("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    rope.setdefault("rope_theta", config_dict.get("rope_theta", DEFAULT_THETA))
    if word == "yarn":
        known = max_positions / rope.setdefault("original_max_position_embeddings", max_positions)
        factor = rope["factor"]
        are_numbers = all(isinstance(value, (int, float)) for name, value in rope.items() if name != "rope_type")
        in_order = (rope.get("beta_fast") or 32) >= (rope.get("beta_slow") or 1)
        if not (are_numbers and in_order and factor >= 1 and known in (1, factor)):
            raise Unread("yarn")
    if word not in ("default", "yarn") or rope.keys() - {"rope_type", "rope_theta", *(YARN if word == "yarn" else ())}:
        raise Unread("rope_parameters")
    return rope
