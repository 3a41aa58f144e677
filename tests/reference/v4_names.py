"""The names of tensors in V4's releases, written down one by one (config.json and index of V4-Flash and V4-Pro)."""


def expert(prefix: str, scales: bool) -> list[str]:
    return [
        f"{prefix}.{w}.{part}" for w in ("w1", "w2", "w3") for part in (("weight", "scale") if scales else ("weight",))
    ]


def linear(name: str, scales: bool) -> list[str]:
    return [f"{name}.weight", f"{name}.scale"] if scales else [f"{name}.weight"]


def compressor(prefix: str) -> list[str]:
    return [f"{prefix}.compressor.{name}" for name in ("wkv.weight", "wgate.weight", "norm.weight", "ape")]


def block(prefix: str, ratio: int, is_hash: bool, experts: int, scales: bool) -> list[str]:
    names = [f"{prefix}.{norm}.weight" for norm in ("attn_norm", "ffn_norm", "attn.q_norm", "attn.kv_norm")]
    names += [f"{prefix}.hc_{part}_{what}" for part in ("attn", "ffn") for what in ("fn", "base", "scale")]
    for projection in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
        names += linear(f"{prefix}.attn.{projection}", scales)
    names.append(f"{prefix}.attn.attn_sink")
    names += compressor(f"{prefix}.attn") if ratio else []
    if ratio == 4:
        names += linear(f"{prefix}.attn.indexer.wq_b", scales) + [f"{prefix}.attn.indexer.weights_proj.weight"]
        names += compressor(f"{prefix}.attn.indexer")
    names += [f"{prefix}.ffn.gate.weight", f"{prefix}.ffn.gate.{'tid2eid' if is_hash else 'bias'}"]
    for e in range(experts):
        names += expert(f"{prefix}.ffn.experts.{e}", scales)
    return names + expert(f"{prefix}.ffn.shared_experts", scales)


def v4_names(
    ratios: list[int], hash_layers: int, experts: int, predictions: int = 0, drafts: int = 0, scales: bool = True
) -> list[str]:
    """All names of a release.

    Args:
        ratios: compress_ratios of the layers, prediction layers left out.
        drafts: draft stages in the place of prediction layers, as from July 2026 on.
        scales: whether weights are quantized, so that there are scales beside them.
    """
    names = ["embed.weight", "norm.weight", "head.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"]
    for i, ratio in enumerate(ratios):
        names += block(f"layers.{i}", ratio, i < hash_layers, experts, scales)
    for i in range(predictions):
        names += block(f"mtp.{i}", 0, False, experts, scales)
        names += linear(f"mtp.{i}.e_proj", scales) + linear(f"mtp.{i}.h_proj", scales)
        names += [f"mtp.{i}.{name}.weight" for name in ("enorm", "hnorm", "norm")]
        names += [f"mtp.{i}.hc_head_{what}" for what in ("fn", "base", "scale")]
    for i in range(drafts):
        names += block(f"mtp.{i}", 0, False, experts, scales)
        if i == 0:
            names += [*linear("mtp.0.main_proj", scales), "mtp.0.main_norm.weight"]
    if drafts:
        last = f"mtp.{drafts - 1}"
        names += [f"{last}.{name}" for name in ("norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")]
        names += [f"{last}.markov_head.markov_{w}.weight" for w in ("w1", "w2")] + [
            f"{last}.confidence_head.proj.weight"
        ]
    return names
