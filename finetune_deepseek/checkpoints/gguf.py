"""A checkpoint as one GGUF file, for llama.cpp and Ollama. Needs the package gguf: pip install "deepseek-hf[gguf]".

    generation          architecture   what is stored otherwise than in the checkpoint
    LLM, Coder, Math    llama          rows of q_proj and k_proj reordered: llama.cpp rotates pairs (0, 1), (2, 3), ...
    MoE-16B             deepseek       the same; experts stacked
    V2, V3, R1, V3.1    deepseek2      kv_b_proj split per head into k_b (transposed) and v_b, for absorbed attention
    V3.2                deepseek32     the same, and the indexer; gguf 0.19 has no table for it, llama.cpp reads it
    V4                  deepseek4      see gguf_v4.py; V4.1 has no architecture in llama-cpp-python 0.3.36

Prediction layers and draft stages are left out, as llama.cpp's own converter does for these architectures. What
llama.cpp computes otherwise is refused with one line, except for V2's groups of experts, for which there is a warning.
Norms, router and correction bias are always float32. Letters: E experts, H heads, C latent width.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.official import official_model_type
from modeling_deepseek.whole_folders import writing_beside
from tokenization_deepseek import DeepSeekTokenizer
from tokenization_deepseek.pre_tokenization import PATTERNS, pre_tokenizer

from .gguf_v4 import SQRT_SOFTPLUS, add_compressed, place_of, unknown_fields, unpacked
from .opening import open_model
from .shards import new_destination, spots
from .tensors import LazyTensor, Tensors, word_of

ARCHITECTURES = {
    "llama": "llama",
    "deepseek": "deepseek",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "deepseek_v32": "deepseek32",
    "deepseek_v4": "deepseek4",
}
NOT_IN_LLAMA_CPP = {  # its own converter can't help either
    "deepseek_v41": "llama.cpp (llama-cpp-python 0.3.36) has no V4.1; export --to native or bundle, for other engines",
}
INDEXER_NAMES = {"wq_b": "attn_q_b", "wk": "attn_k", "k_norm": "k_norm", "weights_proj": "proj"}
PRE_TOKENIZERS = {"llm": "deepseek-llm", "coder": "deepseek-coder", "v3": "deepseek-v3"}
TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.int32: ("I32", ""),  # tables of V4's experts
    torch.uint8: ("MXFP4", "MOSTLY_MXFP4_MOE"),  # and experts in FP4
}
SCORES = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": SQRT_SOFTPLUS}  # llama.cpp's numbers
PROBE = (  # cut differently by every generation
    "Hello, world's 12345 tests:\r\n\t x_y = f(3.14)  // naïve Straße\n\n深度求索123模型ひらがなカタカナ한국어 "
    "Привет, мир! …“quoted” don't WON'T a1b2 é 🚀🚀 ~/path/to_file.py\n  indented   \n"
)


def load_gguf() -> Any:
    """The gguf package.

    Raises:
        ValueError: if it isn't installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError('--to gguf needs the package gguf; pip install "deepseek-hf[gguf]"') from error
    return gguf


def architecture_of(config: DeepSeekConfig) -> str:
    """llama.cpp's word for the model, if it computes what the model computes.

    Raises:
        ValueError: naming the field that llama.cpp doesn't know.
    """
    model_type = official_model_type(config.to_dict())
    if model_type not in ARCHITECTURES:
        advice = NOT_IN_LLAMA_CPP.get(model_type, "export --to native, and use llama.cpp's own converter")
        raise ValueError(f"gguf is written for {', '.join(ARCHITECTURES)}, not for {model_type}; {advice}")
    architecture = ARCHITECTURES[model_type]
    rope = config.rope_parameters
    has_experts = config.n_routed_experts is not None
    known_rope = {
        "llama": ("default", "linear", "yarn", "llama3"),
        "deepseek": ("default", "linear", "yarn"),
        "deepseek2": ("default", "yarn"),
        "deepseek32": ("default", "yarn"),
        "deepseek4": ("default", "yarn"),
    }[architecture]
    is_compressed = architecture == "deepseek4"
    is_latent = config.kv_lora_rank is not None
    scales = (rope.get("mscale"), rope.get("mscale_all_dim"))
    heads_cover = config.num_attention_heads * config.head_dim == config.hidden_size
    for is_other, field in (
        (config.attention_direction != "causal", f"attention_direction {config.attention_direction!r}"),
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r}"),
        (not is_compressed and config.hc_mult is not None, f"hc_mult {config.hc_mult}"),
        (not is_compressed and config.swiglu_limit is not None, f"swiglu_limit {config.swiglu_limit}"),
        (
            not is_compressed and has_experts and config.num_hash_layers > 0,
            f"num_hash_layers {config.num_hash_layers}",
        ),
        (has_experts and config.moe_layer_freq != 1, f"moe_layer_freq {config.moe_layer_freq}"),
        (has_experts and not config.n_shared_experts, "experts without shared ones"),
        (architecture != "llama" and (config.attention_bias or config.mlp_bias), "attention_bias or mlp_bias"),
        (architecture == "deepseek" and config.norm_topk_prob, "norm_topk_prob in the layers of MoE-16B"),
        (architecture == "deepseek" and not heads_cover, f"head_dim {config.head_dim} in the layers of MoE-16B"),
        (rope["rope_type"] not in known_rope, f"rope_type {rope['rope_type']!r} in {model_type}"),
        (
            rope["rope_type"] == "yarn" and is_latent and (not scales[0] or scales[0] != scales[1]),
            f"yarn with mscale, mscale_all_dim {scales}",
        ),
        (
            rope["rope_type"] == "yarn" and not is_latent and any(scales),
            f"yarn with mscale, mscale_all_dim {scales}",
        ),
        (
            rope["rope_type"] == "yarn" and architecture == "deepseek32" and scales[0] != 1,
            f"yarn with mscale {scales[0]} in {model_type}",
        ),
        *(unknown_fields(config) if is_compressed else ()),
    ):
        if is_other:
            raise ValueError(f"llama.cpp has no {field}; export --to native or bundle")
    return architecture


def uses_groups(config: DeepSeekConfig) -> bool:
    """Whether groups of experts leave anything out."""
    return (
        config.n_routed_experts is not None and config.topk_method != "greedy" and config.topk_group < config.n_group
    )


# Weights ------------------------------------------------------------------------------------------------------------


def gguf_tensors(tensors: Tensors, config: DeepSeekConfig, architecture: str) -> Tensors:
    """The checkpoint's weights as llama.cpp names and stores them."""
    place, tensors = place_of, unpacked(tensors, config)
    if architecture != "deepseek4":
        place = partial(_place_of, names=_name_map(config, architecture))
    elif config.tie_word_embeddings:  # it asks for a head
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    renamed: Tensors = {}
    for name, tensor in stack_experts(_without_prediction_layers(tensors, config), config).items():
        for part, value in _converted(name, tensor, config):
            word = place(part)
            if word is None:
                raise ValueError(f"weight {part} has no place in llama.cpp's architecture {architecture}")
            is_small = len(value.shape) == 1 or part.endswith(".mlp.gate.weight")
            renamed[word] = value.to("F32") if is_small and value.word != "F32" else value
    if config.rope_parameters["rope_type"] == "llama3":
        factors = rope_factors(config)
        renamed["rope_freqs.weight"] = LazyTensor(tuple(factors.shape), word_of(factors.dtype), lambda: factors)
    return renamed


def _name_map(config: DeepSeekConfig, architecture: str) -> Any:
    gguf, table = load_gguf(), "deepseek2" if architecture == "deepseek32" else architecture
    arch = next(arch for arch, word in gguf.MODEL_ARCH_NAMES.items() if word == table)
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def _place_of(name: str, names: Any) -> str | None:
    """llama.cpp's name for a weight of the architectures that gguf has tables for, and of V3.2's indexer."""
    official, _, suffix = name.rpartition(".")
    if suffix == "e_score_correction_bias":  # llama.cpp says bias of a tensor of its own
        official, suffix = f"{official}.e_score_correction", "bias"
    indexer = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.indexer\.(\w+)", official)
    word = names.get_name(official)
    if indexer is not None:
        word = f"blk.{indexer[1]}.indexer.{INDEXER_NAMES[indexer[2]]}"
    return None if word is None else f"{word}.{suffix}"


def _without_prediction_layers(tensors: Tensors, config: DeepSeekConfig) -> Tensors:
    layer = re.compile(r"model\.layers\.(\d+)\.")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if (match := layer.match(name)) is None or int(match[1]) < config.num_hidden_layers
    }


def stack_experts(tensors: Tensors, config: DeepSeekConfig) -> Tensors:
    """`experts.{e}.gate_proj.weight` and the like, e < E, as one `experts.gate_proj.weight` [E, rows, columns]."""
    pattern = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)")
    stacked: Tensors = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            stacked[name] = tensor
        elif match[2] == "0":
            parts = [tensors[f"{match[1]}.{expert}.{match[3]}"] for expert in range(config.n_routed_experts)]
            stacked[f"{match[1]}.{match[3]}"] = LazyTensor((len(parts), *tensor.shape), tensor.word, _stack(parts))
    return stacked


def _stack(parts: list[LazyTensor]) -> Callable[[], torch.Tensor]:
    return lambda: torch.stack([part.read() for part in parts])


def _converted(name: str, tensor: LazyTensor, config: DeepSeekConfig) -> Iterator[tuple[str, LazyTensor]]:
    if name.endswith(".kv_b_proj.weight"):
        heads, nope, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
        key = tensor.map(partial(_key_part, heads=heads, nope=nope), shape=(heads, latent, nope))
        value = tensor.map(partial(_value_part, heads=heads, nope=nope), shape=(heads, config.v_head_dim, latent))
        yield name.replace("kv_b_proj", "k_b_proj"), key
        yield name.replace("kv_b_proj", "v_b_proj"), value
    elif re.search(r"\.self_attn\.[qk]_proj\.(weight|bias)$", name) and config.kv_lora_rank is None:
        of_keys = ".k_proj." in name
        count = config.num_key_value_heads if of_keys else config.num_attention_heads
        yield name, tensor.map(partial(interleave_pairs, heads=count))
    else:
        yield name, tensor


def _key_part(weight: torch.Tensor, heads: int, nope: int) -> torch.Tensor:
    """kv_b_proj [H (nope + v), C] -> [H, C, nope]: what turns a query into the latent's space."""
    return weight.unflatten(0, (heads, -1))[:, :nope].transpose(1, 2)


def _value_part(weight: torch.Tensor, heads: int, nope: int) -> torch.Tensor:
    """kv_b_proj [H (nope + v), C] -> [H, v, C]: what turns a mixed latent into a value."""
    return weight.unflatten(0, (heads, -1))[:, nope:]


def interleave_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from rotary pairs (i, i + width / 2) to pairs (2i, 2i + 1)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def rope_factors(config: DeepSeekConfig) -> torch.Tensor:
    """[head_dim / 2] by which llama3 slows each frequency down."""
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return config.rope_parameters["rope_theta"] ** -exponents / slowed


# Metadata -----------------------------------------------------------------------------------------------------------


def add_metadata(writer: Any, config: DeepSeekConfig, name: str, dtype: torch.dtype) -> None:
    """The model's shape, under llama.cpp's keys."""
    gguf = load_gguf()
    is_latent, is_compressed = config.kv_lora_rank is not None, config.compress_ratios is not None
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[TYPES[dtype][1]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.moe_intermediate_size if is_compressed else config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    # the latent is one head for all queries, as V4's key is
    writer.add_head_count_kv(1 if is_latent or is_compressed else config.num_key_value_heads)
    if is_compressed:
        add_compressed(writer, config)
    elif is_latent:
        writer.add_q_lora_rank(config.q_lora_rank or 0)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(config.qk_head_dim)
        writer.add_value_length_mla(config.v_head_dim)
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    if getattr(config, "index_topk", None) is not None:
        writer.add_indexer_head_count(config.index_n_heads)
        writer.add_indexer_key_length(config.index_head_dim)
        writer.add_indexer_top_k(config.index_topk)
    _add_rope(writer, config, gguf)
    if is_latent or config.n_routed_experts is not None:
        _add_experts(writer, config, gguf)


def _add_rope(writer: Any, config: DeepSeekConfig, gguf: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in ("linear", "yarn"):  # llama3 is a tensor
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
        if config.kv_lora_rank is not None:  # llama.cpp takes this tenth back for its deepseek2
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _add_experts(writer: Any, config: DeepSeekConfig, gguf: Any) -> None:
    if config.n_routed_experts is None:
        writer.add_leading_dense_block_count(config.num_hidden_layers)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_shared_count(0)
        return
    is_softmax = config.scoring_func == "softmax"
    normalizes = config.norm_topk_prob and (not is_softmax or config.num_experts_per_tok > 1)
    writer.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    # as in routers.py: with softmax only scores that are not normalised are scaled
    writer.add_expert_weights_scale(config.routed_scaling_factor if not is_softmax or not normalizes else 1.0)
    writer.add_expert_weights_norm(normalizes)
    writer.add_uint32(gguf.Keys.LLM.EXPERT_GATING_FUNC.format(arch=writer.arch), SCORES[config.scoring_func])
    if uses_groups(config):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


# Tokenizer ----------------------------------------------------------------------------------------------------------


def add_tokenizer(writer: Any, tokenizer: DeepSeekTokenizer, vocab_size: int) -> None:
    """Vocabulary, merges, special tokens and chat template.

    Raises:
        ValueError: for more tokens than the model has, and for cuts before BPE that llama.cpp doesn't know.
    """
    gguf = load_gguf()
    backend = tokenizer.backend_tokenizer
    by_id = {token_id: token for token, token_id in backend.get_vocab(with_added_tokens=True).items()}
    if max(by_id) >= vocab_size:
        raise ValueError(f"the tokenizer has token {max(by_id)}, but the model's vocab_size is {vocab_size}")
    added = backend.get_added_tokens_decoder()
    types = {
        token_id: gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        for token_id, token in added.items()
    }
    ids = range(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[generation_of(tokenizer)])
    writer.add_token_list([by_id.get(token_id, f"[PAD{token_id}]") for token_id in ids])
    default = (gguf.TokenType.NORMAL, gguf.TokenType.UNUSED)
    writer.add_token_types([types.get(token_id, default[token_id not in by_id]) for token_id in ids])
    writer.add_token_merges(merges_of(backend))
    for word in ("bos", "eos", "pad"):
        if (token_id := getattr(tokenizer, f"{word}_token_id")) is not None:
            getattr(writer, f"add_{word}_token_id")(token_id)
    writer.add_add_bos_token(bool(tokenizer.add_bos_token))
    writer.add_add_eos_token(bool(tokenizer.add_eos_token))
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(tokenizer.chat_template))


def merges_of(backend: Any) -> list[str]:
    """BPE merges as "left right", from a tokenizers.Tokenizer; newer files hold them as pairs."""
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def generation_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Which generation's cuts the tokenizer makes: a key of `PATTERNS`, found on a text that each cuts differently.

    Raises:
        ValueError: if it is none of them.
    """
    cuts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    for generation in PATTERNS:
        if pre_tokenizer(generation).pre_tokenize_str(PROBE) == cuts:
            return generation
    raise ValueError(
        f"the tokenizer cuts text before BPE otherwise than DeepSeek's ({', '.join(PATTERNS)}), and llama.cpp has no "
        "word for that; export --to native"
    )


def plain_template(template: str) -> str:
    """A chat template without the marks of what a model learns to write, which engines other than ours don't know."""
    return re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)


# The file -----------------------------------------------------------------------------------------------------------


def export_gguf(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    report: Callable[[int, int], Any] = lambda done, total: None,
) -> None:
    """Write a language model and its tokenizer as a GGUF file, one tensor at a time.

    Args:
        source, adapter: as in `export_native`.
        destination: a file that doesn't exist, with the ending .gguf.
        dtype: "bf16", "fp32", or None for the type that the weights are stored in.
        max_shard_size: not for this form.
        report: is told the number of tensors that are written, and of all.

    Raises:
        ValueError: as in `export_native`; for what llama.cpp doesn't compute; for a model without tokenizer; without
            the package gguf.
        OSError: if writing fails, or what was written reads back otherwise.
    """

    gguf, path = load_gguf(), Path(destination)
    if path.suffix != ".gguf":
        raise ValueError(f"{destination}: with --to gguf the destination is a file that ends in .gguf")
    if dtype == "fp8":
        raise ValueError("GGUF has no FP8 in blocks; write --dtype bf16, and quantize by llama.cpp's llama-quantize")
    if max_shard_size is not None:
        raise ValueError("--max-shard-size is not for --to gguf, which is one file")
    with new_destination(path, is_file=True):
        checkpoint = open_model(source, adapter, dtype)
        config = checkpoint.config
        if checkpoint.head != "ForCausalLM":
            raise ValueError(f"llama.cpp reads language models, and this is {checkpoint.head}; use --to bundle")
        architecture = architecture_of(config)
        if not (checkpoint.folder / "tokenizer.json").is_file():
            raise ValueError(f"{source} has no tokenizer.json, without which llama.cpp can't read a model")
        if config.topk_method == "group_limited_greedy" and uses_groups(config):
            warnings.warn(
                "llama.cpp ranks groups of experts by their two best, V2 by its best: some tokens take other experts",
                stacklevel=2,
            )
        tokenizer = DeepSeekTokenizer.from_pretrained(checkpoint.folder)
        tensors = gguf_tensors(checkpoint.tensors, config, architecture)
        if config.dtype not in TYPES:
            raise ValueError(f"the weights are stored as {config.dtype}; say which type with --dtype")
        with writing_beside(path.parent) as beside:
            file = Path(beside, path.name)
            writer = gguf.GGUFWriter(file, architecture)
            has_fp4 = any(tensor.word == "U8" for tensor in tensors.values())
            add_metadata(writer, config, path.stem, torch.uint8 if has_fp4 else config.dtype)
            add_tokenizer(writer, tokenizer, config.vocab_size)
            written = write_tensors(writer, tensors, report)
            verify(file, written, tensors)


def write_tensors(writer: Any, tensors: Tensors, report: Callable[[int, int], Any]) -> dict[str, bytes]:
    """Write header and tensors; returns some bytes of each tensor, see `spots`."""
    kinds = load_gguf().GGMLQuantizationType
    for name, tensor in tensors.items():
        kind = kinds[TYPES[tensor.dtype][0]]
        # a shape of bytes is told by their type
        element = np.dtype(np.uint8 if tensor.dtype == torch.uint8 else np.float32)
        writer.add_tensor_info(name, tensor.shape, element, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    written = {}
    for done, (name, tensor) in enumerate(tensors.items(), start=1):
        value = tensor.read().contiguous()
        writer.write_tensor_data(value.view(torch.uint8).numpy())
        written[name] = spots(value)
        report(done, len(tensors))
    writer.close()
    return written


def verify(file: Path, written: dict[str, bytes], tensors: Tensors) -> None:
    """Read the file: names, shapes, types, and some values of each tensor.

    Raises:
        OSError: naming what differs.
    """
    found = {tensor.name: tensor for tensor in load_gguf().GGUFReader(file).tensors}
    if found.keys() != written.keys():
        raise OSError(f"{file.name}: tensor {min(found.keys() ^ written.keys())} is in only one of plan and file")
    for name, tensor in tensors.items():
        kind = found[name].tensor_type.name
        shape = tuple(found[name].data.shape if kind == "MXFP4" else map(int, reversed(found[name].shape)))
        raw = torch.from_numpy(np.array(found[name].data, copy=True).view(np.uint8)).reshape(-1)
        if (shape, kind) != (tensor.shape, TYPES[tensor.dtype][0]) or spots(raw.view(tensor.dtype)) != written[name]:
            raise OSError(f"{file.name}: tensor {name} reads back otherwise than it was written; is the disk sound?")
