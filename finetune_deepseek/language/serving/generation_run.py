"""What `deepseek-hf generate` does: read, encode, open the model, write."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ...data.files import json_line
from ...training.identity import identity
from ...training.saved import Saved
from .arguments import GenerateArguments
from .chat_format import ChatFormat, choose_template, encode_raw, has_template, likely_template
from .generation import Completion, Generator
from .language_model import TALKING, LanguageModel, device_of, open_tokenizer, opened, require_predictions
from .prompts import Prompt, read_prompts
from .sampling import Sampling
from .written import WrittenLines


def note(text: str) -> None:
    """A line for people, beside standard output, which is for completions."""
    print(f"deepseek-hf: {text}", file=sys.stderr)


def run(name: str, arguments: GenerateArguments) -> None:
    """Continue every prompt and write the lines.

    Raises:
        ValueError: with one line, for bad input.
    """
    prompts = read_prompts(arguments.prompts, arguments.input, arguments.column)
    if not prompts:
        raise ValueError("There is no prompt; write it behind the model, in quotes, or name a file by --input.")
    saved = opened(name, arguments.model_revision, arguments.trust_remote_code)
    if arguments.use_mtp:
        require_predictions(saved)
    tokenizer = open_tokenizer(saved, arguments)
    is_chat = needs_format(arguments, prompts, has_template(tokenizer) and saved.task in TALKING)
    if not (is_chat or arguments.raw or has_template(tokenizer)) and (own := likely_template(name)):
        note(f"{name} brings no chat format; --chat_template {own} has its release's, --raw leaves this line out.")
    encode = chat_encoder(name, arguments, prompts, tokenizer) if is_chat else raw_encoder(tokenizer)
    encoded = [encode(prompt) for prompt in prompts]
    disable_progress_bar()  # the bar of loading weights; ours counts completions
    lm = LanguageModel.open(saved, tokenizer, arguments)
    batch_size = 1 if arguments.use_mtp else arguments.batch_size
    generator = Generator(lm, Sampling.of(arguments, lm.defaults), batch_size)
    generator.check_lengths(encoded, [prompt.where for prompt in prompts])
    written = None
    if arguments.output:
        settings = settings_of(saved, arguments, tokenizer.chat_template if is_chat else None, generator.sampling)
        shown = [prompt.shown for prompt in prompts]
        written = WrittenLines(Path(arguments.output), settings, shown, arguments.overwrite)
    complete(prompts, encoded, generator, written)


def needs_format(arguments: GenerateArguments, prompts: Sequence[Prompt], is_known: bool) -> bool:
    """Whether prompts go through the chat format: as the flags say, else if the model knows one.

    Raises:
        ValueError: for conversations with --raw.
    """
    talks = next((prompt for prompt in prompts if prompt.messages is not None), None)
    if arguments.raw and talks:
        raise ValueError(f"{talks.where}: a conversation needs a chat format; leave --raw out.")
    asked = arguments.chat or arguments.chat_template or arguments.system or arguments.thinking is not None
    return not arguments.raw and bool(asked or talks or is_known)


def raw_encoder(tokenizer: Any) -> Callable[[Prompt], list[int]]:
    """A prompt to the ids of its text as it stands."""
    return lambda prompt: encode_raw(tokenizer, prompt.text or "", prompt.where)


def chat_encoder(
    name: str, arguments: GenerateArguments, prompts: Sequence[Prompt], tokenizer: Any
) -> Callable[[Prompt], list[int]]:
    """A prompt, which a user says, or a conversation to ids.

    Raises:
        ValueError: if there is no chat format.
    """
    choose_template(tokenizer, arguments.chat_template, name)
    chat_format = ChatFormat(tokenizer, name, arguments.thinking)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    if any(prompt.messages is None for prompt in prompts):
        note("prompts go through the chat format; --raw continues them as they stand.")

    def encode(prompt: Prompt) -> list[int]:
        said = prompt.messages or [{"role": "user", "content": prompt.text or ""}]
        return chat_format.encode([*system, *said], prompt.where, prompt.tools)

    return encode


def settings_of(saved: Saved, arguments: GenerateArguments, template: Any, sampling: Sampling) -> dict[str, Any]:
    """What completions depend on, beside their prompts."""
    digest = hashlib.sha256(repr(template).encode()).hexdigest()[:16] if template else None
    dtype = arguments.dtype or ("float32" if device_of(arguments.device).type == "cpu" else "auto")
    said = {"chat_format": digest, "system": arguments.system, "thinking": arguments.thinking, "dtype": dtype}
    name = saved.name if saved.commit else saved.folder.resolve().name
    return {"model": name, "weights": identity(saved)} | said | asdict(sampling)


def complete(
    prompts: Sequence[Prompt], encoded: Sequence[list[int]], generator: Generator, written: WrittenLines | None
) -> None:
    """Continue those prompts whose lines aren't there yet, each window written when it is done."""
    done = 0 if written is None else written.done
    if written and done:
        note(f"{written.path}: {done:,} of {len(prompts):,} prompts are there; going on behind them.")
    note(f"next token: {generator.sampling.shown}.")
    total = (len(prompts) - done) * generator.copies
    with tqdm(total=total, desc="generate", unit="text", file=sys.stderr) as bar:
        generator.report = bar.update
        lines = lines_of(prompts[done:], generator.completions(encoded, done))
        (written.write if written else show)(lines)
    if generator.tokens:
        rate = generator.tokens / generator.seconds
        note(f"{generator.tokens:,} tokens in {generator.seconds:.1f} s: {rate:,.0f} tokens/s.")


def lines_of(prompts: Iterable[Prompt], completions: Iterable[Sequence[Completion]]) -> Iterator[dict[str, Any]]:
    """A line for each prompt."""
    for prompt, found in zip(prompts, completions, strict=True):
        yield prompt.shown | {"completions": [completion._asdict() for completion in found]}


def show(lines: Iterable[dict[str, Any]]) -> None:
    """Lines to standard output, as they come."""
    for line in lines:
        sys.stdout.buffer.write(json_line(line).encode("utf-8"))
        sys.stdout.buffer.flush()
