"""Parsers of the verbs: bad flags end in one line that names the nearest."""

import argparse
from collections.abc import Sequence
from typing import NoReturn, TypeVar

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ...data.words import nearest_match
from .runs import HelpFormatter

Arguments = TypeVar("Arguments")
TRUTHS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")


class VerbParser(HfArgumentParser):
    """The parser of a verb on a saved model: it raises ValueError with one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help.")

    def with_switches(self, argv: Sequence[str]) -> list[str]:
        """The words with `--flag` of yes or no as `--flag=true`, so that it doesn't take a prompt for its value."""
        found = []
        for word, follower in zip(argv, [*argv[1:], ""], strict=False):
            action = self._option_string_actions.get(word)
            is_switch = action is not None and action.type is string_to_bool and action.nargs != 0
            found.append(f"{word}=true" if is_switch and follower.lower() not in TRUTHS else word)
        return found


def parse_verb(
    verb: str,
    arguments_class: type[Arguments],
    argv: Sequence[str],
    usage: str,
    examples: str,
    words: str | None = None,
) -> tuple[str, Arguments]:
    """The model and the arguments that follow `deepseek-hf VERB`.

    Args:
        usage: what follows the verb, for --help; examples: the end of --help.
        words: the field that takes the words which are no flags, for a verb that has such.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    parser = VerbParser(
        arguments_class,  # type: ignore[arg-type]  # any dataclass will do
        prog=f"deepseek-hf {verb}",
        usage=f"deepseek-hf {verb} {usage}",
        epilog=examples,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0)
    if argv[0].startswith("-"):
        raise ValueError(f"{verb}: the model comes first (a folder or a Hub id), found {argv[0]}.")
    namespace, rest = parser.parse_known_args(parser.with_switches(argv[1:]))
    unknown = [word for word in rest if words is None or word.startswith("--")]
    if unknown:
        near = nearest_match(unknown[0].partition("=")[0], parser._option_string_actions)
        raise ValueError(f"unexpected argument {unknown[0]!r}{near}; see {parser.prog} --help.")
    arguments = arguments_class(**vars(namespace))
    if words:
        setattr(arguments, words, rest)
    return argv[0], arguments


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises ValueError and names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help.")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The arguments.

        Raises:
            ValueError: with one line, for flags that don't fit.
        """
        arguments, rest = self.parse_known_args(argv)
        if rest:
            near = nearest_match(rest[0].partition("=")[0], self._option_string_actions)
            raise ValueError(f"unexpected argument {rest[0]!r}{near}; see {self.prog} --help.")
        return arguments
