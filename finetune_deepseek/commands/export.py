"""`deepseek-hf export`: a checkpoint in the form that others read."""

import argparse
import sys
from collections.abc import Sequence

from ..data.hub import check_named, check_source
from .parsing.verbs import Parser

FORMS, DTYPES = ("native", "bundle", "gguf"), ("bf16", "fp32", "fp8")  # those of checkpoints/, which imports torch

EXAMPLES = """examples:
  deepseek-hf export runs/translation exported --to native                 for transformers, vLLM, SGLang
  deepseek-hf export runs/translation exported --to bundle                 for trust_remote_code
  deepseek-hf export runs/translation model.gguf --to gguf --dtype bf16    for llama.cpp, Ollama
  deepseek-hf export deepseek-ai/DeepSeek-V2-Lite merged --to native --merge-adapter runs/adapter
  deepseek-hf export runs/adapter adapter-2d --adapter-format per-expert   for servers that read no fused experts"""


def parser() -> Parser:
    """The flags of `deepseek-hf export`."""
    flags = Parser(
        prog="deepseek-hf export",
        description="Write a checkpoint in the form that others read. It passes through memory one shard at a time,\n"
        "is read again and compared, and only then takes its place. Nothing that exists is overwritten.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("source", metavar="SRC", help="folder or Hub id of a model (or adapter, see --adapter-format)")
    flags.add_argument("destination", metavar="DST", help="folder that doesn't exist yet; for gguf a file")
    flags.add_argument(
        "--to",
        choices=FORMS,
        help="native: config and names of the release, for transformers' own classes, vLLM, SGLang. "
        "bundle: with this package's code, for trust_remote_code. gguf: for llama.cpp and Ollama.",
    )
    flags.add_argument(
        "--merge-adapter", "--merge_adapter", metavar="DIR", help="LoRA adapter to merge into the weights"
    )
    flags.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the weights; without it, the one they are stored in. fp8: e4m3 in blocks of 128 x 128, as V3's",
    )
    flags.add_argument("--max-shard-size", "--max_shard_size", metavar="SIZE", help="of a weight file; 5GB without it")
    flags.add_argument(
        "--adapter-format",
        "--adapter_format",
        choices=["per-expert"],
        help="SRC is a LoRA adapter on fused experts: write it as two-dimensional adapters, one per expert and "
        "projection, under official names",
    )
    return flags


def export(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf export` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    arguments = parser().parse(list(argv) or ["--help"])
    if arguments.adapter_format:
        if arguments.to or arguments.merge_adapter or arguments.dtype:
            raise ValueError("--adapter-format rewrites an adapter and nothing else; leave out the other flags.")
    elif arguments.to is None:
        raise ValueError(f"--to is missing; choose from {', '.join(FORMS)}.")
    check_source(arguments.source)
    if arguments.merge_adapter:
        check_named("merge-adapter", arguments.merge_adapter)
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from tqdm import tqdm

    from ..checkpoints import export as forms

    if arguments.adapter_format:
        forms.export_adapter(arguments.source, arguments.destination)
        return
    size = {} if arguments.max_shard_size is None else {"max_shard_size": arguments.max_shard_size}
    unit = "tensor" if arguments.to == "gguf" else "shard"
    with tqdm(desc=f"export to {arguments.to}", unit=unit, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        forms.FORMS[arguments.to](
            arguments.source,
            arguments.destination,
            adapter=arguments.merge_adapter,
            dtype=arguments.dtype,
            report=report,
            **size,
        )
