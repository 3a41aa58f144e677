"""Published config.json files, of whatever model_type, as fields of `DeepSeekConfig`.

A source is a row of `SOURCES`: the values that its own config class took for granted where the file is silent. The
fields keep their published names; what the model has no use for is listed in `UNUSED_FIELDS` with the reason. The
file travels to the Hub with configuration_deepseek.py.
"""

from typing import Any

SOFTMAX_ROUTER = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
SIGMOID_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}

# model_type -> defaults of that source's own config class (transformers' and the remote code's agree on these)
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2},  # LLM-7B / 67B, Coder 1.x, Math
    "deepseek": {**SOFTMAX_ROUTER, "bos_token_id": 100000, "eos_token_id": 100001},  # MoE-16B; first upload of V2
    "deepseek_v2": {**SOFTMAX_ROUTER, "bos_token_id": 100000, "eos_token_id": 100001},
    "deepseek_v3": {**SIGMOID_ROUTER, "vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1},
}

UNUSED_FIELDS = {
    "auto_map",  # names the repository's remote code, which is not run
    "aux_loss_alpha",  # training hyper-parameters of the release
    "seq_aux",
    "router_aux_loss_coef",
    "ep_size",  # parallel layout of the release's own inference code
    "pretraining_tp",
    "num_nextn_predict_layers",  # prediction modules after the last layer: not part of the trunk
    "num_mtp_layers",
    "qk_head_dim",  # derived
    "transformers_version",
}

# Where a release misspelled a word.
SPELLINGS = {"topk_method": {"gready": "greedy"}}


def from_official(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Translate a published config.json; a dictionary in our own form comes back as it is.

    Args:
        config_dict: the parsed file. Its `model_type` may be any of `SOURCES`.

    Returns:
        Keyword arguments of `DeepSeekConfig`, with `source_model_type` saying where they came from.

    Raises:
        ValueError: for a model_type that is no DeepSeek text model known here.
    """
    model_type = config_dict.get("model_type")
    if model_type is None or (model_type == "deepseek" and "deepseek_format" in config_dict):
        return config_dict
    if model_type not in SOURCES:
        raise ValueError(
            f"config.json has model_type {model_type!r}, which DeepSeekConfig cannot read; it reads "
            + ", ".join(map(repr, SOURCES))
        )
    fields = {key: value for key, value in config_dict.items() if key not in UNUSED_FIELDS}
    for key, spellings in SPELLINGS.items():
        if fields.get(key) in spellings:
            fields[key] = spellings[fields[key]]
    defaults = {key: value for key, value in SOURCES[model_type].items() if fields.get(key) is None}
    source = {"model_type": "deepseek", "source_model_type": model_type, "deepseek_format": 1}
    return {**fields, **defaults, **source}
