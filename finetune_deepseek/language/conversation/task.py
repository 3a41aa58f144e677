"""Conversations: turns in, a model that writes the assistant's turns out.

A split is scored by the loss on what is trained of it; of the test split some last answers are generated, too, and
shown beside those of the data.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from datasets import Dataset, Features, List, Value
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...data.fault_report import Report, clip, finding
from ...data.sources import Rows, read_splits
from ...training.task import CausalCollator, Task, beam_search, lower
from ..packing import PackedCollator, pack, packed_rows
from ..serving.chat_format import choose_template
from .answers import answer_of, answer_scores, most_frequent
from .arguments import ConversationArguments
from .checks import FAULTS, LEFT_OUT, checked
from .layouts import Faulty, Turn, read_conversations
from .masks import Encoded, Encoder
from .templates import ends_of_answers, prompt_of, trained_template

TOKENIZER_TRAINING_ROWS = 200_000
IDS, NUMBER = List(Value("int64")), Value("int64")
COLUMNS = Features(
    {
        **{"input_ids": IDS, "labels": IDS, "reply": IDS, "cut": NUMBER},
        **{"header": Value("string"), "source": Value("string"), "length": NUMBER, "trained": NUMBER},
    }
)
METRICS = {
    "perplexity": ("perplexity", "perplexity"),
    "answer_accuracy": ("accuracy", "exact answers"),
}
TRAINED = {"assistant": "the assistant's turns", "all": "all turns", "last": "the last answer"}
CODE = """import modeling_deepseek
import tokenization_deepseek
{imports}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
{opening}
chat = [{{"role": "user", "content": "Hello."}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


class Found:
    """What is known of a split: faults by name, each with its rows, and the sizes of what is trained."""

    def __init__(self) -> None:
        self.layouts: dict[str, str] = {}
        self.rows = 0
        self.faults: dict[str, list[tuple[str, str]]] = {name: [] for name in FAULTS}  # place, detail
        self.sizes: dict[str, int] = {}
        self.headers: Counter[str] = Counter()  # of answers that begin after something else than generation puts there

    def add(self, fault: str, place: str, detail: str) -> None:
        self.faults[fault].append((place, detail))

    def report(self) -> dict[str, Any]:
        return {"rows": self.rows, "layouts": self.layouts} | {
            name: finding(f"{place}: {detail}" for place, detail in found) | {"places": [place for place, _ in found]}
            for name, found in self.faults.items()
        }

    @property
    def num_left_out(self) -> int:
        return sum(len(self.faults[name]) for name in LEFT_OUT)

    def line(self, split: str) -> str:
        """What is used, and what was left out or cut and why."""
        used, kinds = self.sizes, {name: len(self.faults[name]) for name in (*LEFT_OUT, "cut")}
        parts = [
            f"{split}: {used['conversations']:,} conversation(s), {used['tokens']:,} tokens, "
            f"{used['trained_tokens']:,} of them trained"
        ]
        return "; ".join([*parts, *(f"{count:,} {FAULTS[name]}" for name, count in kinds.items() if count)])

    def header_lines(self, split: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """What answers begin after, where generation puts something else there, and by which flag it puts the same."""
        switches = {prompt_of(tokenizer, thinks): str(thinks).lower() for thinks in (False, True)}
        usual = prompt_of(tokenizer)
        for header, count in self.headers.items():
            advice = f"generate by --thinking {switches[header]}" if header in switches else "take another template"
            yield (
                f"{split}: {count:,} of {self.sizes['conversations']:,} last answers stand behind {header!r}, where "
                f"generation has {usual!r}: {advice}, or mend their reasoning_content"
            )

    def first_fault(self) -> str:
        return next((f"{p}: {d} ({FAULTS[name]})" for name in LEFT_OUT for p, d in self.faults[name]), "no rows")


class Conversation(Task):
    """See the module. Rows are `conversation`, JSON of messages and tools; `place`, where it stands in which file."""

    name = "conversation"
    arguments_class = ConversationArguments
    next_command = "deepseek-hf chat {folder}"
    fault_names = FAULTS

    def __init__(self, arguments: ConversationArguments, seed: int) -> None:
        super().__init__(arguments, seed)
        if arguments.chat_template:
            choose_template(SimpleNamespace(), arguments.chat_template, "")  # refused before the data are read
        self.found: dict[str, Found] = {}
        self.splits: dict[str, Rows] = {}
        self.encoded: dict[str, Dataset] = {}
        self.longest_prompt: int | None = None  # that leaves room for a reply; None for any

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        for split, parts in read_splits(self.arguments).items():
            found = self.found[split] = Found()
            rows = [row for part in parts for row in self._rows(part.rows, part.where, found)]
            if not rows:
                raise ValueError(f"{parts[0].where}: no conversation can be used; {found.first_fault()}.")
            columns = {name: [row[name] for row in rows] for name in ("conversation", "place")}
            self.splits[split] = Dataset.from_dict(columns)
        self._count_repeated()
        return self.splits

    def _rows(self, raw: Any, where: str, found: Found) -> Iterator[dict[str, str]]:
        """The conversations of a file that can be used; the others are counted."""
        conversations = read_conversations(raw, where, self.arguments.layout)
        name = Path(where).name
        found.layouts[name] = conversations.layout
        found.rows += len(conversations.rows)
        print(f"{where}: {len(conversations.rows):,} conversation(s), layout {conversations.layout}")
        for number, row in enumerate(conversations.rows, start=1):
            place = f"{name}, row {number}"
            try:
                if isinstance(row, Faulty):
                    raise row
                messages = checked(row[0])
                text = as_text(messages, row[1])
            except Faulty as fault:
                found.add(fault.fault, place, fault.detail)
                continue
            if any(turn["role"] == "assistant" and is_empty(turn) for turn in messages):
                found.add("empty_answers", place, clip(str(messages[0]["content"])))
            if "\ufffd" in text:
                found.add("replacement_characters", place, clip(text))
            yield {"conversation": text, "place": place}

    def _count_repeated(self) -> None:
        train = set(self.splits["train"]["conversation"]) if "train" in self.splits else set()
        for split, rows in self.splits.items():
            seen: set[str] = set()
            for text, place in zip(rows["conversation"], rows["place"], strict=True):
                if text in seen:
                    self.found[split].add("duplicates", place, clip(text))
                if split != "train" and text in train:
                    self.found[split].add("in_train", place, clip(text))
                seen.add(text)

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        for row in islice(splits["train"], TOKENIZER_TRAINING_ROWS):
            for turn in json.loads(row["conversation"])["messages"]:
                yield from texts_of(turn)

    # -- ids --

    def check_splits(self, splits: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> Report:
        for split in splits:
            self._encode(split, tokenizer)
        return {split: found.report() for split, found in self.found.items()}

    def _encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The conversations of a split as ids, labels and reply, without those that can't be used; made once."""
        if split in self.encoded:
            return self.encoded[split]
        rows, encoder, found = cast(Dataset, self.splits[split]), Encoder(tokenizer, self.arguments), self.found[split]

        def encode(batch: dict[str, list]) -> dict[str, list]:
            made = [pair for text, place in zip(batch["conversation"], batch["place"], strict=True)
                    for pair in self._encoded(encoder, text, place, found)]  # fmt: skip
            columns: dict[str, list] = {name: [getattr(e, name) for e, _ in made] for name in Encoded._fields}
            columns |= {"source": [source for _, source in made], "length": [len(e.input_ids) for e, _ in made]}
            return columns | {"trained": [e.num_trained for e, _ in made]}

        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, features=COLUMNS)
        if not len(encoded):
            raise ValueError(f"no {split} conversation can be used; {found.first_fault()}.")
        found.sizes = {
            "conversations": len(encoded),
            "tokens": sum(encoded["length"]),
            "trained_tokens": sum(encoded["trained"]),
            "left_out": found.num_left_out,
            "cut": len(found.faults["cut"]),
        }
        self.encoded[split] = encoded
        return encoded

    def _encoded(self, encoder: Encoder, text: str, place: str, found: Found) -> Iterator[tuple[Encoded, str]]:
        """A conversation with its last question, unless it can't be used, which is counted."""
        conversation = json.loads(text)
        messages = conversation["messages"]
        try:
            encoded = encoder(messages, conversation["tools"])
        except Faulty as fault:
            found.add(fault.fault, place, fault.detail)
            return
        if encoded.header:
            found.headers[encoded.header] += 1
        if encoded.cut:
            found.add("cut", place, f"{encoded.cut} of {len(messages)} turns")
        yield encoded, last_question(messages)

    @property
    def counts(self) -> dict[str, dict[str, int]]:  # type: ignore[override]
        """Of each split, for the results."""
        return {split: found.sizes for split, found in self.found.items()}

    # -- features --

    def prepare_model(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Choose the template, and have generation end where it ends an answer.

        Raises:
            ValueError: for a template that marks no answers, or a model that sees what it is to predict.
        """
        trained_template(tokenizer, self.arguments.chat_template)
        direction = getattr(model.config, "attention_direction", "causal")
        if direction != "causal":
            raise ValueError(f"attention_direction {direction}: conversations are learned by a causal model.")
        if getattr(model, "generation_config", None) is not None:
            ends = ends_of_answers(tokenizer)
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        lower(self.arguments, positions, max_seq_length=positions, max_new_tokens=max(1, positions // 2))
        self.longest_prompt = positions - self.arguments.max_new_tokens

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Dataset:
        """Conversations in their order, for training packed if that was asked for."""
        split = {id(known): name for name, known in self.splits.items()}[id(rows)]
        encoded, found = self._encode(split, tokenizer), self.found[split]
        print("\n".join([found.line(split), *found.header_lines(split, tokenizer)]))
        if is_training and self.arguments.packing:
            return self._packed(encoded)
        return encoded.select_columns(["input_ids", "labels", "length"])

    def _packed(self, encoded: Dataset) -> Dataset:
        size = self.arguments.max_seq_length
        packing = pack(encoded["length"], size, "best_fit")
        blocks = packed_rows(encoded["input_ids"], packing, encoded["labels"])
        print(f"packed into {len(packing.blocks):,} rows of {size:,} tokens, {packing.padding:,} of them padding")
        return Dataset.from_dict(blocks)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        pad = cast(int, tokenizer.pad_token_id)
        packed, single = PackedCollator(pad), CausalCollator(pad)
        return lambda features: (packed if "pieces" in features[0] else single)(features)

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig:
        generation = beam_search(tokenizer, self.arguments.max_new_tokens, num_beams)
        generation.eos_token_id = ends_of_answers(tokenizer)
        return generation

    def prompts(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """What stands before the last answers of the first conversations, and these answers.

        Raises:
            ValueError: if --answer_pattern finds nothing in any of these.
        """
        arguments = self.arguments
        if not arguments.max_replies:
            return None
        encoded = self._with_room(self._encode("test", tokenizer))
        encoded = encoded.select(range(min(arguments.max_replies, len(encoded))))
        pairs = list(zip(encoded["input_ids"], encoded["reply"], strict=True))
        prompts = [ids[:start] for ids, (start, _) in pairs]
        targets = texts_of_ids(tokenizer, [ids[start:stop] for ids, (start, stop) in pairs])
        pattern = arguments.answer_pattern
        if pattern and not any(answer_of(text, pattern) is not None for text in targets):
            raise ValueError(f"--answer_pattern {pattern!r}: found in none of the {len(targets)} test answers.")
        return Dataset.from_dict(
            {
                "prompt_ids": prompts,
                "length": [len(ids) for ids in prompts],
                "source": encoded["source"],
                "target": targets,
            }
        )

    def _with_room(self, encoded: Dataset) -> Dataset:
        """The conversations whose last answer begins where the model has room for one.

        Raises:
            ValueError: if there is none.
        """
        longest = self.longest_prompt
        kept = [n for n, (start, _) in enumerate(encoded["reply"]) if longest is None or start <= longest]
        if not kept:
            raise ValueError(
                f"--max_new_tokens {self.arguments.max_new_tokens}: no test conversation leaves such room."
            )
        if len(kept) < len(encoded):
            print(f"no replies to {len(encoded) - len(kept):,} test conversation(s): no room for --max_new_tokens")
        return encoded.select(kept)

    # -- scores --

    def score(self, predictions: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Of answers, where --answer_pattern says what one is; a reply as such is one of many."""
        pattern = self.arguments.answer_pattern
        return answer_scores(predictions, [row["target"] for row in rows], pattern) if pattern else {}

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[str] | None:
        """Always the most frequent answer of the training split."""
        pattern = self.arguments.answer_pattern
        if pattern is None or train is None:
            return None
        conversations = (json.loads(text)["messages"] for text in train["conversation"])
        answers = [str(turn["content"]) for turns in conversations for turn in turns if turn["role"] == "assistant"]
        best = most_frequent(answers, pattern)
        return None if best is None else [best] * len(rows)

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        template = arguments.chat_template or "the tokenizer's own"
        what = TRAINED[arguments.train_on]
        sizes = [
            f"{split}: {', '.join(f'{name} {number:,}' for name, number in found.sizes.items())}"
            f" (layout {', '.join(sorted(set(found.layouts.values())))})"
            for split, found in self.found.items()
            if found.sizes
        ]
        return {
            "language": None,
            "pipeline_tag": "text-generation",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": METRICS,
            "dataset_name": arguments.data_name,
            "baseline": "most frequent answer",
            "title": "conversations",
            "prompt": "Hello.",
            "code": CODE,
            "data": "\n".join(f"- {line}".replace("_", " ") for line in sizes),
            "preprocessing": f"chat template {Path(template).name}, loss on {what}"
            + ", with what the generation prompt supplies" * arguments.train_prompt_tokens
            + f", thinking {arguments.thinking}, at most {arguments.max_seq_length} tokens, cut at turns"
            + ", packed" * arguments.packing
            + (f"; answers by {arguments.answer_pattern!r}" if arguments.answer_pattern else ""),
        }


# -- texts --


def as_text(messages: list[Turn], tools: list[Any]) -> str:
    """A conversation as JSON; what this has no form for, as a date beside a turn, as a text.

    Raises:
        Faulty: for half of a character, as JSON may name one.
    """
    text = json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Faulty("broken", "it holds half of a character (such as \\ud83d)") from None
    return text


def is_empty(turn: Turn) -> bool:
    return not (turn["content"] or turn.get("tool_calls") or turn.get("reasoning_content"))


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a turn but its keys and its role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for name, part in value.items() if name != "role" for text in texts_of(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in texts_of(part))


def last_question(messages: Sequence[Turn]) -> str:
    """The texts of the turn that the last answer answers."""
    last = max(place for place, turn in enumerate(messages) if turn["role"] == "assistant")
    return "".join(texts_of(messages[last - 1]["content"])) if last else ""


def texts_of_ids(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
