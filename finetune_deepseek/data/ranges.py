"""What numbers each numeric flag takes: all of them, transformers' own too, which it checks late or not at all."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

ANY = "a finite number"
# (in words, whether a number fits, the flags); a flag means the same in each task and verb that has it.
RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "1 or more",
        lambda value: value >= 1,
        (
            *("lora_r", "lora_alpha", "vocab_size", "cpu_threads", "average_checkpoints", "early_stopping_patience"),
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor", "tokens_per_batch"),
            *("ddp_bucket_cap_mb", "ddp_timeout", "generation_max_length", "generation_num_beams"),
            *("max_train_samples", "max_eval_samples", "max_predict_samples", "augment_copies"),
            *("back_translation_beams", "max_source_length", "max_target_length"),
            *("n_best_size", "max_answer_length", "max_question_length", "matryoshka_sizes", "max_text_length"),
            *("k_core", "max_history", "num_non_clicks", "num_levels", "num_beams", "examples_per_history"),
            *("negatives", "k", "batch_size", "max_new_tokens", "num_return_sequences"),
            *("tokens_budget", "eval_stride", "prompt_tokens", "image_size"),
            *("max_caption_length", "patch_pixels", "codes_steps", "number", "enlarge"),
        ),
    ),
    (
        "2 or more",
        lambda value: value >= 2,
        (
            "max_seq_length",
            *("max_length", "most_frequent_labels", "max_query_length", "max_passage_length", "codebook_size"),
            "num_candidates",
            *("colours", "codes"),
        ),
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        (
            *("learning_rate", "warmup_steps", "weight_decay", "l1", "train_last_n_layers", "max_grad_norm"),
            "router_bias_update",
            *("neftune_noise_alpha", "eval_steps", "eval_delay", "save_steps", "save_total_limit"),
            *("dataloader_num_workers", "doc_stride", "fusion_weights", "examples_shown", "temperature", "top_k"),
            "guidance_scale",
            *("max_continuations", "num_drawn", "max_replies", "shift", "rotation", "zoom", "colour", "noise"),
            "mixup",
        ),
    ),
    (
        "above 0",
        lambda value: value > 0,
        (
            *("num_train_epochs", "train_minutes", "logging_steps", "adam_epsilon", "lr_milestones"),
            *("contrastive_temperature", "repetition_penalty", "pixel_max"),
        ),
    ),
    (
        "at least 0 and less than 1",
        lambda value: 0 <= value < 1,
        (
            *("attention_dropout", "hidden_dropout", "lora_dropout", "adam_beta1", "adam_beta2"),
            *("label_smoothing_factor", "item_dropout", "caption_dropout"),
        ),
    ),
    ("above 0 and below 1", lambda value: 0 < value < 1, ("lr_factor", "lr_decay_share", "validation_share")),
    ("above 0 and below 0.5", lambda value: 0 < value < 0.5, ("time_share",)),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, ("top_p",)),
    ("from 0 to 1", lambda value: 0 <= value <= 1, ("min_score", "min_p")),
    # numpy takes no others
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, ("seed", "data_seed", "tie_seed")),
    ("1 or more, or -1 for none", lambda value: value >= 1 or value == -1, ("max_steps",)),
    ("-1 or more", lambda value: value >= -1, ("local_rank",)),
    (ANY, lambda value: True, ("generation_length_penalty", "length_penalty", "null_score_diff_threshold")),
)
RANGES = {name: (words, fits) for words, fits, names in RULES for name in names}


def check_ranges(arguments: Any, but: tuple[str, ...] = ()) -> None:
    """Refuse numbers that their flags don't take, in a dataclass of flags.

    Args:
        but: flags without effect here, whatever they are.

    Raises:
        ValueError: with one line that names the flag. None is always taken; a number that is none never.
    """
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if value is None or field.name not in RANGES or field.name in but:
            continue
        words, fits = RANGES[field.name]
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(math.isfinite(number) and fits(number) for number in numbers):
            shown = " ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers)
            subject = "each" if isinstance(value, list | tuple) else "it"
            raise ValueError(f"--{field.name} {shown}: {subject} must be {words}.")
