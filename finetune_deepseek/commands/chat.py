"""`deepseek-hf chat`: a conversation with a language model in the terminal."""

import sys
from collections.abc import Sequence

from ..data.hub import check_source
from ..language.serving.arguments import ChatArguments
from .parsing.verbs import parse_verb

EXAMPLES = """examples:
  deepseek-hf chat deepseek-ai/DeepSeek-V2-Lite-Chat --temperature 0.6
  deepseek-hf chat runs/model --chat_template v3.1 --thinking true
  printf 'Hello!\\nIn Chinese, please.\\n' | deepseek-hf chat runs/model
      a line, an answer; standard output has the answers alone

/help lists the commands of a conversation."""


def parse(argv: Sequence[str]) -> tuple[str, ChatArguments]:
    """The model and the arguments.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    return parse_verb("chat", ChatArguments, argv, "MODEL [--flag value ...]", EXAMPLES)


def chat(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf chat` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, arguments = parse(argv)
    check_source(name)
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from transformers.utils.logging import disable_progress_bar

    from ..language.serving.chat_format import ChatFormat, choose_template
    from ..language.serving.conversation import Conversation
    from ..language.serving.language_model import TALKING, LanguageModel, open_tokenizer, opened, require_predictions
    from ..language.serving.terminal import Terminal

    if not sys.stdin.isatty():
        disable_progress_bar()  # the bar of loading weights
    saved = opened(name, arguments.model_revision, arguments.trust_remote_code)
    if arguments.use_mtp:
        require_predictions(saved)
    tokenizer = open_tokenizer(saved, arguments)
    choose_template(tokenizer, arguments.chat_template, name)
    ChatFormat(tokenizer, name, arguments.thinking)  # refuses what doesn't fit before the weights are read
    terminal = Terminal(Conversation(LanguageModel.open(saved, tokenizer, arguments), arguments))
    if saved.task not in TALKING:
        terminal.note(f"{name} was trained for {saved.task}, not on conversations; expect little of its answers.")
    if terminal.asks:
        terminal.note(f"{name}: /help lists the commands, /exit or Ctrl-D ends.")
    terminal.run()
