"""LoRA adapters beside checkpoints on disk: merged into the weights, or rewritten expert by expert.

PEFT says what an adapter is attached to and how it is scaled, on a model without storage (meta device). The weights
are then read one at a time, from the base and from the adapter, so that neither has to fit into memory. Letters: E
experts, r rank, D hidden width, I expert width.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers import PreTrainedModel

from configuration_deepseek import DeepSeekConfig

from ..training.saved import ADAPTER_FILE, Saved
from ..training.weights.groups import GROUPS, plain_name
from .shards import spots, write_json
from .tensors import LazyTensor, OpenFiles, Tensors, open_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
COPIES = re.compile(r"\.(modules_to_save|original_module)\.\w+$")  # which PEFT saves beside resized embeddings
WHOLE = {"embeddings": f"{PREFIX}model.embed_tokens.weight", "head": f"{PREFIX}lm_head.weight"}
# These initialisations change the base weights, and an adapter doesn't say how.
Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Factors: TypeAlias = Callable[[], tuple[torch.Tensor, torch.Tensor]]
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Attachment:
    """What an adapter does to one weight: `weight` is its name in the fused model, `parts` the adapter's tensors."""

    weight: str
    scaling: float
    parts: dict[str, LazyTensor]  # lora_A, lora_B, lora_B.bias, lora_magnitude_vector, lora_embedding_A, ...
    experts: int
    is_dora: bool

    @property
    def is_fused(self) -> bool:
        return self.weight.endswith(GROUPS["experts"].parameters)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read against the model that it is for."""

    folder: Path
    settings: dict[str, Any]  # adapter_config.json
    config: LoraConfig
    attachments: list[Attachment]
    replaced: Tensors  # whole weights that were trained beside it (modules_to_save)
    tokens: dict[str, tuple[list[int], LazyTensor]]  # rows of embeddings that were (trainable_token_indices)
    keys: Tensors  # everything in the file
    model: PeftModel  # the base with the adapter attached, without storage


def open_adapter(saved: Saved, skeleton: PreTrainedModel) -> Adapter:
    """Read an adapter's headers and find the weights that each tensor belongs to.

    Args:
        skeleton: the base model on the meta device; it gets wrapped.

    Raises:
        ValueError: for an adapter that isn't LoRA, of a kind that can't be merged exactly, or for another base; the
            key is named.
    """
    folder = saved.folder
    if saved.adapter is None:
        raise ValueError(f"{saved.name} is no adapter: it has no {ADAPTER_FILE}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{saved.name} has no {ADAPTER_WEIGHTS}")
    config = PeftConfig.from_pretrained(str(folder))
    _refuse_unmergeable(folder, config, skeleton)
    keys = open_weights(folder / ADAPTER_WEIGHTS, OpenFiles())
    skeleton.name_or_path = config.base_model_name_or_path or ""  # else PEFT tells of another one
    try:
        wrapped = get_peft_model(skeleton, config)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter is for another base; {error}") from error
    read = _Reader(folder, keys)
    attachments, replaced, tokens = [], {}, {}
    for name, module in wrapped.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for key, parameter in module.modules_to_save["default"].named_parameters():
                replaced[f"{plain_name(name)}.{key}"] = read(f"{name}.{key}", parameter)
        elif isinstance(module, TrainableTokensLayer):
            if not module.tied_adapter:  # else a tied head has the rows of the embeddings
                key = f"{name}.trainable_tokens_delta"
                rows = read(key, module.trainable_tokens_delta["default"])
                tokens[f"{plain_name(name)}.weight"] = module.token_indices["default"], rows
        elif isinstance(module, LoraLayer):
            attachments.append(_attachment(folder, name, module, read))
    for key in WHOLE.values():  # PEFT saves resized embeddings also where only LoRA was trained
        name = plain_name(key)
        if key in keys and key not in read.used and name in (weights := dict(skeleton.named_parameters())):
            replaced[name] = read(key, weights[name])
    unused = sorted(key for key in keys.keys() - read.used if not COPIES.search(key))
    if unused:
        raise ValueError(f"{folder}: the adapter is for another base, which has no place for its {unused[0]}")
    return Adapter(folder, saved.adapter, config, attachments, replaced, tokens, keys, wrapped)


class _Reader:
    """Looks tensors of the adapter up, and remembers which."""

    def __init__(self, folder: Path, keys: Tensors) -> None:
        self.folder, self.keys = folder, keys
        self.used: set[str] = set()

    def __call__(self, name: str, parameter: torch.Tensor) -> LazyTensor:
        if name not in self.keys:
            name = name.removesuffix(".weight")  # PEFT stores DoRA's magnitudes without that word
        if name not in self.keys:
            raise ValueError(
                f"{self.folder}: the adapter lacks {name}, which its {ADAPTER_FILE} implies for this base"
            )
        if self.keys[name].shape != tuple(parameter.shape):
            raise ValueError(
                f"{self.folder}: the adapter is for another base: {name} has shape {self.keys[name].shape}, this base "
                f"asks for {tuple(parameter.shape)}"
            )
        self.used.add(name)
        return self.keys[name]


def _attachment(folder: Path, name: str, module: Any, read: _Reader) -> Attachment:
    variant = module.lora_variant.get("default")
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        raise ValueError(
            f"{folder}: an adapter with {type(variant).__name__} on {plain_name(name)} can't be merged here"
        )
    parts = {}
    for key, parameter in module.named_parameters():
        if key.startswith("lora_"):
            key = key.replace(".default", "")
            parts[key.removesuffix(".weight")] = read(f"{name}.{key}", parameter)
    is_bare = isinstance(module, ParamWrapper)
    return Attachment(
        weight=f"{plain_name(name)}.{module.parameter_name if is_bare else 'weight'}",
        scaling=module.scaling["default"],
        parts=parts,
        experts=module.num_experts if is_bare else 1,
        is_dora=variant is not None,
    )


def _refuse_unmergeable(folder: Path, config: PeftConfig, skeleton: PreTrainedModel) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: the adapter is of type {config.peft_type}; only LoRA is merged")
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"{folder}: the adapter began as {start}, which changes the base model; save it again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    tied = skeleton.config.tie_word_embeddings
    targets = str(config.target_modules) + str(config.modules_to_save)
    if tied and ("embed_tokens" in targets or "lm_head" in targets):
        raise ValueError(f"{folder}: adapts embeddings or head, which this model ties, so merging would change both")


# Merging ------------------------------------------------------------------------------------------------------------


def merge(tensors: Tensors, adapter: Adapter) -> Tensors:
    """The base's weights (official names) with the adapter added: W + scaling B A, in float32.

    Raises:
        ValueError: if a weight to which the adapter belongs is not there.
    """
    merged = dict(tensors)
    for name, tensor in adapter.replaced.items():
        merged[name] = tensor.to(tensors[name].word)
    for name, (indices, rows) in adapter.tokens.items():
        merged[name] = merged[name].map(partial(_with_rows, indices=indices, rows=rows))
    for attachment in adapter.attachments:
        for name, add in _additions(attachment):
            if name not in merged:
                raise ValueError(f"{adapter.folder}: the adapter changes {name}, which this base doesn't have")
            merged[name] = merged[name].map(partial(_added, add=add))
    return merged


def _with_rows(weight: torch.Tensor, indices: list[int], rows: LazyTensor) -> torch.Tensor:
    """Rows of embeddings [V, D] replaced by those that were trained."""
    return weight.index_copy(0, torch.tensor(indices), rows.read().to(weight.dtype))


def resized_vocabulary(saved: Saved, config: DeepSeekConfig, has_head: bool) -> int:
    """The vocabulary that an adapter's whole embeddings (modules_to_save) are for; the config's if it has none.

    Raises:
        ValueError: if embeddings were resized, and the head beside them isn't in the adapter.
    """
    keys = open_weights(saved.folder / ADAPTER_WEIGHTS, OpenFiles()) if saved.is_adapter else {}
    sizes = {name: keys[key].shape[0] for name, key in WHOLE.items() if key in keys}
    size = sizes.get("embeddings", config.vocab_size)
    if size != config.vocab_size and has_head and not config.tie_word_embeddings and sizes.get("head") != size:
        raise ValueError(
            f"{saved.name}: its embeddings have {size:,} tokens, the base {config.vocab_size:,}, and the adapter "
            "brings no head of that size; train it with lm_head in modules_to_save too"
        )
    return size


def _added(weight: torch.Tensor, add: Change) -> torch.Tensor:
    return add(weight.float()).to(weight.dtype)


def _additions(attachment: Attachment) -> list[tuple[str, Change]]:
    """The stored weights that an attachment changes, and how, in float32."""
    weight, scaling, parts = attachment.weight, attachment.scaling, attachment.parts
    prefix = weight.rpartition(".")[0]
    if attachment.is_fused:
        return [
            (f"{prefix}.{expert}.{projection}.weight", partial(_plus_product, factors=factors, scaling=scaling))
            for expert, projection, factors in expert_factors(attachment)
        ]
    if "lora_embedding_A" in parts:
        return [(weight, partial(_plus_embedding, parts=parts, scaling=scaling))]

    def factors() -> tuple[torch.Tensor, torch.Tensor]:
        return parts["lora_B"].read(), parts["lora_A"].read()

    change: Change = partial(_plus_product, factors=factors, scaling=scaling)
    if attachment.is_dora:
        change = partial(_plus_dora, factors=factors, scaling=scaling, magnitude=parts["lora_magnitude_vector"])
    additions = [(weight, change)]
    if "lora_B.bias" in parts:
        additions.append((f"{prefix}.bias", lambda bias: bias + scaling * parts["lora_B.bias"].read().float()))
    return additions


def expert_factors(attachment: Attachment) -> Iterator[tuple[int, str, Factors]]:
    """B [rows, r] and A [r, columns] of each projection of each expert of one fused parameter.

    PEFT stores A as [E r, columns], expert by expert, and B as [rows, r E], with the experts side by side.

    Yields:
        expert, projection ("gate_proj", "up_proj" or "down_proj"), a function that reads (B, A).
    """
    a, b, experts = attachment.parts["lora_A"], attachment.parts["lora_B"], attachment.experts
    projections = ("gate_proj", "up_proj") if attachment.weight.endswith("gate_up_proj") else ("down_proj",)
    rows, rank = b.shape[0] // len(projections), a.shape[0] // experts
    for expert in range(experts):
        for place, projection in enumerate(projections):

            def factors(expert: int = expert, place: int = place) -> tuple[torch.Tensor, torch.Tensor]:
                of_projection = b[place * rows : (place + 1) * rows]
                return of_projection[:, expert::experts], a[expert * rank : (expert + 1) * rank]

            yield expert, projection, factors


def _plus_product(weight: torch.Tensor, factors: Factors, scaling: float) -> torch.Tensor:
    b, a = factors()
    return torch.addmm(weight, b.float(), a.float(), alpha=scaling)


def _plus_dora(weight: torch.Tensor, factors: Factors, scaling: float, magnitude: LazyTensor) -> torch.Tensor:
    """DoRA (arXiv 2402.09353, eq. 5): magnitude times the direction of W + scaling B A, row by row."""
    direction = _plus_product(weight, factors, scaling)
    return magnitude.read().float().unsqueeze(1) * direction / direction.norm(dim=1, keepdim=True)


def _plus_embedding(weight: torch.Tensor, parts: dict[str, LazyTensor], scaling: float) -> torch.Tensor:
    a, b = parts["lora_embedding_A"].read().float(), parts["lora_embedding_B"].read().float()  # [r, V], [D, r]
    return torch.addmm(weight, a.T, b.T, alpha=scaling)


# Per-expert adapters ------------------------------------------------------------------------------------------------


def write_per_expert(adapter: Adapter, folder: Path) -> None:
    """Rewrite an adapter on fused experts as two-dimensional ones on official names, in PEFT's format.

    vLLM and SGLang read these; they drop adapters on fused experts without a word. The gate's and the up projection's
    share A and split B's rows, so every product is as before. The router's part stays as it is.

    Raises:
        ValueError: if there are no fused experts in the adapter.
        OSError: if what is on the disk afterwards is not what was written.
    """
    fused = [attachment for attachment in adapter.attachments if attachment.is_fused]
    if not fused:
        raise ValueError(f"{adapter.folder}: the adapter has no fused experts, so it needs no rewriting")
    replaced = {id(part) for attachment in fused for part in attachment.parts.values()}
    written = {name: tensor.read() for name, tensor in adapter.keys.items() if id(tensor) not in replaced}
    for attachment in fused:
        prefix = PREFIX + attachment.weight.rpartition(".")[0]
        for expert, projection, factors in expert_factors(attachment):
            b, a = factors()
            written[f"{prefix}.{expert}.{projection}.lora_A.weight"] = a.clone()
            written[f"{prefix}.{expert}.{projection}.lora_B.weight"] = b.contiguous()
    save_file(written, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    write_json(folder / ADAPTER_FILE, _per_expert_config(adapter))
    for name, tensor in open_weights(folder / ADAPTER_WEIGHTS, OpenFiles()).items():
        if tensor.shape != written[name].shape or spots(tensor.read()) != spots(written.pop(name)):
            raise OSError(f"{ADAPTER_WEIGHTS}: {name} reads back otherwise than it was written; is the disk sound?")
    if written:
        raise OSError(f"{ADAPTER_WEIGHTS}: {min(written)} was not written")


def _per_expert_config(adapter: Adapter) -> dict[str, Any]:
    config = dict(adapter.settings)
    modules = config["target_modules"] or []
    if isinstance(modules, list):
        modules = "|".join(rf"(?:.*\.)?{re.escape(word)}" for word in modules)
    patterns = [modules] if modules else []
    for parameter, projections in (("gate_up_proj", "(?:gate|up)_proj"), ("down_proj", "down_proj")):
        weights = [attachment.weight for attachment in adapter.attachments if attachment.is_fused]
        layers = [weight.split(".")[-4] for weight in weights if weight.endswith(f"experts.{parameter}")]
        if layers:
            patterns.append(rf".*\.({'|'.join(layers)})\.mlp\.experts\.\d+\.{projections}")
    config["target_modules"] = "|".join(f"(?:{pattern})" for pattern in patterns)
    fused = GROUPS["experts"].parameters
    rest = [name for name in config.get("target_parameters") or [] if not name.endswith(fused)]
    config["target_parameters"] = rest or None
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = {_per_expert_pattern(key): value for key, value in (config.get(field) or {}).items()}
    return config


def _per_expert_pattern(key: str) -> str:
    if key.endswith("experts.gate_up_proj"):
        return key.removesuffix("gate_up_proj").replace(".", r"\.") + r"\d+\.(?:gate|up)_proj"
    if key.endswith("experts.down_proj"):
        return key.removesuffix("down_proj").replace(".", r"\.") + r"\d+\.down_proj"
    return key
