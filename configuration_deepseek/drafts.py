"""The fields of draft stages (DSpark), what follows from them, and what is refused. Travels to the Hub."""

from dataclasses import dataclass
from typing import Any

from .requiring import require


@dataclass(kw_only=True, repr=False)
class DraftFields:
    """Draft stages (DSpark, arXiv 2607.05147; V4 from July 2026 on), which prediction layers are then.

    dspark_block_size: how many tokens they draft at once; `None`: prediction layers are no draft stages.
    dspark_noise_token_id: the token that stands for those which are to be drafted.
    dspark_target_layer_ids: layers behind which the mean of the streams is what drafts are made from.
    dspark_markov_rank: width of what a drafted token tells the next one.
    """

    dspark_block_size: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: list[int] | None = None
    dspark_markov_rank: int | None = None


def derive_drafts(config: Any) -> None:
    """Give each draft stage a ratio of 0, by which releases count their stages."""
    if config.compress_ratios is not None and config.dspark_block_size is not None:
        missing = config.num_hidden_layers + config.num_nextn_predict_layers - len(config.compress_ratios)
        config.compress_ratios = [*config.compress_ratios, *[0] * missing]


def validate_drafts(config: Any) -> None:
    """Of draft stages: their sizes, and the trunk that they need."""
    require(
        not config.mtp_loss_weight or config.prediction_word != "mhc_shifted",
        f"mtp_loss_weight={config.mtp_loss_weight} clashes with kv_source_layer_ids: what V4.1 predicts ahead by is "
        "not held; set 0",
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
