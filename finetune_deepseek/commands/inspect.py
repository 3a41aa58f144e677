"""`deepseek-hf inspect`: what a checkpoint is, in words or as JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..data.hub import check_source
from .parsing.verbs import Parser

if TYPE_CHECKING:
    from ..checkpoints.inspection import Inspection

EXAMPLES = """examples:
  deepseek-hf inspect runs/translation
  deepseek-hf inspect deepseek-ai/DeepSeek-V2-Lite --json"""


def in_words(found: "Inspection") -> str:
    """The report as text."""
    total, mtp = found.total, found.parameters.get("mtp", 0)
    lines = [
        f"{found.source}: {found.generation} ({found.model_type}), {found.head}",
        *(f"  layers {key:<11}{value}" for key, value in found.layers.items()),
        f"  positions         {found.positions}",
        f"  parameters        {total - mtp:,}, {found.active:,} active per token" + (f"; MTP {mtp:,}" if mtp else ""),
        *(f"    {group:<18}{count:>18,}" for group, count in found.parameters.items()),
        f"  stored as         {', '.join(f'{dtype} ({count:,})' for dtype, count in found.stored.items())}",
        f"  memory            {', '.join(f'{size(count)} {dtype}' for dtype, count in found.memory.items())}",
        f"  cache             {cache(found)}",
        f"  weights           {found.weights}",
        *(f"  tokenizer         {line}" for line in found.tokenizer),
    ]
    return "\n".join(lines)


def cache(found: "Inspection") -> str:
    """Bytes per token, by kind of attention if there are several, and of whole contexts."""
    kinds = [f"{kind} {count:,.10g}" for kind, count in found.cache_by_attention.items()]
    parts = f" ({', '.join(kinds)})" if len(kinds) > 1 else ""
    whole = ", ".join(f"{size(count)} at {tokens} tokens" for tokens, count in found.cache_at.items())
    return f"{found.cache_per_token:,.10g} bytes per token in bfloat16{parts}; {whole}"


def size(count: int) -> str:
    """Bytes in words: 1.3 GB."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def inspect(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf inspect` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    parser = Parser(
        prog="deepseek-hf inspect",
        description="Say what a checkpoint is: generation, mechanisms per layer, parameters, memory, cache, and\n"
        "whether its tokenizer is sound. Reads config, tokenizer and headers of weight files; loads no weight.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="folder or Hub id of a model or adapter")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse(list(argv) or ["--help"])
    check_source(arguments.source)
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from ..checkpoints.inspection import describe_adapter, inspect_checkpoint
    from ..training.saved import Saved

    saved = Saved.open(None, arguments.source, arguments.revision).require_model()
    if saved.is_adapter:
        print(describe_adapter(saved))
        return
    found = inspect_checkpoint(saved)
    json.dump(asdict(found), sys.stdout, indent=2) if arguments.json else print(in_words(found))
