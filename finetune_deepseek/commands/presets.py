"""`deepseek-hf presets`: the named sizes, for `--preset`."""

from collections.abc import Sequence

from configuration_deepseek.presets import ABOUT

USAGE = """usage: deepseek-hf presets

The named sizes that --preset takes. Parameters are those of the language model, all of them and those that one token
uses, without prediction layers."""


def presets(argv: Sequence[str]) -> None:
    """Print a line for each preset.

    Raises:
        ValueError: for an argument.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv:
        raise ValueError(f"presets: unexpected argument {argv[0]!r}; it takes none.")
    heading = ("name", "generation", "total", "active", "what for")
    for name, generation, total, active, use in [heading, *((name, *about) for name, about in ABOUT.items())]:
        print(f"{name:<14}{generation:<12}{total:>8}  {active:>8}  {use}")
