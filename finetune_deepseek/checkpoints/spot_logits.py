"""Logits of a checkpoint on disk, with one weight in memory at a time: what exports are compared by.

The model has no storage (meta device). Each module is lent its weights, in float32, while it computes, so that a
model of any size costs the memory of its largest weight. Of its routed experts only those are read that some token
chose, of its tables of n-grams the rows that are looked up. An adapter is applied by PEFT's own layers and never
merged, except on fused experts, where its products are added to those of the weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_deepseek import DeepSeekForImageTextToText, DeepSeekForRecommendation, DeepSeekForSequenceClassification
from modeling_deepseek.engram import EngramHash
from modeling_deepseek.image_model import DeepSeekImageModel
from modeling_deepseek.moe import DeepSeekExperts
from modeling_deepseek.rope import DeepSeekRotaryEmbedding

from ..training.weights.groups import plain_name
from .merging import Adapter, Factors, expert_factors
from .tensors import LazyTensor, Tensors

TOKENS = 8
LARGEST = 1e30  # beyond are numbers that only mark what can't be chosen
LATENTS = ".latents"
TABLE = ".engram.embed"
UNITS = (LoraLayer, TrainableTokensLayer)  # read the weights of what is in them without calling it
ITEM_TABLES = ("model.embed_tokens", "item_head", "item_texts")
Find = Callable[[str], LazyTensor]


@torch.no_grad()
def spot_logits(whole: PreTrainedModel | PeftModel, tensors: Tensors, adapter: Adapter | None = None) -> torch.Tensor:
    """Run a model on a few tokens.

    Args:
        whole: a model without storage, which is of no use afterwards; `adapter.model` if there is an adapter.
        tensors: its weights, under official names.
        adapter: what to apply to it.

    Returns:
        [tokens, V] logits in float32; [rows, labels] of a head on sequences; what another head gives first.
    """
    model: Any = whole.get_base_model() if isinstance(whole, PeftModel) else whole
    model.eval().set_experts_implementation("eager")
    find = partial(_find, tensors=tensors, tied=model.config.tie_word_embeddings, adapter=adapter)
    additions = {} if adapter is None else _expert_additions(adapter)
    unit = "\0"  # a module that holds those that follow
    for name, module in whole.named_modules():
        if isinstance(module, DeepSeekRotaryEmbedding):
            module._buffers.update(DeepSeekRotaryEmbedding(module.config)._buffers)  # computed, not stored
        elif isinstance(module, EngramHash):
            module._buffers.update({name: torch.tensor(values) for name, values in module.numbers.items()})
        elif isinstance(module, DeepSeekExperts):
            module.one_expert = partial(  # type: ignore[method-assign]
                _one_expert, find=find, name=plain_name(name), gate=module._apply_gate, additions=additions
            )
        elif isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), DeepSeekExperts):
            module.forward = module.base_layer.__call__  # type: ignore[attr-defined]  # `additions` do its work
        elif name.endswith(TABLE):
            module.forward = partial(_rows, find=find, name=f"{name}.weight")
        elif not name.startswith(unit):
            unit = f"{name}." if isinstance(module, UNITS) else unit
            # a recommender reads its table of items without calling it
            is_table = isinstance(model, DeepSeekForRecommendation) and plain_name(name).startswith(ITEM_TABLES)
            borrower = model if is_table else module
            if name.endswith(LATENTS):  # pooling reads them in the same way
                borrower = whole.get_submodule(name.rpartition(".")[0])
            _Loan(name, module, find).hook(borrower)
    if isinstance(model, DeepSeekImageModel):
        model.config.nms_threshold = 1.0  # which of two like boxes is suppressed, rounding decides
        waves = torch.arange(4 * model.config.num_channels * 64).float().sin()  # four images of 8 x 8 pixels
        return model(pixel_values=waves.view(4, -1, 8, 8)).logits.float().flatten(0, -2)
    special = {model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id}
    special |= {model.config.image_token_id}
    vocabulary = model.config.vocab_size
    if isinstance(model, DeepSeekForRecommendation) and model.config.num_items is not None:
        vocabulary = model.config.num_items
    ids = [7919 * i % vocabulary for i in range(1, 5 * TOKENS)]
    ids = [i for i in ids if i not in special][:TOKENS] or [0]
    rows = torch.tensor([ids])
    if isinstance(model, DeepSeekForSequenceClassification) and len(ids) == TOKENS:
        rows = rows.view(-1, 2)  # one label of one row may be near zero by chance
    pixels: dict[str, torch.Tensor] = {}
    if isinstance(model, DeepSeekForImageTextToText):
        rows, pixels = with_an_image(rows, model)
    first = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False, **pixels)
    first = first.to_tuple()[0].float()
    return torch.where(first.abs() > LARGEST, 0.0, first).flatten(0, -2)


def with_an_image(rows: torch.Tensor, model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[1, S] tokens -> [1, places + S], with an image of 2 x 1 patches before them, and its pixels."""
    grid, size = (2, 1), 3 * model.vision.fields.patch_size**2
    places = torch.full((1, *model.places_of([grid])), model.config.image_token_id)
    pixels = {"pixel_values": torch.arange(2 * size).float().sin().view(2, size)}
    return torch.cat((places, rows), dim=1), pixels | {"image_grid_thw": torch.tensor([[1, *grid]])}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far [tokens, V] are apart against the size of the second: the median over tokens.

    Rounding may send a token to another expert, which changes a row or two a lot and says nothing of the rest.
    """
    if one.shape != other.shape:
        return float("inf")
    distance, length = (one - other).norm(dim=-1), other.norm(dim=-1)
    return (distance / length.clamp(min=1e-30)).quantile(0.5).item()


def _find(name: str, tensors: Tensors, tied: bool, adapter: Adapter | None) -> LazyTensor:
    """The stored tensor behind the name of a parameter or buffer of a model that PEFT may have wrapped."""
    if ".trainable_tokens_delta" in name:  # a tied head has those of the embeddings
        assert adapter is not None
        own = name.removesuffix(".default")
        return adapter.keys[own] if own in adapter.keys else next(iter(adapter.tokens.values()))[1]
    if "lora_" in name or ".modules_to_save.default." in name:
        assert adapter is not None
        name = name.replace(".modules_to_save.default.", ".").replace(".default", "")
        return adapter.keys[name if name in adapter.keys else name.removesuffix(".weight")]
    name = plain_name(name)
    return tensors["model.embed_tokens.weight" if tied and name == "lm_head.weight" else name]


class _Loan:
    """The weights of a module, which it has while another one (it itself, mostly) computes."""

    def __init__(self, name: str, module: nn.Module, find: Find) -> None:
        self.find, self.module = find, module
        parts = module.named_modules(prefix=name) if isinstance(module, UNITS) else [(name, module)]
        self.places: list[tuple[dict[str, Any], str, str]] = [
            (table, key, f"{owner}.{key}" if owner else key)
            for owner, part in parts
            for table in (part._parameters, part._buffers)
            for key, value in table.items()
            if value is not None and ".original_module" not in owner and "tokens_original" not in owner
        ]
        self.before = [table[key] for table, key, _ in self.places]

    def hook(self, borrower: nn.Module) -> None:
        """Give at the borrower's calls and take back after them."""
        if self.places:
            borrower.register_forward_pre_hook(self.give)
            borrower.register_forward_hook(self.take)

    def give(self, *call: object) -> None:
        """Read the weights."""
        for table, key, name in self.places:
            stored = self.find(name)
            value = stored.read().float() if stored.is_floating_point else stored.read()
            is_parameter = isinstance(table[key], nn.Parameter)
            table[key] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        self._renew()

    def take(self, *call: object) -> None:
        """Let go of them."""
        for (table, key, _), value in zip(self.places, self.before, strict=True):
            table[key] = value
        self._renew()

    def _renew(self) -> None:
        """An LSTM computes with a list of its weights."""
        if isinstance(self.module, nn.RNNBase):
            self.module._flat_weights = [getattr(self.module, name) for name in self.module._flat_weights_names]


def _rows(ids: torch.Tensor, *, find: Find, name: str) -> torch.Tensor:
    """What a table has at these rows, read one by one where its file can be read so."""
    stored = find(name)
    if stored.cut is None:
        return F.embedding(ids, stored.read().float())
    rows, places = ids.unique(return_inverse=True)
    return F.embedding(places, torch.cat([stored[row : row + 1] for row in rows.tolist()]).float())


Additions = dict[str, list[tuple[Factors, float]]]


def _expert_additions(adapter: Adapter) -> Additions:
    """Official name of a weight of a routed expert -> what the adapter adds to its product."""
    additions: Additions = {}
    for attachment in adapter.attachments:
        if attachment.is_fused:
            prefix = attachment.weight.rpartition(".")[0]
            for expert, projection, factors in expert_factors(attachment):
                name = f"{prefix}.{expert}.{projection}.weight"
                additions.setdefault(name, []).append((factors, attachment.scaling))
    return additions


def _one_expert(
    hidden_states: torch.Tensor,
    expert: int,
    *,
    find: Find,
    name: str,
    gate: Callable[[torch.Tensor], torch.Tensor],
    additions: Additions,
) -> torch.Tensor:
    """`DeepSeekExperts.one_expert`, of weights that are read for it."""

    def project(x: torch.Tensor, projection: str) -> torch.Tensor:
        weight = f"{name}.{expert}.{projection}.weight"
        product = F.linear(x, find(weight).read().float())
        for factors, scaling in additions.get(weight, ()):
            b, a = factors()
            product += scaling * F.linear(F.linear(x, a.float()), b.float())
        return product

    both = torch.cat((project(hidden_states, "gate_proj"), project(hidden_states, "up_proj")), dim=-1)
    return project(gate(both), "down_proj")
