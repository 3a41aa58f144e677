"""Generative recommendation: items are written as the digits of semantic IDs, and a language model of those digits
writes the next one (TIGER, Rajput et al., arXiv 2305.05065).

Item vectors are quantized to codes (residual_quantizer.py); the vocabulary is a padding, a start and one token per
level and digit. A history is a start and its items' digits; beam search through the trie of all codes (trie.py) writes
only items that there are and that the user hasn't seen. Data, baselines and scores are those of recommendation.py;
items outside of the beam rank behind those in it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from modeling_deepseek.item_ranking import allowed_items, pad_histories

from ..data.files import write_text
from ..data.sources import Rows
from ..training import model_card
from ..training.arguments import ModelArguments
from ..training.loading import named_source
from ..training.optimization import IGNORED_LABEL
from ..training.task import CausalCollator
from .arguments import RecommendationArguments
from .item_vectors import neighbour_vectors, read_item_vectors
from .items.catalogue import PADDING, PADDING_TOKEN
from .items.quantizer import distinct_codes, residual_codes
from .items.titles import read_titles, with_titles
from .items.trie import CodeTrie, beam_items
from .recommender import Recommender
from .scores import target_ranks
from .task import Recommendation

# Letters: B users, M beams, N items, L digits.
START, START_TOKEN = 1, "<start>"
CODES_FILE = "semantic_ids.json"


@dataclass
class GenerativeRecommendationArguments(RecommendationArguments):
    """Which interactions, and the vectors that the items' codes are made of."""

    item_vectors: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a trained recommender or embedding model, or a .npy or .safetensors file of a matrix; "
            "without it, vectors of which items stand near each other in the training histories."
        },
    )
    item_ids_file: str | None = field(
        default=None, metadata={"help": "Whose the rows of a matrix are: a JSON list, or a text with an id per line."}
    )
    titles_file: str | None = field(
        default=None, metadata={"help": "File of --item_column and --title_column, for an embedding model to read."}
    )
    title_column: str = field(default="title", metadata={"help": "Column of the title."})
    num_levels: int = field(default=3, metadata={"help": "Digits of a code, without the one that tells twins apart."})
    codebook_size: int = field(default=256, metadata={"help": "Values of each digit."})
    num_beams: int = field(default=20, metadata={"help": "Items that beam search ends with."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_levels", 1), ("codebook_size", 2), ("num_beams", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be {least} or more.")
        if self.items_file:
            raise ValueError("--items_file: texts come in by --titles_file and an embedding model as --item_vectors.")
        if flags := self.feature_flags:
            raise ValueError(f"--{flags[0]}: a generative recommender reads no features; leave it out.")
        if self.sasrec:
            raise ValueError("--sasrec: train it by `finetune recommendation`, and name its folder in --compare_with.")


class SemanticIdTokenizer(PreTrainedTokenizerFast):
    """Digits as tokens, and the catalogue: `items`, in the order of their `codes`.

    Item number n, 0 being the padding, is `items[n - 1]`; `first_tokens[l]` is the token of digit 0 at level l.
    """

    items: list[str]
    codes: torch.Tensor  # [N, L]
    first_tokens: list[int]

    @classmethod
    def of_codes(cls, items: Sequence[str], codes: np.ndarray) -> "SemanticIdTokenizer":
        """The tokenizer of a catalogue with distinct codes [N, L]."""
        order = np.lexsort(codes.T[::-1])
        tokens = [f"<{level}:{digit}>" for level, top in enumerate(codes.max(0)) for digit in range(top + 1)]
        vocabulary = {token: number for number, token in enumerate([PADDING_TOKEN, START_TOKEN, *tokens])}
        tokenizer = cls(
            tokenizer_object=Tokenizer(WordLevel(vocabulary)), pad_token=PADDING_TOKEN, bos_token=START_TOKEN
        )
        tokenizer.set_catalogue([items[number] for number in order], torch.from_numpy(codes[order]))
        return tokenizer

    # Not by an __init__ of our own: from_pretrained would give such a class further tokens.
    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, revision: str = "main", **kwargs: Any) -> "SemanticIdTokenizer":  # type: ignore[override]
        """From a folder or the Hub.

        Raises:
            OSError: if it has no codes of items.
        """
        tokenizer = super().from_pretrained(name, *args, revision=revision, **kwargs)
        content = json.loads(Path(str(cached_file(name, CODES_FILE, revision=revision))).read_text(encoding="utf-8"))
        tokenizer.set_catalogue(content["items"], torch.tensor(content["codes"]))
        return tokenizer

    def set_catalogue(self, items: list[str], codes: torch.Tensor) -> None:
        self.items, self.codes = items, codes
        sizes = (codes.max(0).values + 1).tolist()
        self.first_tokens = [START + 1 + sum(sizes[:level]) for level in range(len(sizes))]
        self.item_tokens = (codes + torch.tensor(self.first_tokens)).tolist()

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        path = Path(save_directory) / CODES_FILE
        write_text(path, json.dumps({"items": self.items, "codes": self.codes.tolist()}, ensure_ascii=False))
        return super()._save_pretrained(save_directory, (*file_names, str(path)), *args, **kwargs)

    @property
    def numbers(self) -> dict[str, int]:
        """Item numbers by id, the padding's too, as item_tokenizer's vocabulary."""
        return {PADDING_TOKEN: PADDING} | {item: number for number, item in enumerate(self.items, start=1)}

    def history(self, numbers: Iterable[int]) -> list[int]:
        """The tokens of a history of item numbers."""
        return [START, *(token for number in numbers for token in self.item_tokens[number - 1])]


class SemanticIdCollator(CausalCollator):
    """Histories on the right for training; for evaluation on the left, with the target's digits and the seen items."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "target" not in features[0]:
            return super().__call__(features)
        batch = {
            "target": torch.tensor([f["target"] for f in features]),
            "row": torch.tensor([f["row"] for f in features]),
        }
        batch["target_ids"] = torch.tensor([f["target_ids"] for f in features])
        batch["input_ids"], batch["attention_mask"] = self._pad([f["input_ids"] for f in features], left=True)
        batch["seen"], _ = self._pad([f["seen"] for f in features])
        return batch


def choosable_items(seen: torch.Tensor, num_items: int) -> torch.Tensor:
    """[B, N] booleans: items whose numbers aren't in `seen` [B, S], filled up with the padding."""
    left = torch.ones(len(seen), num_items + 1, dtype=torch.bool, device=seen.device)
    return left.scatter_(1, seen, False)[:, 1:]


class GenerativeRecommendation(Recommendation):
    """See the module. Rows are those of `Recommendation`."""

    name = "generative_recommendation"
    arguments_class = GenerativeRecommendationArguments
    arguments: GenerativeRecommendationArguments
    auto_class: Any = AutoModelForCausalLM
    tokenizer_class = SemanticIdTokenizer
    peft_task_type = "CAUSAL_LM"
    recipe = Path(__file__).parents[1] / "examples" / "generative_recommendation.yaml"
    examples = """examples:
  deepseek-hf finetune generative_recommendation
      the built-in recipe on simulated users, with prediction of two digits ahead
  deepseek-hf finetune generative_recommendation --preset tiny_llm --interactions_file ratings.csv \\
      --item_vectors runs/movies --num_levels 3 --codebook_size 64 --output_dir runs/semantic
      codes of the vectors that `finetune recommendation` has left in runs/movies"""

    trie: CodeTrie
    tokenizer: SemanticIdTokenizer

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> PreTrainedTokenizerBase:
        """Quantizes the items' vectors: those of the splits, and what else has a vector.

        Raises:
            ValueError: if fewer than two items have a vector, or an item is named like the padding.
        """
        named = sorted(set(self.tokenizer_texts(splits)))
        items, vectors = self._vectors(named, splits)
        if len(items) < 2 or PADDING_TOKEN in items:
            raise ValueError(
                f"{len(items)} items have a vector; two or more are needed, none of them named {PADDING_TOKEN}."
            )
        if missing := len(set(named) - set(items)):
            self._note(f"{missing:,} of {len(named):,} items have no vector and so no code; they can't be recommended")
        codes, left_over = residual_codes(vectors, self.arguments.num_levels, self.arguments.codebook_size, self.seed)
        codes, collisions = distinct_codes(codes)
        self._note(
            f"codes of {' x '.join(str(top + 1) for top in codes.max(0))} digits for {len(items):,} items; variance "
            f"left over by level: {', '.join(f'{share:.1%}' for share in left_over)}",
            f"{collisions:,} items share a code with another"
            + ", so a last digit tells them apart" * bool(collisions),
        )
        return SemanticIdTokenizer.of_codes(items, codes)

    def _vectors(self, named: list[str], splits: dict[str, Rows]) -> tuple[list[str], np.ndarray]:
        arguments = self.arguments
        if arguments.item_vectors is None:
            if "train" not in splits:
                raise ValueError("There is neither training data nor --item_vectors to make codes of.")
            return named, neighbour_vectors(splits["train"]["source"], named, self.seed)
        titles: dict[str, str] = {}
        if arguments.titles_file:
            titles = read_titles(arguments.titles_file, arguments.item_column, arguments.title_column)
        texts, untitled = with_titles([*named, *(item for item in titles if item not in set(named))], titles)
        if untitled and titles:
            self._note(f"{untitled:,} items have no title; their ids stand in")
        return read_item_vectors(arguments.item_vectors, arguments.item_ids_file, texts)

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        longest = (self.arguments.max_length + 1) * (self.arguments.num_levels + 1) + 1
        return {} if saved else {"max_position_embeddings": longest}

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """As `Recommendation.features`, the items written as digits; for evaluation also the target's digits."""
        assert isinstance(tokenizer, SemanticIdTokenizer)
        self.tokenizer, self.trie = tokenizer, CodeTrie(tokenizer.codes)
        numbered = super().features(rows, tokenizer, is_training)
        features: dict[str, list[Any]] = {name: list(numbered[name]) for name in ("seen", "target") if not is_training}
        features["input_ids"] = [tokenizer.history(window) for window in numbered["input_ids"]]
        features["length"] = [len(tokens) for tokens in features["input_ids"]]
        if is_training:
            unlearned = 1 + self.trie.depth  # nothing stands before the first item
            features["labels"] = [[IGNORED_LABEL] * unlearned + ids[unlearned:] for ids in features["input_ids"]]
        else:
            unknown = [IGNORED_LABEL] * self.trie.depth
            features["target_ids"] = [
                tokenizer.item_tokens[target - 1] if target != PADDING else unknown for target in features["target"]
            ]
        return Dataset.from_dict(features)

    def item_numbers(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        assert isinstance(tokenizer, SemanticIdTokenizer)
        return tokenizer.numbers

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> CausalCollator:  # type: ignore[override]
        return SemanticIdCollator(PADDING)

    def loss_function(self, label_smoothing: float) -> None:
        return None  # the language model's own, which is smoothed where asked for

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig | None:
        if num_beams > 1:
            raise ValueError("--generation_num_beams: items are searched by --num_beams; set that.")
        return None

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Mean cross entropy of the target's digits, and [B, 1 + M]: the target's rank and the items of the beam."""
        input_ids, mask, target_ids = (inputs[name] for name in ("input_ids", "attention_mask", "target_ids"))
        ids = torch.cat((input_ids, target_ids.clamp(min=PADDING)), dim=1)
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat((mask, torch.ones_like(target_ids)), dim=1),
            logits_to_keep=self.trie.depth + 1,
            use_cache=False,
        ).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), target_ids.flatten(), ignore_index=IGNORED_LABEL
        )
        num_items = len(self.tokenizer.items)
        places, scores = beam_items(
            getattr(model, "module", model),  # a wrapper of several processes can't generate
            self.trie.to(input_ids.device),
            self.tokenizer.first_tokens,
            input_ids,
            mask,
            choosable_items(inputs["seen"], num_items),
            self.arguments.num_beams,
        )
        items = places + 1  # numbers, of which the padding is 0
        everything = scores.new_full((len(items), num_items + 1), float("-inf")).scatter_(1, items, scores)
        ranks = target_ranks(everything, inputs["target"], inputs["seen"], PADDING)
        return loss, torch.cat((ranks[:, None], items), dim=1)

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        tokens = np.array([PADDING_TOKEN, *self.tokenizer.items], dtype=object)
        return [
            {"rank": int(row[0]), "items": tokens[row[1:][row[1:] > PADDING]].tolist()} for row in outputs.astype(int)
        ]

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        scores = super().score(predictions, rows)
        beam = f", by a beam of {self.arguments.num_beams}, items outside of it behind all others"
        return scores | {"ranking_signature": scores["ranking_signature"] + beam}

    def card_data(self) -> dict[str, Any]:
        card = super().card_data()
        return card | {
            "title": "generative recommendation with semantic IDs",
            "code": CARD_CODE,
            "prediction": f"the items of a beam search with {self.arguments.num_beams} beams in the trie of all codes",
            "preprocessing": f"at most {self.arguments.max_length} items of a history, each written as "
            f"{self.trie.depth} digits",
            "settings": card["settings"] | {"num_beams": self.arguments.num_beams},
        }


CARD_CODE = """from finetune_deepseek.recommend import load

history = ["5", "3", "8"]  # ids of items, oldest first
print(load("{name}").recommend(history, k=10))"""


class BeamSearch:
    """What `Recommender` asks of a model: `recommend` in item numbers, here by beam search.

    Args:
        max_length: items of a history that are read.
        num_beams: items that the search ends with, or as many as are asked for if that is more.
    """

    def __init__(self, model: Any, tokenizer: SemanticIdTokenizer, max_length: int, num_beams: int) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length, self.num_beams = max_length, num_beams
        self.trie = CodeTrie(tokenizer.codes).to(model.device)
        self.collator = CausalCollator(PADDING)

    def recommend(
        self, history: Sequence[Sequence[int]], k: int = 10, exclude_seen: bool = True, filter: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items [B, K] and scores [B, K], best first, as `DeepSeekForRecommendation.recommend` of several users.

        Raises:
            ValueError: for an empty history, a number that is no item, or if nothing is left to choose from.
        """
        num_items, device = len(self.tokenizer.items), self.model.device
        seen = pad_histories(history, num_items + 1, PADDING).to(device)
        choosable = choosable_items(seen if exclude_seen else torch.zeros_like(seen), num_items)
        if filter is not None:
            choosable &= allowed_items(filter, num_items + 1, PADDING).to(device)[..., 1:]
        if not bool(choosable.any(1).all()):
            row = int((~choosable.any(1)).nonzero()[0])
            raise ValueError(f"nothing is left to recommend for row {row}: its history and the filter leave no item")
        prompts = [self.tokenizer.history(row[-self.max_length :]) for row in history]
        input_ids, mask = (part.to(device) for part in self.collator._pad(prompts, left=True))
        places, scores = beam_items(
            self.model, self.trie, self.tokenizer.first_tokens, input_ids, mask, choosable, max(k, self.num_beams)
        )
        return places[:, :k] + 1, scores[:, :k]


class GenerativeRecommender(Recommender):
    """A generative model with its catalogue; scores are logarithms of the codes' probabilities."""

    def __init__(self, model: BeamSearch) -> None:
        self.model, self.tokenizer = model, None  # items aren't texts
        self.search = {}
        self.numbers = model.tokenizer.numbers
        self.items = [PADDING_TOKEN, *model.tokenizer.items]

    def explain(self, history: Sequence[Any], item: str, *args: Any, **kwargs: Any) -> list[tuple[str, float]]:
        """Refused: the score of a code is a product over digits."""
        raise ValueError("--explain: a generative recommender can't say what carried an item; leave it out.")


def load_generative(name: str, revision: str = "main") -> GenerativeRecommender:
    """The generative recommender in a folder or on the Hub, on the accelerator if there is one.

    Raises:
        ValueError: with one line, if there is none.
    """
    settings = model_card.run_settings(name, revision, GenerativeRecommendation.name)
    with named_source("model", name):
        tokenizer = SemanticIdTokenizer.from_pretrained(name, revision=revision)
        model: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    defaults = GenerativeRecommendationArguments
    max_length = settings.get("max_length", defaults.max_length)
    return GenerativeRecommender(
        BeamSearch(model, tokenizer, max_length, settings.get("num_beams", defaults.num_beams))
    )
