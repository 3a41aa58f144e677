"""Translation: pairs of texts in, a model that continues a prompt with the translation out.

Data has the layout of Hugging Face's run_translation, `{"translation": {"en": ..., "de": ...}}`, or columns named as
the languages. It comes from the embedded default corpus, the Hub, or local files. One model may translate into several
languages, and back: the prompt names the language, a row gives a pair for each language that it has.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.arguments import SPLITS
from ..data.fault_report import Report, merged
from ..data.languages import hub_codes
from ..data.mapped import NESTED, text_rows
from ..data.pair_checks import check_pairs, count_empty_sides, count_long_rows
from ..data.sources import Part, Rows, joined, named, open_splits, progress, split_files
from ..data.words import nearest_match
from ..training.optimization import IGNORED_LABEL
from ..training.task import Task, lower
from .arguments import LanguagePair, TranslationArguments
from .augmentation import Augmenter
from .back_translation import back_translate
from .metrics import translation_metrics
from .moses import signature
from .phrases import corpus_description, default_corpus, nearest_pair_baseline
from .prompts import Prompts

COLUMNS = ("prompt", "source", "target", "source_lang", "target_lang")
DEFAULT_CORPUS_ROWS = {"train": 40_000, "validation": 1_000, "test": 1_000}
SMALLEST_DEFAULT_TRAIN = 1_000  # the corpus puts all its names into the training split
TOKENIZER_TRAINING_ROWS = 200_000


class Layout(NamedTuple):
    """What a part of the data looks like."""

    columns: list[str]
    is_nested: bool  # in a column `translation`, rather than a column per language
    targets: list[str]  # target languages that the rows have


def languages_of(row: dict[str, Any]) -> LanguagePair:
    return row["source_lang"], row["target_lang"]


class Translation(Prompts, Task):
    """See the module. `prompt` is what the model is given, `target` what it has to write."""

    arguments_class = TranslationArguments
    next_command = "deepseek-hf translate {folder} --input FILE"

    def __init__(self, arguments: TranslationArguments, seed: int) -> None:
        super().__init__(arguments)
        self.seed = seed
        self.metrics = {
            target: translation_metrics(target, arguments.tokenized_bleu, self.is_prepared)
            for _, target in arguments.pairs
        }
        self.description = ""
        # Made here, so that a bad dictionary shows before the data are read.
        self.augmenters = {
            source: Augmenter(arguments, source, seed) for source, _ in arguments.pairs if arguments.augment
        }
        self.back_translation = ""  # what the card says of it
        self.empty_sides: Counter[str] = Counter()  # rows left out, by split

    # -- rows: COLUMNS --

    def load_splits(self) -> dict[str, Rows]:
        if self.arguments.is_embedded:
            raw = self._default_corpus(self.arguments.target_lang)
        else:
            raw = open_splits(self.arguments, self.arguments.languages, self.arguments.streaming)
        splits = {}
        for split, parts in raw.items():
            rows, languages = [], set()
            for part in parts:
                layout = self._layout(part)
                rows.append(self._text_rows(part, layout, split))
                languages |= set(layout.targets)
            absent = [language for language in self.arguments.target_lang if language not in languages]
            if absent and split == "train":
                raise ValueError(
                    f"--target_lang {absent[0]}: {named(parts)} has only {', '.join(sorted(languages))} beside "
                    f"{self.arguments.source_lang!r}; add data, or leave it out."
                )
            if split == "train" and self.arguments.back_translation_file:
                synthetic = self._back_translated()
                rows.append(synthetic if isinstance(rows[0], Dataset) else synthetic.to_iterable_dataset())
            splits[split] = joined(rows, self.seed)
            self._print_pairs(splits[split], split)
        return splits

    def _default_corpus(self, languages: list[str]) -> dict[str, list[Part]]:
        if self.arguments.source_lang != "en":
            raise ValueError(
                f"--source_lang {self.arguments.source_lang}: the default corpus translates from en; "
                "name other data with --dataset_name, --data_dir or --train_file."
            )
        limits = self.arguments.limits
        train, validation, test = (min(limits[split] or rows, rows) for split, rows in DEFAULT_CORPUS_ROWS.items())
        raw: dict[str, list[Part]] = {split: [] for split in SPLITS}
        descriptions = []
        for language in languages:
            corpus = default_corpus(language, max(train, SMALLEST_DEFAULT_TRAIN), validation, test)
            descriptions.append(corpus_description(corpus))
            for split, parts in raw.items():
                parts.append(Part(f"default corpus, split {split}", corpus[split], next(iter(corpus[split]))))
        if languages == self.arguments.target_lang:
            self.description = "\n".join(descriptions)
        return raw

    def _text_rows(self, part: Part, layout: Layout, split: str) -> Rows:
        """Rows of plain text; rows without text in one of the languages are left out, and counted aloud.

        Raises:
            ValueError: if no row has text in both.
        """
        source_lang, both_directions = self.arguments.source_lang, self.arguments.both_directions
        targets, is_nested = layout.targets, layout.is_nested

        def pairs_of(texts: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
            """Source, target and their languages; empty texts for a row that has no pair, or half of one.

            Where the data have several languages, a row needs not have them all.
            """
            if texts.get(source_lang) is None or all(texts.get(target) is None for target in targets):
                yield "", "", source_lang, ""
                return
            for target_lang in targets:
                source, target = texts[source_lang], texts.get(target_lang)
                if target is None:
                    continue
                if not all(isinstance(text, str) and text.strip() for text in (source, target)):
                    yield "", "", source_lang, target_lang
                    continue
                source, target = self.prepared(source, source_lang), self.prepared(target, target_lang)
                yield source, target.strip(), source_lang, target_lang
                if both_directions:
                    yield target, source.strip(), target_lang, source_lang

        def convert(batch: dict[str, list]) -> dict[str, list]:
            columns = {name: batch[name] for name in ([NESTED] if is_nested else [source_lang, *targets])}
            rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
            found = [pair for row in rows for pair in pairs_of((row[NESTED] or {}) if is_nested else row)]
            return self._columns(found)

        def has_text(batch: dict[str, list]) -> list[bool]:
            return [bool(source) for source in batch["source"]]

        words = progress(part.rows, "read")
        everything = part.rows.map(convert, batched=True, remove_columns=layout.columns, **words)
        rows = everything.filter(has_text, batched=True, **words)
        if next(iter(rows), None) is None:
            raise ValueError(
                f"{part.where}: no row has text in both {source_lang!r} and {' or '.join(map(repr, targets))}."
            )
        if isinstance(rows, Dataset):
            count = len(everything) - len(rows)
            self.empty_sides[split] += count
            if not count:
                return everything  # a filtered data set is slower to read
            print(f"{part.where}: left out {count:,} of {len(everything):,} rows without text in one of the languages")
        else:
            print(f"{part.where}: a stream, so its faults aren't counted; rows without text or too long are left out")
        return rows

    def _back_translated(self) -> Dataset:
        """Rows from --back_translation_file: real targets, and sources by the reverse model, as it writes them."""
        arguments = self.arguments
        language, pairs = back_translate(arguments)
        rows = [(s, self.prepared(t, language), arguments.source_lang, language) for s, t in pairs if s.strip()]
        text_file, model = (
            Path(path).resolve().name
            for path in (arguments.back_translation_file, arguments.back_translation_model)
            if path
        )
        self.back_translation = f"{len(rows):,} training rows back-translated from {text_file} by {model}"
        print(
            self.back_translation
            + f", without {len(pairs) - len(rows):,} lines that became nothing" * (len(rows) < len(pairs))
        )
        return Dataset.from_dict(self._columns(rows))

    def _layout(self, part: Part) -> Layout:
        """How the rows of a part hold their texts.

        Raises:
            ValueError: if there are no rows, or they don't have the source and a target language.
        """
        first = part.first
        if first is None:
            raise ValueError(f"{part.where}: no rows.")
        is_nested = NESTED in first
        texts = first[NESTED] if is_nested else first
        if is_nested and not isinstance(texts, dict):
            raise ValueError(f"{part.where}: {NESTED!r} must hold {{language: text}}, found {str(texts)[:40]!r}.")
        targets = [language for language in self.arguments.target_lang if language in texts]
        missing = {"source_lang": self.arguments.source_lang not in texts and self.arguments.source_lang,
                   "target_lang": not targets and self.arguments.target_lang[0]}  # fmt: skip
        for flag, language in missing.items():
            if language and is_nested:
                raise ValueError(
                    f"{part.where}: 'translation' has no language {language!r}; it has {', '.join(texts)}. "
                    f"Set --{flag}{nearest_match(language, texts)}."
                )
            if language:
                raise ValueError(
                    f"{part.where}: no column 'translation' and no column {language!r}; it has {', '.join(first)}. "
                    f"Rename a column, or set --{flag}{nearest_match(language, first)}."
                )
        columns = part.rows.column_names or list(first)
        return Layout(columns, NESTED in columns, targets)

    def _print_pairs(self, rows: Rows, split: str) -> None:
        if len(self.arguments.pairs) > 1 and isinstance(rows, Dataset):
            counts = Counter(zip(rows["source_lang"], rows["target_lang"], strict=True))
            print(f"{split}: " + ", ".join(f"{counts[pair]:,} {'-'.join(pair)}" for pair in self.arguments.pairs))

    def _columns(self, pairs: list[tuple[str, str, str, str]]) -> dict[str, list[str]]:
        """`COLUMNS` from source, target, source language and target language."""
        rows = [(self.prompt(source, *languages), source, target, *languages) for source, target, *languages in pairs]
        return {name: [row[number] for row in rows] for number, name in enumerate(COLUMNS)}

    def _of_pair(self, rows: Dataset, pair: LanguagePair) -> Dataset:
        if len(self.arguments.pairs) == 1:
            return rows

        def is_pair(sources: list[str], targets: list[str]) -> list[bool]:
            return [found == pair for found in zip(sources, targets, strict=True)]

        columns = ["source_lang", "target_lang"]
        return rows.filter(is_pair, batched=True, input_columns=columns, desc="-".join(pair))

    def check_splits(self, splits: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> Report:
        arguments = self.arguments
        whole = {split: rows for split, rows in splits.items() if isinstance(rows, Dataset)}
        report = merged(
            check_pairs({split: self._of_pair(rows, pair) for split, rows in whole.items()}, *pair)
            for pair in arguments.pairs
        )
        for split, rows in whole.items():
            prompts = zip(rows["source"], rows["source_lang"], rows["target_lang"], strict=True)
            ids = self.encode_prompts(prompts, tokenizer), self.encode_targets(rows["target"], tokenizer)
            limits = arguments.max_source_length, arguments.max_target_length
            report[split] |= count_long_rows(rows["source"], ids, limits)
            report[split] |= count_empty_sides(self.empty_sides[split])
        return report

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        rows = splits["train"]
        if isinstance(rows, Dataset) and len(rows) > TOKENIZER_TRAINING_ROWS:
            rows = rows.shuffle(seed=self.seed)  # the languages stand one after the other
        for number, row in enumerate(rows):
            if number == TOKENIZER_TRAINING_ROWS:
                break
            yield row["prompt"]
            yield row["target"]
        for language in self.arguments.tokenizer_langs or []:
            yield from self._texts_in(language)

    def _texts_in(self, language: str) -> Iterator[str]:
        """Training texts in a language that the model doesn't translate to yet."""
        if self.arguments.is_embedded:
            parts = self._default_corpus([language])["train"]
        elif paths := split_files(self.arguments).get("train"):
            parts = [Part(path, *text_rows(path, [language], self.arguments.streaming)) for path in paths]
        else:
            raise ValueError("--tokenizer_langs works with the default corpus and local files only.")
        languages: dict[str, None] = {}
        for part in parts:
            first = part.first or {}
            languages |= dict.fromkeys(first.get(NESTED, first))
            for number, row in enumerate(part.rows):
                text = row.get(NESTED, row).get(language)
                if number == TOKENIZER_TRAINING_ROWS:
                    break
                if text:
                    yield self.prepared(text, language)
                    yield f"{language}:"  # as the prompt will name it
        if language not in languages:
            raise ValueError(f"--tokenizer_langs {language}: the data has {', '.join(languages)}.")

    # -- features --

    def _augmented(self, rows: Rows) -> Rows:
        """Every training row, followed by its copies with a changed source."""

        def extend(batch: dict[str, list[str]]) -> dict[str, list[str]]:
            return self._columns(
                [
                    (text, target, *languages)
                    for source, target, *languages in zip(*(batch[name] for name in COLUMNS[1:]), strict=True)
                    for text in (source, *self.augmenters[languages[0]](source))
                ]
            )

        extended = rows.map(extend, batched=True, **progress(rows, "augment"))
        if isinstance(rows, Dataset):
            added = len(extended) - len(rows)
            print(f"augmented {len(rows):,} training rows by {added:,}: {self._augmentation()}")
        return extended

    def _augmentation(self) -> str:
        return str(self.augmenters[self.arguments.source_lang])

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prompt and translation together: a translation gets half at most, the prompt the rest."""
        lower(self.arguments, positions, max_target_length=max(1, positions // 2))
        lower(self.arguments, positions, max_source_length=positions - self.arguments.max_target_length)

    def _check_prompts(self, rows: Rows) -> None:
        """Rows of --adapter_off_check bring the prompts of another run, whose answers are none of this one's.

        Raises:
            ValueError: naming both prompts.
        """
        for row in rows:
            made = self.prompt(row["source"], row["source_lang"], row["target_lang"])
            if row.get("prompt", made) != made:
                raise ValueError(
                    f"--adapter_off_check: the base was asked by {row['prompt']!r}, this run asks by {made!r}, and "
                    "outputs would differ without a fault; give the base's --prompt_template, or leave the check out."
                )

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Token ids of prompt + target + end, with the loss on the target only.

        Gives `input_ids`, `labels`, `length`; for evaluation also `prompt_ids`. For training, rows over the length
        limits are left out; before that, the copies that --augment asks for are added.
        """
        arguments = self.arguments
        if is_training and self.augmenters:
            rows = self._augmented(rows)
        if not is_training:
            self._check_prompts(rows)

        def encode(batch: dict[str, list[str]]) -> dict[str, list]:
            sources = zip(batch["source"], batch["source_lang"], batch["target_lang"], strict=True)
            prompts = self.encode_prompts(sources, tokenizer)
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

        columns = list(rows.column_names or COLUMNS)
        features = rows.map(encode, batched=True, remove_columns=columns, **progress(rows, "tokenize"))
        if isinstance(rows, Dataset) and len(features) < len(rows):
            print(
                f"left out {len(rows) - len(features):,} of {len(rows):,} training rows over --max_source_length "
                f"{arguments.max_source_length} or --max_target_length {arguments.max_target_length}"
            )
            if not len(features):
                raise ValueError("Every training row is over --max_source_length or --max_target_length; raise them.")
        return features

    # -- scores and reports --

    def score(self, predictions: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Scores of the pair; of several pairs, each one's under `NAME_en-de` and their mean under NAME."""
        by_pair = {}
        for pair in self.arguments.pairs:
            numbers = [number for number, row in enumerate(rows) if languages_of(row) == pair]
            if numbers:
                by_pair["-".join(pair)] = self.metrics[pair[1]].compute(
                    predictions=[predictions[number] for number in numbers],
                    references=[rows[number]["target"] for number in numbers],
                )
        if len(self.arguments.pairs) == 1:
            return next(iter(by_pair.values()))
        scores: dict[str, Any] = {}
        for name, value in next(iter(by_pair.values())).items():
            of_pairs = {f"{name}_{pair}": found[name] for pair, found in by_pair.items()}
            if isinstance(value, str):
                base = name.removesuffix("_signature")
                of_pairs = {f"{base}_{pair}_signature": found[name] for pair, found in by_pair.items()}
                scores |= {name: f"mean over {', '.join(by_pair)}"} | of_pairs
            else:
                scores |= {name: sum(of_pairs.values()) / len(of_pairs)} | of_pairs
        return scores

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[str] | None:
        if not self.arguments.nearest_pair_baseline or not isinstance(train, Dataset):
            return None
        nearest = [""] * len(rows)
        for pair in self.arguments.pairs:
            known = self._of_pair(train, pair)
            numbers = [number for number, row in enumerate(rows) if languages_of(row) == pair]
            if numbers and len(known):
                sources = [rows[number]["source"] for number in numbers]
                found = nearest_pair_baseline(known["source"], known["target"], sources)
                for number, text in zip(numbers, found, strict=True):
                    nearest[number] = text
        return nearest

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        metrics = {"bleu": ("sacrebleu", "BLEU"), "bleu_tokenized": ("bleu", "tokenised BLEU"),
                   "chrf2": ("chrf", "chrF2"), "exact_match": ("exact_match", "exact match")}  # fmt: skip
        if len(arguments.pairs) > 1:
            of_pairs = {
                f"{name}_{'-'.join(pair)}": (metric, f"{label} {'-'.join(pair)}")
                for pair in arguments.pairs
                for name, (metric, label) in metrics.items()
            }
            metrics = {name: (metric, f"{label}, mean") for name, (metric, label) in metrics.items()} | of_pairs
        return {
            "language": hub_codes(arguments.languages),
            "pipeline_tag": "translation",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": metrics,
            "dataset_name": arguments.data_name or "CLDR phrases (embedded)",
            "baseline": "nearest training pair",
            "title": " and ".join(f"{source} to {target}" for source, target in arguments.pairs) + " translation",
            "prompt": self.prompt(self.prepared("Hello.", arguments.pairs[0][0]), *arguments.pairs[0]),
            "data": self.description,
            "preprocessing": f"prompt {arguments.prompt_template!r}, loss on the target only, at most "
            f"{arguments.max_source_length} prompt and {arguments.max_target_length} target tokens"
            + (f"; in training {self._augmentation()}" if self.augmenters else "")
            + (f"; {self.back_translation}" if self.back_translation else "")
            + "".join(f"; {signature(language)}" for language in arguments.languages if self.is_prepared),
        }
