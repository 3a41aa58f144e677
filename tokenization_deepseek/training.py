"""Train a DeepSeek tokenizer of any vocabulary size on a corpus."""

import json
from collections.abc import Iterable, Iterator, Sized

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .chat import CHAT_TEMPLATES
from .chat_parts import IMAGE
from .pre_tokenization import pre_tokenizer
from .tokenization_deepseek import SPECIAL_TOKENS, DeepSeekTokenizer

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MIN_FREQUENCY = {"characters": 1}
TEMPLATES = {
    "llm": "v2",
    "coder": "coder",
    "v3": "v3",
    "characters": "v3",
}  # the chat format of each generation of tokenizers
_TASKS = ("<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜read_url｜>")
_V4_MARKS = ("｜DSML｜", "<｜latest_reminder｜>", *_TASKS)
# Marks of chat formats that V3's tokens lack. As tokens of their own they can't be written by a user.
MARKS = {
    "v3.2": ("｜DSML｜",),
    "v4": _V4_MARKS,
    "v4-0731": _V4_MARKS,
    "v4.1": (*_V4_MARKS, "<｜System｜>", IMAGE),
}


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    generation: str = "v3",
    *,
    add_bos_token: bool = True,
    add_eos_token: bool = False,
    chat_template: str | None = "own",
    model_max_length: int | None = None,
    min_frequency: int | None = None,
    show_progress: bool = False,
) -> DeepSeekTokenizer:
    """Byte-level BPE over `texts`, cut before merging as the generation does ("llm", "coder", "v3"), or
    at every character ("characters").

    Ids: the special tokens first (0 BOS, 1 EOS, 2 pad as in V3, then the others; V3 has those behind its 128000 text
    tokens, which a small vocabulary can't), the marks of the chat template that are none of those, then the 256 bytes,
    then the merges in the order learned.

    vocab_size: all tokens, special ones included. It is an upper bound: a small corpus has no more pairs that occur
        min_frequency times, so size the embedding by len(tokenizer).
    min_frequency: of a pair of tokens to become one; 2 unless given, 1 for characters, each of which is to be a token.
    chat_template: "own" for the generation's, a word of CHAT_TEMPLATES ("v2", "v3.1", ...), or None for none.
    model_max_length: tokens; where truncation=True cuts.

    Raises ValueError: a vocabulary too small for the bytes and special tokens, texts that are empty, no strings, or
    one string where several are meant, an unknown generation or chat template.
    """
    special = SPECIAL_TOKENS | {token: token == IMAGE for token in MARKS.get(chat_template or "", ())}
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(special)} special tokens "
            f"take {256 + len(special)}"
        )
    if chat_template not in ("own", None, *CHAT_TEMPLATES):
        raise ValueError(f"no chat template {chat_template!r}; choose own or one of {', '.join(CHAT_TEMPLATES)}")
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list or another iterable of strings")

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(generation)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency or MIN_FREQUENCY.get(generation, 2),
        special_tokens=[AddedToken(token, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    length = len(texts) if isinstance(texts, Sized) else None  # only the progress bar uses it
    backend.train_from_iterator(_checked(texts), trainer=trainer, length=length)
    word = TEMPLATES[generation] if chat_template == "own" else chat_template
    return DeepSeekTokenizer(
        tokenizer_object=_with_special_flags(backend, special),
        add_bos_token=add_bos_token,
        add_eos_token=add_eos_token,
        chat_template=None if word is None else CHAT_TEMPLATES[word],
        model_max_length=model_max_length,
    )


def _checked(texts: Iterable[str]) -> Iterator[str]:
    seen = False
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{row}] is {type(text).__name__}, not a string")
        seen = seen or bool(text)
        yield text
    if not seen:
        raise ValueError("texts holds no text to train on")


def _with_special_flags(backend: Tokenizer, special: dict[str, bool]) -> Tokenizer:
    """The trainer marks every token it is given as special; decoding must keep those that are False here."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = special[token["content"]]
    return Tokenizer.from_str(json.dumps(state))
