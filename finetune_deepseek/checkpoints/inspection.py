"""What a checkpoint is, from its config, its tokenizer and the headers of its weight files.

No weight is loaded; from the Hub only the headers are read (ranged requests) and small files downloaded.
"""

import copy
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import (
    HfHubHTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from configuration_deepseek.fields import FIELD_NAMES, DeepSeekFields
from configuration_deepseek.official import official_model_type
from configuration_deepseek.sharing import FULL, REINDEX, REUSE
from configuration_deepseek.weight_names import SCALE, CheckpointError, with_our_names
from tokenization_deepseek import DeepSeekTokenizer

from ..training.saved import Saved
from ..training.weights.groups import OTHER, group_of, plain_name
from .cache_size import LENGTHS, by_attention, cache_bytes
from .checkpoint import Checkpoint, check_weights, dequantize_at, head_of, in_type, plain_config_of, with_copies
from .tensors import (
    TYPES,
    LazyTensor,
    OpenFiles,
    Tensors,
    has_weights,
    is_fp4,
    known_word,
    open_checkpoint,
    open_weights,
    split_experts,
    unread,
)

GENERATIONS = {
    "llama": "DeepSeek-LLM, Coder, Math or R1-Distill-Llama",
    "qwen2": "R1-Distill-Qwen",
    "qwen3": "R1-0528-Qwen3",
    "deepseek": "DeepSeekMoE-16B",
    "deepseek_v2": "DeepSeek-V2, V2-Lite, V2.5 or Coder-V2",
    "deepseek_v3": "DeepSeek-V3, R1 or V3.1",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
}
EXPERTS, PREDICTION = "experts", "mtp"
PROBE = "Hello, world's 12345 tests.\r\n\tStraße — 深度求索 123 ひらがな 한국어 🚀  end "


@dataclass
class Inspection:
    """What `inspect_checkpoint` found; sizes in bytes, counts of parameters by group."""

    source: str
    generation: str
    model_type: str  # as published, or as it would be
    head: str
    layers: dict[str, str]  # "0-2", "3-41 by 2" -> their mechanisms
    positions: str
    parameters: dict[str, int]
    active: int  # parameters that one token uses
    stored: dict[str, int]  # parameters by type
    memory: dict[str, int]
    cache_per_token: float  # in bfloat16, what each further token adds
    cache_by_attention: dict[str, float]  # the same, of all layers of a kind together
    cache_at: dict[str, int]  # tokens -> all of it, with what doesn't grow
    weights: str  # "match the config", or what is wrong with them
    tokenizer: list[str] = field(default_factory=list)  # "ok: ..." or "warning: ..."

    @property
    def total(self) -> int:
        """All parameters, the prediction layers among them."""
        return sum(self.parameters.values())


def inspect_checkpoint(source: str | os.PathLike | Saved) -> Inspection:
    """Describe a model, named by a folder or a Hub id or opened already.

    Raises:
        ValueError: for a config of another family, or files that are missing or damaged.
    """
    saved = source if isinstance(source, Saved) else Saved.open(None, str(source)).require_model()
    config, source = plain_config_of(saved), saved.name
    tensors = split_experts(with_our_names(headers(saved), config))
    try:
        model_type = official_model_type({name: getattr(config, name) for name in FIELD_NAMES})
        generation = GENERATIONS.get(model_type, model_type)
    except ValueError:
        model_type, generation = "none", "layers that no release combines"
    head = head_of(source, config)
    sizes = {"as stored": sum(tensor.nbytes for tensor in tensors.values())}
    try:
        checkpoint = Checkpoint(Path(source), config, head, dequantize_at(Path(source), tensors, config))
        sizes |= exported_sizes(replace(checkpoint, tensors=check_weights(checkpoint, {})))
        weights = "match the config"
    except CheckpointError as error:
        weights = str(error)
    parameters = count_parameters(tensors, config)
    return Inspection(
        source=str(source),
        generation=generation,
        model_type=config.source_model_type or model_type,
        head=head,
        layers=layer_ranges(config),
        positions=positions(config),
        parameters=parameters,
        active=active_parameters(parameters, config),
        stored=stored_types(tensors),
        memory=sizes,
        cache_per_token=sum(by_attention(config).values()),
        cache_by_attention=by_attention(config),
        cache_at={f"{tokens:,}": cache_bytes(config, tokens) for tokens in LENGTHS},
        weights=weights,
        tokenizer=tokenizer_health(saved, config),
    )


def headers(saved: Saved) -> Tensors:
    """Names, shapes and types of all weights of a folder or a repository; reading them is an error.

    Raises:
        ValueError: if there are none, or the files are damaged.
    """
    if saved.commit is None or has_weights(saved.folder):
        return open_checkpoint(saved.folder)
    source = saved.name
    try:
        metadata = get_safetensors_metadata(source, revision=saved.commit)
    except (NotASafetensorsRepoError, SafetensorsParsingError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from error
    return {
        name: LazyTensor(tuple(tensor.shape), known_word(tensor.dtype, f"{source}: weight {name}"), unread)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


# Counting -----------------------------------------------------------------------------------------------------------


def group_of_weight(name: str, config: DeepSeekFields) -> str:
    """The LoRA group of a weight by its official name, or `PREDICTION`."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= config.num_hidden_layers:
        return PREDICTION
    return EXPERTS if re.search(r"\.experts\.\d+\.", name) else group_of(name)


def count_parameters(tensors: Tensors, config: DeepSeekFields) -> dict[str, int]:
    """Parameters by group, largest first."""
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if is_fp4(name, tensor) or (tensor.is_floating_point and not name.endswith(SCALE)):  # no scales, no tables
            counts[group_of_weight(name, config)] += tensor.numel * (2 if is_fp4(name, tensor) else 1)
    return dict(counts.most_common())


def active_parameters(parameters: dict[str, int], config: DeepSeekFields) -> int:
    """What one token uses: K of E routed experts, its rows of tables, everything else but the prediction layers."""
    used = {group: count for group, count in parameters.items() if group != PREDICTION}
    if config.n_routed_experts and EXPERTS in used:
        used[EXPERTS] = used[EXPERTS] * config.num_experts_per_tok // config.n_routed_experts
    for rows in map(config.engram_rows, range(config.num_hidden_layers)):
        if rows:
            used["engram"] -= (rows - config.engram_columns) * int(config.engram_head_dim or 0)
    return sum(used.values())


def stored_types(tensors: Tensors) -> dict[str, int]:
    """Parameters by type."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[TYPES[tensor.word].torch] += tensor.numel
    return dict(counts.most_common())


def exported_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the weights as --dtype of a native export writes them."""
    sizes = {}
    for name, dtype in (("float32", "fp32"), ("bfloat16", "bf16"), ("fp8", "fp8")):
        made = in_type(replace(checkpoint, config=copy.deepcopy(checkpoint.config)), dtype)
        sizes[name] = sum(tensor.nbytes for tensor in with_copies(made.tensors, made.config).values())
    return sizes


def layer_ranges(config: DeepSeekFields) -> dict[str, str]:
    """Layers with the same mechanisms -> their description, in the order of their first ones."""
    alike: dict[str, list[int]] = {}
    ratios = config.compress_ratios or [0] * config.num_hidden_layers
    for layer, spec in enumerate(config.specs):
        words = [_attention(spec.attention, ratios[layer], config), _feed_forward(spec.feed_forward, config)]
        alike.setdefault(", ".join(words) + _residual(config) + _engram(layer, config), []).append(layer)
    return {spans(layers): words for words, layers in alike.items()}


def spans(numbers: list[int]) -> str:
    """Ascending numbers in words: [0, 1, 2, 4, 6, 8] is "0-2, 4-8 by 2"."""
    parts, start = [], 0
    while start < len(numbers):
        step = numbers[start + 1] - numbers[start] if start + 1 < len(numbers) else 1
        end = start
        while end + 1 < len(numbers) and numbers[end + 1] - numbers[end] == step:
            end += 1
        if end == start + 1 and step > 1:  # two are no row
            end = start
        by = f" by {step}" if step > 1 and end > start else ""
        parts.append(f"{numbers[start]}-{numbers[end]}{by}" if end > start else str(numbers[start]))
        start = end + 1
    return ", ".join(parts)


CHOOSING = ("csa", FULL, REINDEX)


def _attention(word: str, ratio: int, config: DeepSeekFields) -> str:
    heads = f"{config.num_attention_heads} heads"
    if word == "mha":
        return f"mha ({heads}, {config.num_key_value_heads} of keys and values, width {config.head_dim})"
    query = f"query latent {config.q_lora_rank}" if config.q_lora_rank else "no query latent"
    chosen = f", {config.index_n_heads} index heads choose {config.index_topk}"
    if config.compress_ratios is None:
        of_tokens = f"{chosen} tokens" if word == "dsa" else ""
        return f"{word} ({heads}, latent {config.kv_lora_rank} + rotary {config.qk_rope_head_dim}, {query}{of_tokens})"
    read = " of another layer" if word in (REINDEX, REUSE) else ""
    entries = f", entries of {ratio} token{'s' if ratio > 1 else ''}{read}" if ratio else ""
    window = f"one key of width {config.head_dim}, window {config.sliding_window}"
    return f"{word} ({heads}, {window}, {query}{entries}{chosen if word in CHOOSING else ''})"


def _feed_forward(word: str, config: DeepSeekFields) -> str:
    if word == "dense":
        return f"dense (width {config.intermediate_size})"
    groups = f", {config.topk_group} of {config.n_group} groups" if config.topk_method != "greedy" else ""
    method = "by the token's id" if word == "hash_moe" else config.topk_method
    return (
        f"{word} ({config.num_experts_per_tok} of {config.n_routed_experts} experts{groups}, "
        f"{config.n_shared_experts or 0} shared, width {config.moe_intermediate_size}, {config.scoring_func} {method})"
    )


def _residual(config: DeepSeekFields) -> str:
    shifted = ", read by weights of the sub-layer before" if config.kv_source_layer_ids is not None else ""
    return f", {config.hc_mult} residual streams{shifted}" if config.hc_mult is not None else ""


def _engram(layer: int, config: DeepSeekFields) -> str:
    rows = config.engram_rows(layer)
    return f", n-grams up to {config.engram_max_ngram_size} tokens in {rows:,} rows" if rows else ""


def positions(config: DeepSeekFields) -> str:
    """Length and rotary scaling in words."""
    rope = config.rope_parameters
    scaling = "" if rope["rope_type"] == "default" else f", {rope['rope_type']} by {rope['factor']:g}"
    entries = f"; where there are entries {config.compress_rope_theta:g}" if config.compress_ratios is not None else ""
    return f"{config.max_position_embeddings:,} (rotary theta {rope['rope_theta']:g}{entries}{scaling})"


# Tokenizer ----------------------------------------------------------------------------------------------------------


def tokenizer_health(saved: Saved, config: DeepSeekFields) -> list[str]:
    """What can go wrong with a tokenizer, tried: BOS, padding, round trip, ids, chat template."""
    if config.image_stem is not None:
        return ["ok: none; the model takes images"]
    try:
        tokenizer = DeepSeekTokenizer.from_pretrained(saved.name, **saved.at)
    except (ValueError, OSError) as error:
        return [f"warning: no tokenizer that this package opens ({str(error).splitlines()[0]})"]
    ids = tokenizer(PROBE).input_ids
    largest = max(tokenizer.get_vocab().values())
    bos_count = ids.count(tokenizer.bos_token_id)
    is_pad_alone = tokenizer.pad_token_id != tokenizer.eos_token_id
    checks = [
        (largest < config.vocab_size, f"{len(tokenizer):,} tokens for {config.vocab_size:,} rows of embeddings"),
        (bos_count <= 1, f"BOS {tokenizer.bos_token} is {'put before' if bos_count else 'not put before'} a text"),
        (is_pad_alone, f"padding is {tokenizer.pad_token}" + ("" if is_pad_alone else ", which also ends a text")),
        (tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False)) == PROBE, "round trip of a text"),
    ]
    for word in ("bos", "eos"):
        of_config, of_tokenizer = getattr(config, f"{word}_token_id"), getattr(tokenizer, f"{word}_token_id")
        known = of_config if isinstance(of_config, list) else [of_config]
        checks.append((of_tokenizer in known, f"{word} id {of_tokenizer}, {of_config} in config.json"))
    checks.append(_template_check(tokenizer))
    return [f"{'ok' if good else 'warning'}: {text}" for good, text in checks]


def _template_check(tokenizer: DeepSeekTokenizer) -> tuple[bool, str]:
    if not tokenizer.chat_template:
        return True, "no chat template"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    except Exception as error:  # a template is a program, and fails as it likes
        return False, f"the chat template fails: {error}"
    count = str(text).count(tokenizer.bos_token)
    return count == 1, f"chat template with {count} BOS"


# Adapters -----------------------------------------------------------------------------------------------------------


def describe_adapter(saved: Saved) -> str:
    """A PEFT adapter in words: its base, its kind and how many parameters each group of weights got."""
    settings, folder = saved.adapter or {}, saved.folder
    counts: Counter[str] = Counter()
    for name, tensor in open_weights(folder / "adapter_model.safetensors", OpenFiles()).items():
        module = re.sub(r"\.(lora_\w+|weight|bias).*$", "", plain_name(name))
        group = EXPERTS if ".experts" in module else group_of(module)
        is_router = group == OTHER and module.endswith(".mlp.gate")
        counts["router" if is_router else group] += tensor.numel
    lines = [
        f"{saved.name}: {settings.get('peft_type')} adapter, rank {settings.get('r')}, "
        f"alpha {settings.get('lora_alpha')}",
        f"  base model    {settings.get('base_model_name_or_path')}",
        f"  task          {settings.get('task_type')}",
    ]
    return "\n".join([*lines, *(f"  {group:<14}{count:>16,} parameters" for group, count in counts.most_common())])
