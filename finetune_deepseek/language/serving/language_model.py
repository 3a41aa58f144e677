"""A model that writes text, opened for use: from a folder or the Hub, whole or as an adapter, of any generation."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from configuration_deepseek.official import from_official
from modeling_deepseek.transformers_names import CACHE_WORD

from ...training.arguments import ModelArguments
from ...training.loading import fitted, pretrained_model, saved_tokenizer, with_padding
from ...training.saved import WRITING, Saved
from .arguments import TalkArguments

TALKING = (None, "conversation")  # tasks of training after which a tokenizer's chat format is what the model knows
VERBS: dict[str | None, str] = {  # what a model of another kind is for
    "SequenceClassification": "predict classification",
    "QuestionAnswering": "answer",
    "Embedding": "answer --retriever",
    "Recommendation": "recommend",
}


def opened(name: str, revision: str, trust_remote_code: bool = False) -> Saved:
    """What `name` names, if it writes text. A class of its own code (trust_remote_code) is taken at its word.

    Raises:
        ValueError: naming its class, if it doesn't.
    """
    saved = Saved.open(None, name, revision).require_model()
    is_known = saved.architecture in ("", *_flat(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())) or trust_remote_code
    if saved.head not in WRITING and (saved.head or not is_known):
        verb = f" (deepseek-hf {VERBS[saved.head]} uses this one)" if saved.head in VERBS else ""
        raise ValueError(
            f"{name}: it is a {saved.architecture or saved.head}, which writes no text; name a language model{verb}."
        )
    return saved


def require_predictions(saved: Saved) -> None:
    """Refuse a model that has nothing to guess tokens by, before its weights are read.

    Raises:
        ValueError: naming it.
    """
    fields = from_official(dict(saved.config)) if saved.is_ours else saved.config
    if not fields.get("num_nextn_predict_layers"):
        raise ValueError(
            f"--use_mtp: {saved.name} has neither prediction layers nor draft stages (num_nextn_predict_layers) to "
            "guess tokens by; leave it out."
        )


def _flat(names: Any) -> list[str]:
    return [name for group in names for name in ([group] if isinstance(group, str) else group)]


def open_tokenizer(saved: Saved, arguments: TalkArguments) -> Any:
    """The tokenizer beside the model; one without an end of text serves too.

    Raises:
        ValueError: if it can't be read.
    """
    tokenizer = saved_tokenizer(saved, None, arguments.trust_remote_code)
    return tokenizer if tokenizer.eos_token_id is None else with_padding(tokenizer)


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one the accelerator, or the CPU where there is none.

    Raises:
        ValueError: if there is none of that name.
    """
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


class Opening(Protocol):
    """Flags that say how a model is opened: `TalkArguments`, and those of other rooms' verbs."""

    device: str | None

    def model(self, name: str, dtype: str) -> ModelArguments: ...


@dataclass
class LanguageModel:
    """A language model and its tokenizer, ready for use."""

    name: str
    model: Any
    tokenizer: Any

    @classmethod
    def open(cls, saved: Saved, tokenizer: Any, arguments: Opening) -> "LanguageModel":
        """The model, on its device; an adapter is merged into its base.

        Raises:
            ValueError: if it can't be read, or has fewer tokens than the tokenizer.
        """
        device = device_of(arguments.device)
        named = arguments.model(saved.name, "float32" if device.type == "cpu" else "auto")
        named.saved = saved
        model = fitted(pretrained_model(named, AutoModelForCausalLM), tokenizer)
        if saved.is_adapter and hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        return cls(saved.name, model.eval().to(device), tokenizer)

    @property
    def defaults(self) -> GenerationConfig:
        """What the model's generation_config.json has."""
        return self.model.generation_config

    @property
    def ends(self) -> list[int]:
        """The ids that end a text: those of the model, and the tokenizer's."""
        own = self.defaults.eos_token_id
        listed = own if isinstance(own, list) else [own]
        return [end for end in dict.fromkeys([*listed, self.tokenizer.eos_token_id]) if end is not None]

    @property
    def pad(self) -> int:
        """What fills shorter rows, where no attention goes: any token does."""
        return self.tokenizer.pad_token_id or 0

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
        """[B, S] prompts, padded on the left -> [B, S + N], as transformers' `generate`."""
        device = self.model.device
        options |= {"tokenizer": self.tokenizer}  # by which a model's own stop texts are found
        return self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options)

    def generate_on(self, ids: list[int], cache: Any, **options: Any) -> tuple[list[int], Any]:
        """One prompt gone on with, whose beginning a cache (or None) has -> prompt and answer, and the cache."""
        row = torch.tensor([ids])
        kept = {} if cache is None else {CACHE_WORD: cache}
        found: Any = self.generate(row, torch.ones_like(row), **kept, **options)
        return found.sequences[0].tolist(), found.get(CACHE_WORD)

    def broken(self, where: str) -> ValueError:
        """The error for scores that are no numbers."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        advice = "" if dtype == "float32" else f", or too large for {dtype} (try --dtype float32)"
        return ValueError(f"{where}: the model gives scores that are no numbers; its weights are damaged{advice}.")
