"""`deepseek-hf translate`: lines of text in, their translations out, by a model of the translation task."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.files import read_lines, write_text
from ..data.hub import check_source
from ..translation.arguments import TranslateArguments
from .parsing.verbs import parse_verb

EXAMPLES = """examples:
  deepseek-hf translate runs/en-de --input english.txt --output german.txt
  echo "two birds" | deepseek-hf translate runs/en-de --num_beams 5"""


def parse(argv: Sequence[str]) -> tuple[str, TranslateArguments]:
    """The model and the arguments.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    return parse_verb("translate", TranslateArguments, argv, "MODEL [--flag value ...]", EXAMPLES)


def translate(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf translate` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, arguments = parse(argv)
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise ValueError(f"--output {arguments.output}: there is no such folder to write to.")
    check_source(name)
    lines = read_lines(arguments.input)
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from ..translation.translator import open_translator, prompts_of, translate_lines

    prompts = prompts_of(name, arguments)
    disable_progress_bar()  # the bar of loading weights; ours counts texts
    model, tokenizer = open_translator(name, arguments)
    generation_config = prompts.generation_config(tokenizer, arguments.num_beams)
    generation_config.length_penalty = arguments.length_penalty
    count = sum(1 for line in lines if line.strip())
    with tqdm(total=count, desc="translate", unit="text", file=sys.stderr) as bar:
        texts = translate_lines(
            lines, model, tokenizer, prompts, generation_config, arguments.batch_size, report=bar.update
        )
    content = "".join(text + "\n" for text in texts)
    if arguments.output:
        write_text(Path(arguments.output), content)
    else:
        sys.stdout.buffer.write(content.encode("utf-8"))
        sys.stdout.flush()
