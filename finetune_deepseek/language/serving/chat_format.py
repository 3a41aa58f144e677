"""Texts and conversations as the ids that a model goes on from: a chat format, or the text as it stands."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from tokenization_deepseek import CHAT_TEMPLATES, DeepSeekTokenizer, encode_chat, template_name

from ...data.files import read_text
from ...data.words import nearest_match

SWITCHES = ("thinking", "enable_thinking")  # what templates call it


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer came with a chat format."""
    return bool(getattr(tokenizer, "chat_template", None))


def likely_template(name: str) -> str | None:
    """The chat format of a release by its name; None for other names."""
    try:
        return template_name(name)
    except ValueError:
        return None


def choose_template(tokenizer: Any, asked: str | None, where: str) -> None:
    """Give the tokenizer the chat format that --chat_template names, a word of `CHAT_TEMPLATES` or a file.

    Raises:
        ValueError: if there is no such format; without a flag, if the tokenizer has none.
    """
    known = ", ".join(CHAT_TEMPLATES)
    if asked is None:
        if not has_template(tokenizer):
            raise ValueError(
                f"{where}: its tokenizer has no chat format; name the one that it was trained on, "
                f"--chat_template {likely_template(where) or 'v3 say'} (there is {known}), or a .jinja file."
            )
    elif asked in CHAT_TEMPLATES:
        tokenizer.chat_template = CHAT_TEMPLATES[asked]
    elif Path(asked).is_file():
        tokenizer.chat_template = read_text(asked, f"--chat_template {asked}")
    else:
        near = nearest_match(asked, CHAT_TEMPLATES)
        raise ValueError(f"--chat_template {asked}: no such format or file{near}; there is {known}.")


class ChatFormat:
    """Conversations as ids, by the tokenizer's chat format as it is.

    Args:
        thinking: the format's switch for reasoning; None leaves it as the format has it.

    Raises:
        ValueError: if the format has no such switch.
    """

    def __init__(self, tokenizer: Any, where: str, thinking: bool | None = None):
        self.tokenizer, self.where = tokenizer, where
        template = tokenizer.chat_template
        text = " ".join(template.values()) if isinstance(template, dict) else str(template)
        self.variables = {} if thinking is None else {name: thinking for name in SWITCHES if name in text}
        if thinking is not None and not self.variables:
            raise ValueError(f"--thinking {str(thinking).lower()}: the chat format of {where} has no such switch.")

    def encode(self, messages: list[dict[str, Any]], where: str, tools: list[Any] | None = None) -> list[int]:
        """The ids up to where the model's answer begins; of a conversation that ends in an answer, up to its end.

        Raises:
            ValueError: with `where`, for what the format has no place for.
        """
        goes_on = messages[-1]["role"] == "assistant"
        options: Any = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        options |= {"tools": tools, "return_dict": True, **self.variables}
        try:
            if isinstance(self.tokenizer, DeepSeekTokenizer) or not self.tokenizer.is_fast:
                encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, **options)
            else:
                encoded = encode_chat(self.tokenizer, messages, **options)
        except (TemplateError, TypeError, ValueError) as error:  # templates add texts to what is none
            raise ValueError(f"{where}: {' '.join(str(error).split()).rstrip('.')}.") from error
        return list(encoded["input_ids"])


def encode_raw(tokenizer: Any, text: str, where: str) -> list[int]:
    """The ids of a text to go on with, control tokens read as such; of an empty text its beginning alone.

    Raises:
        ValueError: if there would be nothing to go on from.
    """
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()  # put on by a tokenizer that was made for training
    if not ids and tokenizer.bos_token_id is None:
        raise ValueError(f"{where}: an empty prompt, and this model has no token that begins a text; write a prompt.")
    return ids or [tokenizer.bos_token_id]
