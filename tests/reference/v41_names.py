"""The names of all tensors in the release of V4.1-Flash, written down one by one (its config.json and index)."""

from tests.reference.v4_names import expert, linear

RELEASE = {
    **{"layers": 40, "experts": 384, "makers": [2, 8, 14, 20], "without_gate": [20], "stages": 3},
    **{"choosers": [2, 8, 14, 20, 24, 28, 32, 36], "engrams": [1, 14], "stage_experts": 128, "blocks": 32},
}


def block(prefix: str, experts: int, scales: bool) -> list[str]:
    """What each layer and each draft stage has."""
    names = [f"{prefix}.{norm}.weight" for norm in ("attn_norm", "ffn_norm", "attn.q_norm", "attn.kv_norm")]
    names += [f"{prefix}.hc_{part}_{what}" for part in ("attn", "ffn") for what in ("fn", "base", "scale")]
    for projection in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
        names += linear(f"{prefix}.attn.{projection}", scales)
    names += [f"{prefix}.attn.attn_sink"]
    names += [f"{prefix}.ffn.gate.{what}" for what in ("weight", "bias", "bias_vl")]
    for e in range(experts):
        names += expert(f"{prefix}.ffn.experts.{e}", scales)
    return names + expert(f"{prefix}.ffn.shared_experts", scales)


def v41_names(sizes: dict, scales: bool = True) -> list[str]:
    """Names of the text model: `sizes` as in `RELEASE`; scales: whether weights are quantized."""
    names = ["embed.weight", "norm.weight", "head.weight"]
    for i in range(sizes["layers"]):
        names += block(f"layers.{i}", sizes["experts"], scales)
        if i in sizes["makers"]:
            gate = [] if i in sizes["without_gate"] else ["compressor.wgate"]
            made = ["compressor.wkv", *gate, "compressor.norm", "indexer.wk", "indexer.k_norm"]
            names += [f"layers.{i}.attn.{name}.weight" for name in made]
        if i in sizes["choosers"]:
            names += linear(f"layers.{i}.attn.indexer.wq_b", scales)
            names += [f"layers.{i}.attn.indexer.weights_proj.weight"]
        if i in sizes["engrams"]:
            names += linear(f"layers.{i}.engram.embed", scales) + linear(f"layers.{i}.engram.wkv", scales)
            names += [f"layers.{i}.engram.q_weight", f"layers.{i}.engram.k_weight"]
    return names


def draft_names(sizes: dict, scales: bool = True) -> list[str]:
    """Names of the draft stages (DSpark)."""
    names, last = [], f"mtp.{sizes['stages'] - 1}"
    for i in range(sizes["stages"]):
        names += block(f"mtp.{i}", sizes["stage_experts"], scales)
    names += linear("mtp.0.main_proj", scales) + ["mtp.0.main_norm.weight", f"{last}.norm.weight"]
    return names + [
        f"{last}.{name}.weight" for name in ("markov_head.embed", "markov_head.head", "confidence_head.proj")
    ]


def vision_names(sizes: dict) -> list[str]:
    """Names of the vision tower, of what joins it to the text model, and of the vectors around images."""
    names = ["vision.patch_embed.proj.weight", "vision.patch_embed.proj.bias", "vision.norm.weight"]
    for i in range(sizes["blocks"]):
        whole = ("attn.wqkv", "attn.wo")
        names += [f"vision.blocks.{i}.{name}.{part}" for name in whole for part in ("weight", "bias")]
        names += [f"vision.blocks.{i}.{name}.weight" for name in ("mlp.w1", "mlp.w2", "norm1", "norm2")]
    names += [f"aligner.{name}.{part}" for name in ("w1", "w2") for part in ("weight", "bias")]
    return names + ["image_start", "image_end", "image_newline"]
