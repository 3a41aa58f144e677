"""`deepseek-hf generate`: prompts of a file, of standard input or of the command line, continued by a model."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.arguments import check_path
from ..data.hub import check_source
from ..language.serving.arguments import GenerateArguments
from .parsing.verbs import parse_verb

EXAMPLES = """examples:
  deepseek-hf generate runs/model "Once upon a time" --max_new_tokens 40
  deepseek-hf generate runs/model --input prompts.txt --output completions.jsonl
      a prompt in each line; the same command again goes on with a file that is half written
  deepseek-hf generate deepseek-ai/DeepSeek-V2-Lite-Chat --input questions.parquet --column question \\
      --temperature 0.7 --num_return_sequences 4

A model with a chat format gets each prompt as what a user says (--raw continues the text as it stands); one without,
or one that was trained here for another task, gets the text. A conversation (a list of messages) is put into the chat
format, and one that ends in an answer is gone on with. Completions are drawn by seed, row and number alone: the batch
changes rounding, nothing else."""


def parse(argv: Sequence[str]) -> tuple[str, GenerateArguments]:
    """The model and the arguments.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    return parse_verb(
        "generate", GenerateArguments, argv, 'MODEL ["PROMPT" ...] [--flag value ...]', EXAMPLES, "prompts"
    )


def generate(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf generate` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, arguments = parse(argv)
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise ValueError(f"--output {arguments.output}: there is no such folder to write to.")
    if arguments.output and Path(arguments.output).is_dir():
        raise ValueError(f"--output {arguments.output}: this is a folder; name a file in it.")
    if arguments.output and arguments.input and Path(arguments.output).resolve() == Path(arguments.input).resolve():
        raise ValueError(f"--output {arguments.output}: it is the --input; name another file.")
    if arguments.prompts and arguments.input:
        raise ValueError(f"--input and the prompt {arguments.prompts[0]!r}: two places for prompts; keep one of them.")
    if not arguments.prompts and not arguments.input and sys.stdin.isatty():
        raise ValueError("There is no prompt; write it behind the model, in quotes, or name a file by --input.")
    check_path("input", arguments.input)
    check_source(name)
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from ..language.serving.generation_run import run

    run(name, arguments)
