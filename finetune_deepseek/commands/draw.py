"""`deepseek-hf draw`: captions in, an image file out, by a model of the image generation task."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.files import write_bytes
from ..data.hub import check_source
from ..drawing.arguments import DrawArguments
from .parsing.verbs import parse_verb

EXAMPLES = """examples:
  deepseek-hf draw runs/emoji "a red heart" --output heart.png
  deepseek-hf draw runs/emoji "red heart" 红心 --number 6 --guidance_scale 2 --output hearts.png
      a sheet, a row for each caption"""


def parse(argv: Sequence[str]) -> tuple[str, DrawArguments]:
    """The model and the arguments.

    Raises:
        ValueError: with one line, for flags that don't fit.
    """
    usage = 'MODEL "CAPTION" ... --output FILE [--flag value ...]'
    return parse_verb("draw", DrawArguments, argv, usage, EXAMPLES, "captions")


def draw(argv: Sequence[str]) -> None:
    """Do what `deepseek-hf draw` is followed by.

    Raises:
        ValueError: with one line, for bad input.
    """
    name, arguments = parse(argv)
    if not arguments.captions:
        raise ValueError("There is no caption; write it behind the model, in quotes.")
    if not arguments.output:
        raise ValueError("--output: name the image file to write, such as drawn.png.")
    path = Path(arguments.output)
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no such folder to write to.")
    if path.is_dir():
        raise ValueError(f"--output {path}: this is a folder; name a file in it.")
    check_source(name)
    # Imported here, since torch and transformers take seconds and bad input needs neither.
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from ..drawing.drawer import draw_file
    from ..drawing.sheet import form_of, packed

    form = form_of(path)
    disable_progress_bar()  # the bar of loading weights; ours counts images
    total = len(arguments.captions) * arguments.number
    with tqdm(total=total, desc="draw", unit="image", file=sys.stderr) as bar:
        picture = draw_file(name, arguments, bar.update)
    write_bytes(path, packed(picture, form))
    print(f"{total:,} {'images' if total > 1 else 'image'}: {path}")
