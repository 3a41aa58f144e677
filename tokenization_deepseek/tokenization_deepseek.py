"""DeepSeekTokenizer: byte-level BPE on the tokenizers library, for every generation.

It opens a released `tokenizer.json` as it is, and keeps four promises that transformers 5.23 does not:

- one BOS and no second one, when tokenizer_config.json says `add_bos_token` (transformers drops that flag on load);
- a pad token is always set;
- `decode(encode(x, add_special_tokens=False)) == x` for every string without lone surrogates;
- saving writes all of this into `tokenizer.json`, so that stock transformers gives the same ids.

This file travels to the Hub: it imports the standard library, tokenizers and transformers only.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

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
        super().__init__(**kwargs)

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
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
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
        self._tokenizer.post_processor = self._post_processor(self.add_bos_token)

    def _post_processor(self, add_bos: bool) -> processors.PostProcessor:
        bos = [self.bos_token] if add_bos else []
        eos = [self.eos_token] if self.add_eos_token else []
        return processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", "$B:1", *(f"{token}:1" for token in eos)],
            special_tokens=[(token, self._id(token)) for token in bos + eos],
        )

    def _encode_plus(self, text, text_pair=None, add_special_tokens=True, split_special_tokens=None, **kwargs):
        """As in transformers, but a text that opens with BOS (a rendered chat, say) gets no second one.

        In a batch where only some texts do so, the offsets of those count from behind their BOS.
        """
        splits = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        rest = {"split_special_tokens": split_special_tokens, **kwargs}
        if any(map(_SURROGATE.search, _strings([text, text_pair]))):
            raise ValueError(
                "the text holds a lone surrogate, which UTF-8 cannot express; "
                "replace it, for instance by text.encode('utf-8', 'replace').decode()"
            )
        if not (add_special_tokens and self.add_bos_token) or splits:
            return super()._encode_plus(text, text_pair, add_special_tokens, **rest)

        batched = not isinstance(text, str) and not (
            kwargs.get("is_split_into_words") and text and isinstance(text[0], str)
        )
        opens = [self._opens_with_bos(row) for row in (text if batched else [text])]
        if not all(opens):
            if any(opens):
                text = [self._without_bos(row) if has else row for row, has in zip(text, opens, strict=True)]
            return super()._encode_plus(text, text_pair, add_special_tokens, **rest)
        self._tokenizer.post_processor = self._post_processor(add_bos=False)
        try:
            return super()._encode_plus(text, text_pair, add_special_tokens, **rest)
        finally:
            self.update_post_processor()

    def _opens_with_bos(self, row: Any) -> bool:
        return next(_strings(row), "").startswith(self.bos_token)

    def _without_bos(self, row: Any) -> Any:
        if isinstance(row, str):
            return row.removeprefix(self.bos_token)
        return [self._without_bos(row[0]), *row[1:]]  # a pair of texts, or a list of words

    def _add_tokens(self, new_tokens, special_tokens=False) -> int:
        """Refuse tokens that decode(encode(x)) would lose: transformers adds them and corrupts the text silently."""
        for token in new_tokens:
            if self._tokenizer.decoder.decode([str(token)]) != str(token):
                raise ValueError(
                    f"token {str(token)!r} cannot be added: byte-level decoding reads its letters as bytes; "
                    "spell it in ASCII, or include a sign beyond Latin, such as ｜"
                )
            if isinstance(token, AddedToken) and (token.lstrip or token.rstrip):
                raise ValueError(f"token {str(token)!r} cannot be added: lstrip or rstrip would swallow blanks")
        return super()._add_tokens(new_tokens, special_tokens)

    # ---- saving

    def save_pretrained(self, save_directory, *args, **kwargs) -> tuple[str, ...]:
        """Write the folder whole or not at all: the files appear when all of them are written.

        Raises OSError, naming the folder, when it can't be written.
        """
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=target) as staging:
            try:
                super().save_pretrained(staging, *args, **kwargs)
            except Exception as error:  # for a full disk the tokenizers library raises a bare Exception
                raise OSError(f"{target}: tokenizer not saved, folder left as it was: {error}") from error
            names = sorted(file.relative_to(staging) for file in Path(staging).rglob("*") if file.is_file())
            for name in names:
                (target / name).parent.mkdir(exist_ok=True)
                os.replace(Path(staging, name), target / name)
        return tuple(str(target / name) for name in names)

    def _save_pretrained(self, save_directory, file_names, *args, **kwargs):
        # transformers leaves the two flags out of tokenizer_config.json, the first of the files
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)


def _read_backend(tokenizer_file: str | None, where: str) -> Tokenizer:
    if tokenizer_file is None:
        raise ValueError(f"{where}: no tokenizer.json found; name a folder that has one, or use train_tokenizer")
    try:
        return Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{tokenizer_file}: not a readable tokenizer.json: {error}") from error


def _strings(text: Any) -> Iterator[str]:
    """Every string in nested lists and tuples, in order."""
    if isinstance(text, str):
        yield text
    elif isinstance(text, (list, tuple)):
        for part in text:
            yield from _strings(part)
