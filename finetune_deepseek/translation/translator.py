"""Lines of text to their translations, by a model or adapter of the translation task.

The prompt, the languages and the length of a translation are those of the model's training.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from ..training.batches import batches_with_room
from ..training.loading import fitted, pretrained_model, pretrained_tokenizer
from ..training.saved import Saved
from .arguments import LanguagePair, TranslateArguments, TranslationArguments
from .prompts import Prompts


def prompts_of(name: str, arguments: TranslateArguments) -> Prompts:
    """The prompts that the model was trained on, by its settings and the flags.

    Raises:
        ValueError: if it was made for another task or other languages, or neither names any.
    """
    saved = Saved.open(None, name, arguments.model_revision).require_model()
    saved.check_task(Prompts.name, "CausalLM")
    settings = saved.settings_for(Prompts.name, TranslationArguments)
    settings["source_lang"], settings["target_lang"] = language_pair(saved, arguments, settings)
    settings["both_directions"] = False
    given = ("prompt_template", "max_target_length")
    settings |= {key: value for key in given if (value := getattr(arguments, key)) is not None}
    return Prompts(TranslationArguments(**settings))


def language_pair(saved: Saved, arguments: TranslateArguments, settings: dict[str, Any]) -> LanguagePair:
    """The source and target language: the flags', or those of training that leave no choice.

    Raises:
        ValueError: if the model isn't for them, or they could be several.
    """
    name, asked = saved.name, (arguments.source_lang, arguments.target_lang)
    flags = " ".join(
        f"--{flag} {language}"
        for flag, language in zip(("source_lang", "target_lang"), asked, strict=True)
        if language
    )
    if "target_lang" not in settings:
        known = saved.card.get("language") or []
        known = [known] if isinstance(known, str) else known
        if not all(asked):
            raise ValueError(f"{name}: no card says which languages it translates; give --source_lang, --target_lang.")
        foreign = [language for language in asked if known and language not in known]
        if foreign:
            flag = "source_lang" if foreign[0] == asked[0] else "target_lang"
            raise ValueError(
                f"--{flag} {foreign[0]}: by its card, {name} is for {', '.join(known)}; name another model."
            )
        return cast(LanguagePair, asked)
    keys = ("source_lang", "target_lang", "both_directions")
    pairs = TranslationArguments(**{key: settings[key] for key in keys if key in settings}).pairs
    fitting = [pair for pair in pairs if all(a in (None, b) for a, b in zip(asked, pair, strict=True))]
    if len(fitting) == 1:
        return fitting[0]
    for_pairs = ", ".join(f"{source} to {target}" for source, target in fitting or pairs)
    if not fitting:
        raise ValueError(f"{flags}: {name} is for {for_pairs}; name another model.")
    raise ValueError(f"{name} is for {for_pairs}; choose by --source_lang and --target_lang.")


def check_lengths(lengths: dict[int, int], prompts: Prompts, max_positions: int | None) -> None:
    """Say which prompts are longer than in training; `lengths` is tokens by line number.

    Raises:
        ValueError: if a prompt and its translation don't fit into the model.
    """
    arguments = prompts.arguments
    for line, length in lengths.items():
        if max_positions and length >= max_positions:
            raise ValueError(
                f"line {line}: {length} prompt tokens leave no room for a translation in the model's {max_positions} "
                "positions; split the text."
            )
    long = [line for line, length in lengths.items() if length > arguments.max_source_length]
    if long:
        print(
            f"deepseek-hf: note: {len(long):,} texts (first: line {long[0]}) have more than the "
            f"{arguments.max_source_length} prompt tokens of training; expect less of them.",
            file=sys.stderr,
        )


def open_translator(
    name: str, arguments: TranslateArguments, device: Any = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, and its tokenizer; on the accelerator, if there is one and no `device` is named."""
    tokenizer = pretrained_tokenizer(arguments.model(name))
    model = fitted(pretrained_model(arguments.model(name), AutoModelForCausalLM), tokenizer).eval()
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    return model if device is None else model.to(device), tokenizer


def translate_lines(
    lines: Sequence[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    generation_config: GenerationConfig,
    batch_size: int = 32,
    report: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """One translation per line, in the lines' order; a line without text stays empty.

    Args:
        report: is told the number of texts in each batch that is done.

    Raises:
        ValueError: if a line is too long for the model.
    """
    translations = [""] * len(lines)
    rows = [row for row, line in enumerate(lines) if line.strip()]
    if not rows:
        return translations
    (pair,) = prompts.arguments.pairs
    encoded = prompts.encode_prompts([(prompts.prepared(lines[row], pair[0]), *pair) for row in rows], tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    check_lengths({row + 1: len(ids) for row, ids in zip(rows, encoded, strict=True)}, prompts, limit)
    collate = prompts.collator(tokenizer)
    lengths, most = [len(ids) for ids in encoded], generation_config.max_new_tokens
    for batch, room in batches_with_room(lengths, batch_size, most, limit):
        inputs = collate([{"prompt_ids": encoded[index], "row": rows[index]} for index in batch])
        prompt_ids, prompt_mask = inputs["prompt_ids"].to(model.device), inputs["prompt_mask"].to(model.device)
        output = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=GenerationConfig.from_dict(generation_config.to_dict() | {"max_new_tokens": room}),
            tokenizer=tokenizer,  # by which stop texts are found, a model's own too
        )
        texts = prompts.decode(output[:, prompt_ids.shape[1] :].cpu().numpy(), tokenizer)
        for index, text in zip(batch, texts, strict=True):
            translations[rows[index]] = " ".join(text.split("\n"))  # one line stays one line
        report(len(batch))
    return translations
