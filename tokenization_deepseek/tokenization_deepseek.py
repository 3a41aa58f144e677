"""DeepSeekTokenizer: byte-level BPE on the tokenizers library, for every generation.

It opens a released `tokenizer.json` as it is, and keeps five promises that transformers 5.23 does not:

- one BOS and no second one, when tokenizer_config.json says `add_bos_token` (transformers drops that flag on load);
- a pad token is always set;
- `decode(encode(x, add_special_tokens=False)) == x` for every string without lone surrogates, unless the file has
  tokens that swallow blanks (lstrip, rstrip);
- threads may share it; control tokens in messages, or under `split_special_tokens=True`, are text;
- saving writes all of this into `tokenizer.json`, so that stock transformers gives the same ids.

This file travels to the Hub: it imports the standard library, tokenizers and transformers only.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from .answer_parsing import FORMS, AnswerParser, Form, form_of, parse_answer
from .chat_encoding import encode_chat, plain_chat
from .control_tokens import holds_control, strings, twin_of
from .encoding_call import Call, view
from .response_templates import is_own
from .whole_folders import current, writing_beside

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

# The named tokens of the released V3 / R1 file (its numbered place holders left out). True: dropped by
# decode(skip_special_tokens=True); False: kept, because the text around a chat turn or a tool call is read from them.
SPECIAL_TOKENS = {
    BOS: True,
    EOS: True,
    PAD: True,
    "<think>": False,
    "</think>": False,
    "<｜fim▁hole｜>": False,
    "<｜fim▁begin｜>": False,
    "<｜fim▁end｜>": False,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<|EOT|>": True,
    "<｜tool▁calls▁begin｜>": False,
    "<｜tool▁calls▁end｜>": False,
    "<｜tool▁call▁begin｜>": False,
    "<｜tool▁call▁end｜>": False,
    "<｜tool▁outputs▁begin｜>": False,
    "<｜tool▁outputs▁end｜>": False,
    "<｜tool▁output▁begin｜>": False,
    "<｜tool▁output▁end｜>": False,
    "<｜tool▁sep｜>": False,
}

_SURROGATE = re.compile("[\ud800-\udfff]")


class DeepSeekTokenizer(PreTrainedTokenizerFast):
    """A DeepSeek tokenizer; made by `from_pretrained` (a folder or Hub id with tokenizer.json) or `train_tokenizer`.

    bos_token, eos_token: default to DeepSeek's, when the vocabulary has them.
    pad_token: as configured; else `<｜▁pad▁｜>`; else the EOS token.
    add_bos_token, add_eos_token: put BOS first, EOS last when encoding with special tokens. An argument wins over
        tokenizer_config.json, that over what tokenizer.json does by itself. A pair of texts gets one BOS and one EOS.
    padding_side: "left" unless configured, since a decoder continues a prompt from its last position.

    Raises ValueError: no or no readable tokenizer.json, one that is not byte-level BPE, no token to pad with.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    padding_side = "left"
    _tokenizer: Any  # a tokenizers.Tokenizer

    def __init__(
        self, tokenizer_file: str | None = None, tokenizer_object: Tokenizer | None = None, **kwargs: Any
    ) -> None:
        where = tokenizer_file or kwargs.get("name_or_path") or "the arguments"
        backend = _read_backend(tokenizer_file, where) if tokenizer_object is None else tokenizer_object
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError(f"{where}: not a byte-level BPE tokenizer; open it with transformers' AutoTokenizer")
        self._tokenizer = backend  # where transformers expects it before its own __init__

        for name, default in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD)):
            if kwargs.get(name) is None:
                kwargs[name] = default if self._id(default) is not None else None
        kwargs["pad_token"] = kwargs["pad_token"] or kwargs["eos_token"]
        if kwargs["pad_token"] is None:
            raise ValueError(f"{where}: nothing to pad with: neither {PAD} nor an EOS token; pass pad_token=")
        added = self._ids_added_by_file()
        if kwargs.get("add_bos_token") is None:
            kwargs["add_bos_token"] = bool(added) and added[0] == self._id(kwargs["bos_token"])
        if kwargs.get("add_eos_token") is None:
            kwargs["add_eos_token"] = bool(added) and added[-1] == self._id(kwargs["eos_token"])
        kwargs["clean_up_tokenization_spaces"] = False  # it would remove blanks before punctuation
        kwargs.setdefault("padding_side", self.padding_side)  # so that it is saved
        configured = [*(kwargs.get("added_tokens_decoder") or {}).values(), *kwargs.values()]
        self._of_config = {_flags(token) for token in configured if isinstance(token, AddedToken)}
        super().__init__(**kwargs)
        self._letters = self._find_letters()
        backend.no_truncation()  # a call brings its own
        backend.no_padding()

    def _id(self, token: str | AddedToken | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(str(token))

    def _ids_added_by_file(self) -> list[int]:
        """What the post-processor in tokenizer.json puts around a text, padding left out."""
        empty = self._tokenizer.encode("")
        return [i for i, seen in zip(empty.ids, empty.attention_mask, strict=True) if seen]

    # ---- loading: transformers forgets the two flags, and would rebuild the file for a class with an own __init__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; raises ValueError, naming the folder, for a broken tokenizer file."""
        try:
            source = current(pretrained_model_name_or_path, "tokenizer_config.json")
            return super().from_pretrained(source, *args, **kwargs)
        except json.JSONDecodeError as error:
            where = f"{pretrained_model_name_or_path}: tokenizer.json or tokenizer_config.json"
            raise ValueError(f"{where} is broken JSON: {error}") from error

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files, *args, **kwargs):
        config_file = resolved_vocab_files.get("tokenizer_config_file")
        if config_file is not None:
            config = json.loads(Path(config_file).read_text(encoding="utf-8"))
            for flag in ("add_bos_token", "add_eos_token"):
                kwargs.setdefault(flag, config.get(flag))
        return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        return kwargs

    # ---- encoding

    def update_post_processor(self) -> None:
        """Write `add_bos_token` and `add_eos_token` into the backend, hence into tokenizer.json."""
        for flag, token in (("add_bos_token", self.bos_token), ("add_eos_token", self.eos_token)):
            if getattr(self, flag) and token is None:
                raise ValueError(f"{flag} is true but there is no {flag[4:]}; set {flag[4:]} or {flag}=False")
        bos = [self.bos_token] if self.add_bos_token else []
        eos = [self.eos_token] if self.add_eos_token else []
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", "$B:1", *(f"{token}:1" for token in eos)],
            special_tokens=[(token, self._id(token)) for token in bos + eos],
        )

    def own_ends(self) -> dict[str, int | None]:
        """The ids that a text may begin or end with by itself where the tokenizer puts them on."""
        return {
            "own_bos": self.bos_token_id if self.add_bos_token else None,
            "own_eos": self.eos_token_id if self.add_eos_token else None,
        }

    def _encode_plus(self, text, text_pair=None, *args, **kwargs):
        """As in transformers, but nothing that threads share is written; a text that begins with BOS (a rendered chat,
        say) or ends with EOS gets no second one; and `split_special_tokens` makes every control token text.
        """
        if any(map(_SURROGATE.search, strings([text, text_pair]))):
            raise ValueError(
                "the text holds a lone surrogate, which UTF-8 cannot express; "
                "replace it, for instance by text.encode('utf-8', 'replace').decode()"
            )
        if isinstance(self._tokenizer, Call):
            return super()._encode_plus(text, text_pair, *args, **kwargs)
        call = Call(self._tokenizer, as_text=self._text_backend, **self.own_ends())
        return super(DeepSeekTokenizer, view(self, call))._encode_plus(text, text_pair, *args, **kwargs)

    def _text_backend(self, texts: Any) -> Tokenizer:
        return twin_of(self, texts).backend if holds_control(self, texts) else self._tokenizer

    def apply_chat_template(
        self,
        conversation,
        tools=None,
        documents=None,
        chat_template=None,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=True,
        **kwargs,
    ):
        """As in transformers, but control tokens in messages, tools, documents and variables become text; with
        tokenize=False they stand in the string as they are, for whoever encodes it.
        """
        kwargs |= {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
        kwargs |= {"tools": tools, "documents": documents, "continue_final_message": continue_final_message}
        if tokenize:
            return encode_chat(self, conversation, **kwargs)
        conversation = plain_chat(conversation, self.get_chat_template(chat_template, tools))
        return super().apply_chat_template(conversation, tokenize=False, **kwargs)

    # ---- generated text back into messages

    def parse_response(self, response, schema=None, *, prefix=None, tools=None):
        """A generated answer, or a batch of them, as messages: role, content and, if there are any,
        reasoning_content, tool_calls, and invalid_tool_calls with the reason and the text of each.

        Args:
            response: text or ids (list, array, tensor), or several of them. What follows the end of sentence is
                padding.
            schema: the form of answers by name (`answer_parsing.FORMS`); None: the one of the chat template. A
                response template of transformers' own is followed as there.
            prefix: the prompt, as text or ids, once or for each answer: its end may have opened the reasoning. Without
                it, reasoning is what ends with `</think>`.
            tools: as for `apply_chat_template`; by their schemas texts are read as numbers and the like.

        Raises ValueError: no such form; a chat template of no known generation.
        """
        if isinstance(schema, dict) or (schema is None and self._follows_another()):
            return super().parse_response(response, schema, prefix=prefix, tools=tools)
        form = self._form(schema)
        texts, is_batch = self._texts(response)
        prefixes = [None] if prefix is None else self._texts(prefix)[0]
        prefixes = prefixes * len(texts) if len(prefixes) == 1 else prefixes
        if len(prefixes) != len(texts):
            raise ValueError(f"{len(texts)} answers have {len(prefixes)} prefixes; give one, or one for each")
        messages = [parse_answer(form, text, start, tools) for text, start in zip(texts, prefixes, strict=True)]
        return messages if is_batch else messages[0]

    def get_response_parser(self, response_template=None, *, prefix=None, tools=None):
        """A parser for an answer that comes in pieces: `feed(text)` gives events, `finalize()` the message.

        As `parse_response`; without a prefix the text begins with the answer, outside reasoning.
        """
        if isinstance(response_template, dict) or (response_template is None and self._follows_another()):
            return super().get_response_parser(response_template, prefix=prefix, tools=tools)
        start = None if prefix is None else self._texts(prefix)[0][0]
        return AnswerParser(self._form(response_template), start, tools)

    def _follows_another(self) -> bool:
        return self.response_template is not None and not is_own(self.response_template)

    def _form(self, name: str | None) -> Form:
        if name is None:
            return form_of(self.get_chat_template())
        if name not in FORMS:
            raise ValueError(f"there is no form of answers named {name!r}; there are {', '.join(FORMS)}")
        return FORMS[name]

    def _texts(self, given: Any) -> tuple[list[str], bool]:
        """Texts or ids as texts, and whether they are several."""
        if isinstance(given, (list, tuple)) and given and isinstance(given[0], str):
            return list(given), True
        text = given if isinstance(given, str) else self.decode(given)
        return ([text], False) if isinstance(text, str) else (text, True)

    # ---- added tokens, which byte-level decoding may misread

    def _find_letters(self) -> dict[int, str]:
        """Added tokens outside the model's vocabulary whose letters the decoder takes for bytes, as ü in Coder's."""
        return {
            token_id: token.content
            for token_id, token in self.added_tokens_decoder.items()
            if self._is_misread(token.content) and self._tokenizer.model.token_to_id(token.content) is None
        }

    def _is_misread(self, token: str) -> bool:
        return self._tokenizer.decoder.decode([token]) != token

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        """Refuse new tokens that decode(encode(x)) would lose. Those of the files stay as they are, with their ids."""
        known = self._of_config | set(map(_flags, self.added_tokens_decoder.values()))
        contents = {content for content, *_ in known}
        for token in map(_flags, new_tokens):
            if token[0] not in contents and self._is_misread(token[0]):
                raise ValueError(
                    f"token {token[0]!r} cannot be added: byte-level decoding reads its letters as bytes; "
                    "spell it in ASCII, or include a sign beyond Latin, such as ｜"
                )
            if any(token[1:]) and token not in known:
                raise ValueError(f"token {token[0]!r} cannot be added: lstrip or rstrip would swallow blanks")
        number = super()._add_tokens(new_tokens, special_tokens)
        self._letters = self._find_letters()
        return number

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs) -> str:
        ids = token_ids["input_ids"] if isinstance(token_ids, dict) else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        kwargs |= {"skip_special_tokens": skip_special_tokens}
        kwargs |= {"clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        return _by_runs(ids, self._letters, partial(super()._decode, **kwargs))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        letters = {letter: letter for letter in self._letters.values()}
        return _by_runs(tokens, letters, super().convert_tokens_to_string)

    # ---- saving

    def save_pretrained(self, save_directory, *args, **kwargs) -> tuple[str, ...]:
        """Write the folder whole or not at all: the files appear when all of them are written.

        Raises OSError, naming the folder, when it can't be written.
        """
        target = Path(save_directory)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        with writing_beside(target) as staging:
            try:
                super().save_pretrained(staging, *args, **kwargs)
            except Exception as error:  # for a full disk the tokenizers library raises a bare Exception
                raise OSError(f"the tokenizer was not saved: {error}") from error
            names = sorted(file.relative_to(staging) for file in Path(staging).rglob("*") if file.is_file())
        return tuple(str(target / name) for name in names)

    def _save_pretrained(self, save_directory, file_names, *args, **kwargs):
        # transformers leaves the two flags out of tokenizer_config.json, the first of the files
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)


def _flags(token: str | AddedToken) -> tuple[str, bool, bool]:
    return (str(token), token.lstrip, token.rstrip) if isinstance(token, AddedToken) else (token, False, False)


def _by_runs(tokens: Sequence[Any], letters: dict[Any, str], decode: Callable[[list[Any]], str]) -> str:
    """`decode` for each run of tokens between those that stand for letters."""
    if letters.keys().isdisjoint(tokens):
        return decode(list(tokens))
    runs = itertools.groupby(tokens, letters.__contains__)
    return "".join("".join(letters[token] for token in run) if written else decode(list(run)) for written, run in runs)


def _read_backend(tokenizer_file: str | None, where: str) -> Tokenizer:
    if tokenizer_file is None:
        raise ValueError(f"{where}: no tokenizer.json found; name a folder that has one, or use train_tokenizer")
    try:
        return Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{tokenizer_file}: not a readable tokenizer.json: {error}") from error
