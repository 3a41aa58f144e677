"""`deepseek-hf translate`: lines of text in, their translations out, by a model or adapter of the translation task.

The prompt, the languages and the length of a translation are those of the model's card, so the model is asked as it
was in training.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..commands.flags import parse_verb
from ..data.files import read_lines, write_text
from ..training import model_card
from ..training.arguments import ModelArguments
from ..training.batches import batches_by_length
from ..training.loading import load_model, load_tokenizer
from .task import MODEL_SETTINGS, LanguagePair, Translation, TranslationArguments

EXAMPLES = """examples:
  deepseek-hf translate runs/en-de --input english.txt --output german.txt
  echo "two birds" | deepseek-hf translate runs/en-de --num_beams 5"""


@dataclass
class TranslateArguments:
    """What to translate, and how to search."""

    input: str | None = field(
        default=None, metadata={"help": "UTF-8 file with one text per line; without it, standard input."}
    )
    output: str | None = field(default=None, metadata={"help": "File for as many lines; without it, standard output."})
    source_lang: str | None = field(
        default=None, metadata={"help": "Language to translate from; without it, the one in the model's card."}
    )
    target_lang: str | None = field(default=None, metadata={"help": "The same, to translate to."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "As in training; needed only for a model whose card doesn't have it."}
    )
    num_beams: int = field(default=1, metadata={"help": "Width of beam search; 1 is greedy search."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "With beams: below 1 prefers shorter translations, above 1 longer ones."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Tokens of a translation; without it, as in training."}
    )
    batch_size: int = field(default=32, metadata={"help": "Texts that are translated at once."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights; auto takes the checkpoint's."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with a Hub model."})

    def __post_init__(self) -> None:
        for name in ("num_beams", "batch_size", "max_target_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: it must be 1 or more.")
        if self.length_penalty != 1 and self.num_beams == 1:
            raise ValueError("--length_penalty has no effect without beams; add --num_beams 5, say.")

    def model(self, name: str) -> ModelArguments:
        return ModelArguments(
            model_name_or_path=name,
            model_revision=self.model_revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


def parse(argv: Sequence[str]) -> tuple[str, TranslateArguments]:
    """The model and the arguments.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    return parse_verb("translate", TranslateArguments, argv, "MODEL [--flag value ...]", EXAMPLES)


def make_task(name: str, arguments: TranslateArguments) -> Translation:
    """The translation task as the model was trained for it, by its card and the flags.

    Raises:
        ValueError: if the card has other languages than the flags, or neither has any.
    """
    settings = model_card.run_settings(name, arguments.model_revision, Translation.name)
    settings = {key: value for key, value in settings.items() if key in MODEL_SETTINGS}
    settings["source_lang"], settings["target_lang"] = language_pair(name, arguments, settings)
    settings["both_directions"] = False
    given = ("prompt_template", "max_target_length")
    settings |= {key: value for key in given if (value := getattr(arguments, key)) is not None}
    return Translation(TranslationArguments(**settings), seed=0)


def language_pair(name: str, arguments: TranslateArguments, settings: dict[str, Any]) -> LanguagePair:
    """The source and target language: the flags', or those of the card that leave no choice.

    Raises:
        ValueError: if the model isn't for them, or they could be several.
    """
    asked = arguments.source_lang, arguments.target_lang
    flags = " ".join(
        f"--{flag} {language}"
        for flag, language in zip(("source_lang", "target_lang"), asked, strict=True)
        if language
    )
    if "target_lang" not in settings:
        known = model_card.read(name, arguments.model_revision).get("language") or []
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
        raise ValueError(f"{flags}: by its card, {name} is for {for_pairs}; name another model.")
    raise ValueError(f"{name} is for {for_pairs}; choose by --source_lang and --target_lang.")


def check_lengths(lengths: dict[int, int], task: Translation, max_positions: int | None) -> None:
    """Say which prompts are longer than in training; `lengths` is tokens by line number.

    Raises:
        ValueError: if a prompt and its translation don't fit into the model.
    """
    arguments = task.arguments
    for line, length in lengths.items():
        if max_positions and length + arguments.max_target_length > max_positions:
            raise ValueError(
                f"line {line}: {length} prompt tokens and a translation of up to {arguments.max_target_length} are "
                f"more than the model's {max_positions}; split the text, or lower --max_target_length."
            )
    long = [line for line, length in lengths.items() if length > arguments.max_source_length]
    if long:
        print(
            f"deepseek-hf: note: {len(long):,} texts (first: line {long[0]}) have more than the "
            f"{arguments.max_source_length} prompt tokens of training; expect less of them.",
            file=sys.stderr,
        )


def translate_lines(
    lines: Sequence[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Translation,
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
    (pair,) = task.arguments.pairs
    prompts = [task.prompt(task.prepared(lines[row], pair[0]), *pair) for row in rows]
    encoded = task.encode_prompts(prompts, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    check_lengths({row + 1: len(ids) for row, ids in zip(rows, encoded, strict=True)}, task, limit)
    collate = task.collator(tokenizer)
    for batch in batches_by_length([len(ids) for ids in encoded], batch_size):
        inputs = collate([{"prompt_ids": encoded[index], "row": rows[index]} for index in batch])
        prompt_ids, prompt_mask = inputs["prompt_ids"].to(model.device), inputs["prompt_mask"].to(model.device)
        output = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=generation_config,
            **({"tokenizer": tokenizer} if generation_config.stop_strings else {}),
        )
        texts = task.decode(output[:, prompt_ids.shape[1] :].cpu().numpy(), tokenizer)
        for index, text in zip(batch, texts, strict=True):
            translations[rows[index]] = " ".join(text.split("\n"))  # one line stays one line
        report(len(batch))
    return translations


def translate(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf translate` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, arguments = parse(argv)
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise ValueError(f"--output {arguments.output}: there is no such folder to write to.")
    task = make_task(name, arguments)
    lines = read_lines(arguments.input)
    disable_progress_bar()  # the bar of loading weights; ours counts texts
    tokenizer = load_tokenizer(arguments.model(name), task, {}, None)
    model = load_model(arguments.model(name), task, tokenizer, {}, is_trained=False).eval()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    generation_config = task.generation_config(tokenizer, arguments.num_beams)
    generation_config.length_penalty = arguments.length_penalty
    count = sum(1 for line in lines if line.strip())
    with tqdm(total=count, desc="translate", unit="text", file=sys.stderr) as bar:
        texts = translate_lines(
            lines, model, tokenizer, task, generation_config, arguments.batch_size, report=bar.update
        )
    content = "".join(text + "\n" for text in texts)
    if arguments.output:
        write_text(Path(arguments.output), content)
    else:
        sys.stdout.buffer.write(content.encode("utf-8"))
        sys.stdout.flush()
