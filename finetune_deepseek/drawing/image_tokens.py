"""Image tokens: what a tokenizer calls them, and what turns them into pixels, saved beside the model.

A folder `image_tokens` has the palette, or the codebook with its encoder and decoder, so that whoever has the model
can draw. In the vocabulary they are control tokens behind all others: one that begins an image, then one for each
colour or code, so that letters in a caption can't become one.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from ..data.files import read_json, write_json
from ..training.saved import Saved, download
from .codes import Codes
from .palette import Palette

FOLDER, DESCRIPTION, WEIGHTS = "image_tokens", "image_tokens.json", "codes.safetensors"
BEGIN, NAME = "<｜image｜>", "<｜image▁{}｜>"


class ImageTokens(Protocol):
    """Pixels to numbers and back. Letters: N images, H x W pixels, h x w tokens, K kinds of tokens.

    Attributes:
        kind: "palette" or "codes".
        size: H and W.
        grid: h and w.
        number: K.
    """

    kind: str
    size: tuple[int, int]
    grid: tuple[int, int]
    number: int

    def encode(self, images: np.ndarray) -> np.ndarray:
        """[N, H, W, 3] of bytes -> [N, h * w] of 0 to K - 1, row by row."""

    def decode(self, numbers: np.ndarray) -> np.ndarray:
        """[N, h * w] -> [N, H, W, 3] of bytes."""


def save(tokens: ImageTokens, folder: Path) -> None:
    """Write them into the folder of a model."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    description: dict[str, Any] = {"kind": tokens.kind, "size": list(tokens.size)}
    if isinstance(tokens, Palette):
        description |= {"colours": tokens.colours.tolist()}
    if isinstance(tokens, Codes):
        description |= {"patch": tokens.patch, "number": tokens.number}
        save_file({name: weight.contiguous() for name, weight in tokens.state_dict().items()}, place / WEIGHTS)
    write_json(place / DESCRIPTION, description)


def folder_of(saved: Saved) -> Path:
    """Where the image tokens of a model or adapter lie: beside its tokenizer, of a Hub id in the cache.

    Raises:
        ValueError: if they can't be had from the Hub.
    """
    source = saved.with_tokenizer
    return (
        source.folder if source.commit is None else download(source.where, source.name, source.commit, [f"{FOLDER}/*"])
    )


def load(folder: Path) -> ImageTokens:
    """Read them out of the folder of a model.

    Raises:
        ValueError: if they aren't there, or can't be read.
    """
    path = folder / FOLDER / DESCRIPTION
    found = read_json(path, missing=None)
    if found is None:
        raise ValueError(f"{folder}: there is no {FOLDER}/{DESCRIPTION}, so its tokens can't become pixels.")
    try:
        size = (int(found["size"][0]), int(found["size"][1]))
        if found["kind"] == Palette.kind:
            return Palette(size, np.array(found["colours"], dtype=np.uint8).reshape(-1, 3))
        codes = Codes(size, int(found["patch"]), int(found["number"]))
        codes.load_state_dict(load_file(path.with_name(WEIGHTS)))
        return codes.eval().requires_grad_(False)
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{path}: it can't be read: {' '.join(str(error).split())}.") from error


# In a vocabulary


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    """Put one that begins an image, and one of each kind, behind all other tokens."""
    names = [BEGIN, *(NAME.format(place) for place in range(number))]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)


def first_id(tokenizer: PreTrainedTokenizerBase, number: int) -> int:
    """The id of the first kind of image tokens; the others follow, and what begins an image is in front of it.

    Raises:
        ValueError: if the vocabulary hasn't so many, in a row.
    """
    names = [BEGIN, *(NAME.format(place) for place in range(number))]
    known = tokenizer.get_vocab()
    ids = [known.get(name) for name in names]
    if ids[0] is None or ids != list(range(ids[0], ids[0] + number + 1)):
        raise ValueError(f"{tokenizer.name_or_path}: this tokenizer hasn't the {number + 1} image tokens in a row.")
    return ids[0] + 1
