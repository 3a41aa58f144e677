"""The fields of draft stages (DSpark), what follows from them, and what is refused. Travels to the Hub."""

import copy
from dataclasses import dataclass
from typing import Any

from .requiring import require

DRAFTING = {"mhc": "dspark", "mhc_shifted": "dspark_shifted"}  # what draft stages are with such a residual


@dataclass(kw_only=True, repr=False)
class DraftFields:
    """Draft stages (DSpark, arXiv 2607.05147; V4 from July 2026 on, V4.1), which prediction layers are then.

    dspark_block_size: how many tokens they draft at once; `None`: prediction layers are no draft stages.
    dspark_noise_token_id: the token that stands for those which are to be drafted.
    dspark_target_layer_ids: layers behind which the mean of the streams is what drafts are made from; in V4.1, before
        which.
    dspark_markov_rank: width of what a drafted token tells the next one.
    dspark_n_routed_experts, dspark_num_experts_per_tok: experts of the stages; `None`: as many as the layers have.
    """

    dspark_block_size: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: list[int] | None = None
    dspark_markov_rank: int | None = None
    dspark_n_routed_experts: int | None = None
    dspark_num_experts_per_tok: int | None = None

    def experts_at(self: Any, layer_idx: int) -> Any:
        """The config by whose numbers of experts a layer is built: this one, or a copy with those of draft stages."""
        if layer_idx < self.num_hidden_layers or self.dspark_block_size is None:
            return self
        own = copy.copy(self)
        own.n_routed_experts = self.dspark_n_routed_experts or self.n_routed_experts
        own.num_experts_per_tok = self.dspark_num_experts_per_tok or self.num_experts_per_tok
        return own

    @property
    def draft_taps(self: Any) -> list[int]:
        """Layers before which drafts take the mean of the streams; the number of layers is behind the last."""
        behind = 1 if self.kv_source_layer_ids is None else 0
        return [layer + behind for layer in self.dspark_target_layer_ids or []]


def derive_drafts(config: Any) -> None:
    """Give each draft stage a ratio of 0, by which releases count their stages."""
    if config.compress_ratios is not None and config.dspark_block_size is not None:
        missing = config.num_hidden_layers + config.num_nextn_predict_layers - len(config.compress_ratios)
        config.compress_ratios = [*config.compress_ratios, *[0] * missing]


def validate_drafts(config: Any) -> None:
    """Of draft stages: their sizes, and the trunk that they need."""
    require(
        not config.mtp_loss_weight or config.prediction_word != "mhc_shifted",
        f"mtp_loss_weight={config.mtp_loss_weight} clashes with kv_source_layer_ids where dspark_block_size is None: "
        "V4.1 predicts ahead by draft stages alone; set it, or the weight to 0",
    )
    if config.dspark_block_size is None:
        return
    size = f"dspark_block_size={config.dspark_block_size}"
    for name in ("dspark_block_size", "dspark_markov_rank", "num_nextn_predict_layers"):
        value = getattr(config, name)
        require(value is not None and value > 0, f"{name}={value} must be positive where there are draft stages")
    for name in ("compress_ratios", "hc_mult"):
        require(getattr(config, name) is not None, f"{size} clashes with {name}=None, for V4 alone drafts so")
    noise, layers = config.dspark_noise_token_id, config.dspark_target_layer_ids or []
    require(
        noise is not None and 0 <= noise < config.vocab_size,
        f"dspark_noise_token_id={noise} must be a token of vocab_size={config.vocab_size}",
    )
    require(
        bool(layers) and layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < config.num_hidden_layers,
        f"dspark_target_layer_ids={layers} must be ascending, below num_hidden_layers={config.num_hidden_layers}",
    )
    remembering = sorted({*layers} & {*(config.engram_layer_ids or [])})
    require(
        not remembering,
        f"dspark_target_layer_ids={layers} has {remembering} of engram_layer_ids, whose streams change before the "
        "layer reads them; name other layers",
    )
    validate_draft_experts(config)


def validate_draft_experts(config: Any) -> None:
    """No more experts of a token than there are."""
    for name in ("dspark_n_routed_experts", "dspark_num_experts_per_tok"):
        value = getattr(config, name)
        require(value is None or value > 0, f"{name}={value} must be positive, or None for as many as the layers have")
    stages = config.experts_at(config.num_hidden_layers)
    experts, chosen = stages.n_routed_experts or 0, stages.num_experts_per_tok or 0
    require(
        chosen <= experts,
        f"draft stages choose {chosen} of {experts} experts (dspark_num_experts_per_tok, dspark_n_routed_experts); "
        "choose fewer",
    )
    require(
        experts % (config.n_group or 1) == 0 and experts >= 2 * (config.n_group or 1),
        f"dspark_n_routed_experts={experts} does not make n_group={config.n_group} groups of two or more; change it",
    )
