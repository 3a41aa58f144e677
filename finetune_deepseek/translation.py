"""Translation: pairs of texts in, a model that continues a prompt with the translation out.

Data has the layout of Hugging Face's run_translation, `{"translation": {"en": ..., "de": ...}}`, or two columns named
as the languages. It comes from the embedded default corpus, the Hub, or local files.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, cast

from datasets import Dataset, IterableDataset, load_dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .arguments import nearest_match
from .augmentation import AugmentationArguments, Augmenter
from .checks import Report, check_pairs, count_empty_sides, count_long_rows
from .metrics import translation_metrics
from .phrases import corpus_description, default_corpus, nearest_pair_baseline
from .run import IGNORED_LABEL, CausalCollator, Task

SPLITS = ("train", "validation", "test")
# What a trained model depends on: written into its card, and taken from there by evaluate, predict and translate.
MODEL_SETTINGS = ("source_lang", "target_lang", "prompt_template", "max_source_length", "max_target_length")
# The file name's ending gives the reader of `datasets`; each may be gzipped.
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
DEFAULT_CORPUS_ROWS = {"train": 40_000, "validation": 1_000, "test": 1_000}
SMALLEST_DEFAULT_TRAIN = 1_000  # the corpus puts all its names into the training split
STREAM_SHUFFLE_ROWS = 10_000
TOKENIZER_TRAINING_ROWS = 200_000


@dataclass
class TranslationArguments(AugmentationArguments):
    """Which pairs, in which languages, in which prompt."""

    _argument_group_name = "data"
    SOURCES = ("dataset_name", "data_dir", "train_file", "validation_file", "test_file")

    source_lang: str = field(default="en", metadata={"help": "Key of the source text in the data."})
    target_lang: str = field(default="zh", metadata={"help": "Key of the target text in the data."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set id on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, such as de-en."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with train, validation and test files."})
    train_file: str | None = field(default=None, metadata={"help": ".json, .jsonl, .csv or .parquet, also gzipped."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for --do_eval."})
    test_file: str | None = field(default=None, metadata={"help": "The same, for --do_predict."})
    streaming: bool = field(default=False, metadata={"help": "Read the training rows as they are used."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same, for validation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "The same, for test."})
    max_source_length: int = field(
        default=128,
        metadata={"help": "Tokens of a prompt. Longer rows are left out of training and cut at evaluation."},
    )
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a translation, its end included."})
    prompt_template: str = field(
        default="{target_lang}: {source}\n",
        metadata={"help": r"What the model continues; {source_lang} is known too, and \n is a new line."},
    )
    tokenizer_langs: list[str] | None = field(
        default=None,
        metadata={"help": "Further languages of the data for a tokenizer to be trained.", "metavar": "LANG"},
    )
    nearest_pair_baseline: bool = field(
        default=True, metadata={"help": "Score the nearest training pair's target beside the model (--do_predict)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source_lang == self.target_lang:
            raise ValueError(f"--source_lang and --target_lang are both {self.source_lang!r}; change one.")
        self.prompt_template = self.prompt_template.replace("\\n", "\n")
        try:
            fields = {name for _, name, _, _ in Formatter().parse(self.prompt_template) if name is not None}
        except ValueError as error:
            raise ValueError(
                f"--prompt_template {self.prompt_template!r}: {error}; write {{{{ for a brace."
            ) from error
        unknown = fields - {"source", "source_lang", "target_lang"}
        if unknown or "source" not in fields:
            raise ValueError(
                f"--prompt_template {self.prompt_template!r}: it needs {{source}}, and may have {{source_lang}} and "
                "{target_lang}, but no other name in braces."
            )
        files = any((self.train_file, self.validation_file, self.test_file))
        if sum((bool(self.dataset_name), bool(self.data_dir), files)) > 1:
            raise ValueError(
                "--dataset_name, --data_dir and the --train_file group are three ways to name data; use one."
            )
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: it must be 1 or more; leave out --do_... to skip a part.")

    @property
    def is_embedded(self) -> bool:
        return not any(getattr(self, name) for name in self.SOURCES)


def file_reader(path: str) -> str:
    """The reader of `datasets` for a file name.

    Raises:
        ValueError: for an ending that isn't in `READERS`.
    """
    ending = Path(path.removesuffix(".gz")).suffix
    if ending not in READERS:
        raise ValueError(f"{path}: unknown ending; use {', '.join(READERS)} (each may be followed by .gz).")
    return READERS[ending]


def find_files(folder: str) -> dict[str, str]:
    """The data file of each split in a folder: the names begin with train, validation (or valid, dev) and test.

    Raises:
        ValueError: if there is no such folder or file, or more than one for a split.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"--data_dir {folder}: no such folder.")
    paths = sorted(p for p in Path(folder).iterdir() if Path(p.name.removesuffix(".gz")).suffix in READERS)
    files = {}
    for split, beginnings in (("train", ("train",)), ("validation", ("valid", "dev")), ("test", ("test",))):
        found = [path for path in paths if path.name.startswith(beginnings)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"--data_dir {folder}: several files for {split} ({names}); use --{split}_file.")
        if found:
            files[split] = str(found[0])
    if not files:
        raise ValueError(f"--data_dir {folder}: no file named train, validation or test with {', '.join(READERS)}.")
    return files


def _open_text(path: str) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8")


def broken_json(path: str) -> str | None:
    """Where and how a JSON or JSON-lines file is broken, None if it isn't."""
    try:
        with _open_text(path) as file:
            if not path.removesuffix(".gz").endswith(".jsonl"):
                try:
                    json.load(file)
                    return None
                except json.JSONDecodeError as error:
                    if not error.msg.startswith("Extra data"):  # that is JSON lines in a .json file
                        return f"line {error.lineno}: broken JSON: {error.msg} (column {error.colno})"
                    file.seek(0)
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as error:
                    return f"line {number}: broken JSON: {error.msg} (column {error.colno})"
                if not isinstance(row, dict):
                    return f"line {number}: expected an object in braces, found {line.strip()[:40]!r}"
    except (OSError, EOFError, UnicodeDecodeError) as error:
        return f"can't be read as UTF-8 text: {error}"
    return None


def read_file(path: str, streaming: bool) -> Dataset | IterableDataset:
    """Open one local data file.

    Raises:
        ValueError: if it is missing, has an unknown ending, is empty, or is broken (for JSON with the line).
    """
    reader = file_reader(path)
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file.")
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        try:
            if not file.read(1):
                raise ValueError(f"{path}: the file is empty.")
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: can't be unpacked: {error}") from error
    try:
        dataset = load_dataset(reader, data_files={"train": path}, split="train", streaming=streaming)
        if streaming:
            next(iter(dataset), None)  # opening a stream reads nothing: fail here rather than in training
        return dataset
    except Exception as error:  # datasets, pyarrow and pandas each raise classes of their own
        cause = (broken_json(path) if reader == "json" else None) or str(error.__cause__ or error)
        if "corresponds to no data" in cause:
            cause = "no rows"
        raise ValueError(f"{path}{', ' if cause.startswith('line') else ': '}{' '.join(cause.split())}.") from error


def progress(dataset: Dataset | IterableDataset, label: str) -> dict[str, str]:
    """The words beside `map`'s progress bar; a stream has none."""
    return {"desc": label} if isinstance(dataset, Dataset) else {}


class Translation(Task):
    """See the module. `prompt` is what the model is given, `target` what it has to write."""

    name = "translation"
    arguments_class = TranslationArguments
    recipe = Path(__file__).with_suffix(".yaml")
    examples = """examples:
  deepseek-hf finetune translation --output_dir runs/quickstart
      both stages of the built-in recipe: English-Chinese from scratch, then a German LoRA adapter
  deepseek-hf finetune translation --preset tiny_v3 --data_dir data/multi30k_en_de --target_lang de \\
      --output_dir runs/de
      a small model from scratch on your files
  deepseek-hf finetune translation --model_name_or_path deepseek-ai/DeepSeek-V2-Lite --use_peft \\
      --lora_target attention shared --dataset_name wmt16 --dataset_config_name de-en \\
      --source_lang en --target_lang de --output_dir runs/lora
      LoRA on a pretrained model and a data set of the Hub"""

    def __init__(self, arguments: TranslationArguments, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed
        self.metrics = translation_metrics(arguments.target_lang)
        self.description = ""
        # Made here, so that a bad dictionary shows before the data are read.
        self.augmenter = Augmenter(arguments, arguments.source_lang, seed) if arguments.augment else None
        self.empty_sides: dict[str, int] = {}  # rows left out, by split

    # -- rows: {"prompt", "source", "target"} --

    def load_splits(self) -> dict[str, Dataset | IterableDataset]:
        raw = self._load_raw()
        limits = dict(zip(SPLITS, self._limits(), strict=True))
        splits = {}
        for split, dataset in raw.items():
            limit = limits[split]
            if isinstance(dataset, IterableDataset):
                dataset = dataset.take(limit) if limit else dataset
                if split != "train":  # scored splits are sorted and looked up by number
                    dataset = Dataset.from_list(list(dataset))
                else:
                    dataset = dataset.shuffle(seed=self.seed, buffer_size=STREAM_SHUFFLE_ROWS)
            elif limit:
                dataset = dataset.select(range(min(limit, len(dataset))))
            try:
                splits[split] = self._text_rows(dataset, self._where(split))
            except UnicodeDecodeError as error:  # arrow hands bytes through and decodes on use
                raise ValueError(f"{self._where(split)}: can't be read as UTF-8 text: {error}.") from error
            if isinstance(dataset, Dataset):
                self.empty_sides[split] = len(dataset) - len(cast(Dataset, splits[split]))
        return splits

    def _limits(self) -> tuple[int | None, int | None, int | None]:
        return self.arguments.max_train_samples, self.arguments.max_eval_samples, self.arguments.max_predict_samples

    def _where(self, split: str) -> str:
        """What to call a split in messages."""
        path = self._files().get(split)
        return str(path or f"{self.arguments.dataset_name or 'default corpus'}, split {split}")

    def _files(self) -> dict[str, str]:
        if self.arguments.data_dir:
            return find_files(self.arguments.data_dir)
        return {split: path for split in SPLITS if (path := getattr(self.arguments, f"{split}_file"))}

    def _load_raw(self) -> dict[str, Dataset | IterableDataset]:
        arguments = self.arguments
        if arguments.is_embedded:
            return self._default_corpus(arguments.target_lang)
        if not arguments.dataset_name:
            return {split: read_file(path, arguments.streaming) for split, path in self._files().items()}
        try:
            dataset = load_dataset(
                arguments.dataset_name, arguments.dataset_config_name, streaming=arguments.streaming
            )
        except Exception as error:  # the Hub client, datasets and pyarrow each raise classes of their own
            raise ValueError(f"--dataset_name {arguments.dataset_name}: {' '.join(str(error).split())}") from error
        known = {split: dataset[split] for split in SPLITS if split in dataset}
        if not known:
            raise ValueError(
                f"--dataset_name {arguments.dataset_name}: has the splits {', '.join(dataset)}; "
                "train, validation or test are needed."
            )
        return known

    def _default_corpus(self, target_lang: str) -> dict[str, Dataset | IterableDataset]:
        if self.arguments.source_lang != "en":
            raise ValueError(
                f"--source_lang {self.arguments.source_lang}: the default corpus translates from en; "
                "name other data with --dataset_name, --data_dir or --train_file."
            )
        train, validation, test = (
            min(limit or rows, rows) for limit, rows in zip(self._limits(), DEFAULT_CORPUS_ROWS.values(), strict=True)
        )
        corpus = default_corpus(target_lang, max(train, SMALLEST_DEFAULT_TRAIN), validation, test)
        if target_lang == self.arguments.target_lang:
            self.description = corpus_description(corpus)
        return {split: corpus[split] for split in SPLITS}

    def _text_rows(self, dataset: Dataset | IterableDataset, where: str) -> Dataset | IterableDataset:
        """Rows of plain text; rows without text in one of the languages are left out, and counted aloud.

        Raises:
            ValueError: if there are no rows, no such columns, no such language, or no row with text in both.
        """
        languages = (self.arguments.source_lang, self.arguments.target_lang)
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{where}: no rows.")
        is_nested = "translation" in first
        texts = first["translation"] if is_nested else first
        if is_nested and not isinstance(texts, dict):
            raise ValueError(f"{where}: 'translation' must hold {{language: text}}, found {str(texts)[:40]!r}.")
        for flag, language in zip(("source_lang", "target_lang"), languages, strict=True):
            if is_nested and language not in texts:
                raise ValueError(
                    f"{where}: 'translation' has no language {language!r}; it has {', '.join(texts)}. "
                    f"Set --{flag}{nearest_match(language, texts)}."
                )
            if language not in texts:
                raise ValueError(
                    f"{where}: no column 'translation' and no column {language!r}; it has {', '.join(first)}. "
                    f"Rename a column, or set --{flag}{nearest_match(language, first)}."
                )

        def convert(batch: dict[str, list]) -> dict[str, list]:
            columns = [[(row or {}).get(language) for row in batch["translation"]] if is_nested else batch[language]
                       for language in languages]  # fmt: skip
            pairs = [
                pair
                for pair in zip(*columns, strict=True)
                if all(isinstance(text, str) and text.strip() for text in pair)
            ]
            return {
                "prompt": [self.prompt(source) for source, _ in pairs],
                "source": [source for source, _ in pairs],
                "target": [target.strip() for _, target in pairs],
            }

        rows = dataset.map(convert, batched=True, remove_columns=list(first), **progress(dataset, "read"))
        if next(iter(rows), None) is None:
            raise ValueError(f"{where}: no row has text in both {languages[0]!r} and {languages[1]!r}.")
        if isinstance(rows, Dataset) and len(rows) < len(dataset):
            count = len(dataset) - len(rows)
            print(f"{where}: left out {count:,} of {len(dataset):,} rows without text in one of the languages")
        return rows

    def prompt(self, source: str) -> str:
        """The text that the model continues with the translation."""
        return self.arguments.prompt_template.format(
            source=source.strip(), source_lang=self.arguments.source_lang, target_lang=self.arguments.target_lang
        )

    def check_splits(self, splits: dict[str, Dataset | IterableDataset], tokenizer: PreTrainedTokenizerBase) -> Report:
        arguments = self.arguments
        report = check_pairs(splits, arguments.source_lang, arguments.target_lang)
        for split in report:
            rows = cast(Dataset, splits[split])
            ids = self.encode_prompts(rows["prompt"], tokenizer), self.encode_targets(rows["target"], tokenizer)
            limits = arguments.max_source_length, arguments.max_target_length
            report[split] |= count_long_rows(rows["source"], ids, limits)
            report[split] |= count_empty_sides(self.empty_sides[split])
        return report

    def tokenizer_texts(self, splits: dict[str, Dataset | IterableDataset]) -> Iterator[str]:
        for number, row in enumerate(splits["train"]):
            if number == TOKENIZER_TRAINING_ROWS:
                break
            yield row["prompt"]
            yield row["target"]
        for language in self.arguments.tokenizer_langs or []:
            yield from self._texts_in(language)

    def _texts_in(self, language: str) -> Iterator[str]:
        """Training texts in a language that the model doesn't translate to yet."""
        if self.arguments.is_embedded:
            train = self._default_corpus(language)["train"]
        elif "train" in (files := self._files()):
            train = read_file(files["train"], self.arguments.streaming)
        else:
            raise ValueError("--tokenizer_langs works with the default corpus and local files only.")
        for number, row in enumerate(train):
            texts = row.get("translation", row)
            if number == 0 and language not in texts:
                raise ValueError(f"--tokenizer_langs {language}: the data has {', '.join(texts)}.")
            if number == TOKENIZER_TRAINING_ROWS:
                break
            if texts[language]:
                yield texts[language]
                yield f"{language}:"  # as the prompt will name it

    # -- features --

    def _augmented(self, rows: Dataset | IterableDataset, augmenter: Augmenter) -> Dataset | IterableDataset:
        """Every training row, followed by its copies with a changed source."""

        def extend(batch: dict[str, list[str]]) -> dict[str, list[str]]:
            pairs = [
                (text, target)
                for source, target in zip(batch["source"], batch["target"], strict=True)
                for text in (source, *augmenter(source))
            ]
            return {
                "prompt": [self.prompt(source) for source, _ in pairs],
                "source": [source for source, _ in pairs],
                "target": [target for _, target in pairs],
            }

        extended = rows.map(extend, batched=True, **progress(rows, "augment"))
        if isinstance(rows, Dataset):
            print(f"augmented {len(rows):,} training rows by {len(extended) - len(rows):,}: {augmenter}")
        return extended

    def encode_prompts(self, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        end = tokenizer.eos_token_id
        # Some tokenizers end every text.
        return [ids[:-1] if ids[-1] == end else ids for ids in tokenizer(list(prompts))["input_ids"]]

    def encode_targets(self, targets: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        encoded = tokenizer(list(targets), add_special_tokens=False)
        return [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]

    def features(
        self, rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, is_training: bool
    ) -> Dataset | IterableDataset:
        """Token ids of prompt + target + end, with the loss on the target only.

        Gives `input_ids`, `labels`, `length`; for evaluation also `prompt_ids`. For training, rows over the length
        limits are left out; before that, the copies that --augment asks for are added.
        """
        arguments = self.arguments
        if is_training and self.augmenter:
            rows = self._augmented(rows, self.augmenter)

        def encode(batch: dict[str, list[str]]) -> dict[str, list]:
            prompts = self.encode_prompts(batch["prompt"], tokenizer)
            pairs = list(zip(prompts, self.encode_targets(batch["target"], tokenizer), strict=True))
            if is_training:
                pairs = [
                    (prompt, target)
                    for prompt, target in pairs
                    if len(prompt) <= arguments.max_source_length and len(target) <= arguments.max_target_length
                ]
            else:
                pairs = [(p[: arguments.max_source_length], t[: arguments.max_target_length]) for p, t in pairs]
            features: dict[str, list] = {
                "input_ids": [prompt + target for prompt, target in pairs],
                "labels": [[IGNORED_LABEL] * len(prompt) + target for prompt, target in pairs],
                "length": [len(prompt) + len(target) for prompt, target in pairs],
            }
            return features if is_training else features | {"prompt_ids": [prompt for prompt, _ in pairs]}

        remove = ["prompt", "source", "target"]
        features = rows.map(encode, batched=True, remove_columns=remove, **progress(rows, "tokenize"))
        if isinstance(rows, Dataset) and len(features) < len(rows):
            print(
                f"left out {len(rows) - len(features):,} of {len(rows):,} training rows over --max_source_length "
                f"{arguments.max_source_length} or --max_target_length {arguments.max_target_length}"
            )
            if not len(features):
                raise ValueError("Every training row is over --max_source_length or --max_target_length; raise them.")
        return features

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> CausalCollator:
        return CausalCollator(cast(int, tokenizer.pad_token_id))

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.arguments.max_target_length,
            num_beams=num_beams,
            do_sample=False,
            use_cache=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    # -- scores and reports --

    def score(self, predictions: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.metrics.compute(predictions=predictions, references=[row["target"] for row in rows])

    def baseline(self, train: Dataset | IterableDataset | None, rows: list[dict[str, Any]]) -> list[str] | None:
        if not self.arguments.nearest_pair_baseline or not isinstance(train, Dataset):
            return None
        return nearest_pair_baseline(train["source"], train["target"], [row["source"] for row in rows])

    def _local_name(self) -> str:
        """The names of local data without their folders, which are nobody else's business."""
        arguments = self.arguments
        paths = (arguments.data_dir, arguments.train_file, arguments.validation_file, arguments.test_file)
        return ", ".join(Path(path).name for path in paths if path)

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        return {
            "language": [arguments.source_lang, arguments.target_lang],
            "pipeline_tag": "translation",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": {"bleu": ("sacrebleu", "BLEU"), "chrf2": ("chrf", "chrF2"),
                        "exact_match": ("exact_match", "exact match")},
            "dataset_name": arguments.dataset_name or self._local_name() or "CLDR phrases (embedded)",
            "baseline": "nearest training pair",
            "title": f"{arguments.source_lang} to {arguments.target_lang} translation",
            "prompt": self.prompt("Hello."),
            "data": self.description,
            "preprocessing": f"prompt {arguments.prompt_template!r}, loss on the target only, at most "
            f"{arguments.max_source_length} prompt and {arguments.max_target_length} target tokens"
            + (f"; in training {self.augmenter}" if self.augmenter else ""),
            "settings": {"task": self.name} | {name: getattr(arguments, name) for name in MODEL_SETTINGS},
        }  # fmt: skip
