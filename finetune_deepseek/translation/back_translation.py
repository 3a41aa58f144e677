"""Back-translation: training pairs from text in the target language alone, by a model of the reverse direction.

Sennrich, Haddow and Birch, "Improving Neural Machine Translation Models with Monolingual Data" (2016): the source side
is the model's, the target side is real text. The pairs are made once and kept beside the text, in a file that is data
in its own right: lines of `{"translation": {...}}`.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..data.files import json_line, read_lines, write_text
from ..data.table import read_columns
from ..training.identity import content_of, identity
from ..training.saved import Saved
from .arguments import TranslateArguments, TranslationArguments
from .prompts import Prompts
from .translator import open_translator, prompts_of, translate_lines

BATCH_SIZE = 64


def back_translate(arguments: TranslationArguments) -> tuple[str, list[tuple[str, str]]]:
    """The language of --back_translation_file, and (synthetic source, line) for each line that has text.

    Raises:
        ValueError: if there is no text, or the model isn't for the reverse of one of the run's directions.
    """
    text_file, folder = Path(arguments.back_translation_file or ""), Path(arguments.back_translation_model or "")
    if not text_file.is_file():
        raise ValueError(f"--back_translation_file {text_file}: no such file.")
    lines = [line.strip() for line in read_lines(str(text_file)) if line.strip()]
    if not lines:
        raise ValueError(f"--back_translation_file {text_file}: no text.")
    if not folder.is_dir():
        raise ValueError(f"--back_translation_model {folder}: no such folder.")
    language = arguments.back_translation_lang
    if language is None and len(arguments.target_lang) == 1:
        language = arguments.target_lang[0]
    how = TranslateArguments(
        source_lang=language, target_lang=arguments.source_lang, num_beams=arguments.back_translation_beams
    )
    try:
        prompts = prompts_of(str(folder), how)
    except ValueError as error:
        raise ValueError(f"--back_translation_model (and --back_translation_lang): {error}") from error
    language = prompts.arguments.source_lang
    if language not in arguments.target_lang:
        raise ValueError(f"--back_translation_lang {language}: this run translates to none such; set --target_lang.")
    if prompts.arguments.preprocess != arguments.preprocess:
        raise ValueError(
            f"--back_translation_model {folder} was trained with --preprocess {prompts.arguments.preprocess}, this "
            f"run has {arguments.preprocess}; they must be the same."
        )
    mark = fingerprint(text_file, Saved.open("back_translation_model", str(folder)), prompts, how)
    kept = text_file.with_name(f"{text_file.name}.{folder.resolve().name}-{mark}.jsonl")
    with PartialState().main_process_first():
        if not kept.is_file():
            sources = generate(lines, folder, prompts, how, kept)
            rows = [
                {"translation": {arguments.source_lang: s, language: t}} for s, t in zip(sources, lines, strict=True)
            ]
            write_text(kept, "".join(map(json_line, rows)))
            print(f"back-translated {len(rows):,} lines of {text_file} by {folder} into {kept}")
    try:
        texts = read_columns(str(kept))["translation"]
        pairs = [(row[arguments.source_lang], row[language]) for row in texts]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{kept}: broken; remove it, and it will be made again.") from error
    return language, pairs


def fingerprint(text_file: Path, model: Saved, prompts: Prompts, how: TranslateArguments) -> str:
    """Eight digits that change with the text, the model's files, an adapter's base and the way of translating."""
    digest = hashlib.sha256(repr((prompts.arguments, how, identity(model))).encode() + content_of(text_file))
    return digest.hexdigest()[:8]


def generate(lines: Sequence[str], folder: Path, prompts: Prompts, how: TranslateArguments, kept: Path) -> list[str]:
    """The model's translation of each line."""
    if not os.access(kept.parent, os.W_OK):
        raise ValueError(f"--back_translation_file: no right to write {kept}; copy the text to a folder of yours.")
    # A run that finds the kept file doesn't come here, and must draw the same numbers later on.
    with torch.random.fork_rng(devices=[]):
        model, tokenizer = open_translator(str(folder), how, PartialState().device)
        generation_config = prompts.generation_config(tokenizer, how.num_beams)
        with tqdm(total=len(lines), desc="back-translate", unit="text") as bar:
            return translate_lines(lines, model, tokenizer, prompts, generation_config, BATCH_SIZE, report=bar.update)
