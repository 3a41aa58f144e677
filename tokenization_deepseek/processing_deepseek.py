"""Images and text as what the model of images and text takes (V4.1): a prompt's places, and patches of pixels.

In a text `<｜deepseek_image｜>` stands for an image. Among the ids it becomes h (w + 1) + 2 tokens of its kind, for an
image of which the model makes h x w tokens: a start, a newline behind each row, an end. How an image is made ready, as
by the release's own code:

    1. too wide, by max_wh_ratio: as if it were narrower (V4.1 has no such bound)
    2. fewer pixels than min_pixels: scaled up to as many
    3. both sides up to whole patches; if that takes more places than max_image_tokens, scaled down to the largest size
       that doesn't, h = w r of the image's own ratio r solving h (w + 1) + 2 = max_image_tokens
    4. resized into that size with its ratio kept, grey beside it, and colours from -1 to 1

This file travels to the Hub: it imports numpy, Pillow and transformers only.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, PreTrainedConfig
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PROCESSOR_NAME, cached_file

from .chat_parts import IMAGE  # as templates write it; a tokenizer may spell the token otherwise

GREY = (127, 127, 127)
SOURCES = ("image", "url", "path", "base64")  # where a part of a message has its image
SETTINGS = ("patch_size", "downsample_ratio", "max_image_tokens", "min_pixels", "max_wh_ratio")
FINISH = ("padding", "padding_side", "pad_to_multiple_of", "max_length", "return_tensors")  # once images have places
TOKENIZED = (  # options that keep one row for each text
    *("add_special_tokens", "split_special_tokens", "return_attention_mask", "return_token_type_ids"),
    *("return_special_tokens_mask", "return_offsets_mapping", "verbose"),
)
PLACE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class DeepSeekProcessor(ProcessorMixin):
    """Makes a model's inputs of images and text; saved and opened as processors are, by `AutoProcessor` too.

    tokenizer: knows the token `image_token_id`.
    image_token_id: stands at the places of images.
    patch_size, downsample_ratio: as in the model's `vision_config`; pixels of a patch, patches of a token.
    max_image_tokens, min_pixels: the most places of an image, and the fewest pixels.
    max_wh_ratio: the most of width to height, if there is a bound.

    Raises ValueError: a tokenizer without that token.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_token_id: int,
        patch_size: int,
        downsample_ratio: int,
        max_image_tokens: int,
        min_pixels: int,
        max_wh_ratio: float | None = None,
        chat_template: str | dict[str, str] | None = None,
    ):
        super().__init__(tokenizer)
        self.chat_template = chat_template
        self.image_token_id, self.patch_size, self.downsample_ratio = image_token_id, patch_size, downsample_ratio
        self.max_image_tokens, self.min_pixels, self.max_wh_ratio = max_image_tokens, min_pixels, max_wh_ratio
        if not 0 <= image_token_id < len(tokenizer):
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, none of them image_token_id={image_token_id}; add "
                f"{IMAGE} to it, as a special token of that number"
            )
        self.image_token = tokenizer.convert_ids_to_tokens(image_token_id)

    @property
    def chat_template(self) -> Any:
        """The tokenizer's."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        if template is not None:
            self.tokenizer.chat_template = template

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of what a call gives."""
        return [*self.tokenizer.model_input_names, "pixel_values", "image_grid_thw"]

    # Prompts ---------------------------------------------------------------------------------------------------------

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> BatchFeature:
        """Texts with images as a batch.

        Args:
            images: one image, or those of all texts in order, or a list of them for each text: of Pillow, of numpy
                (uint8, [height, width, channels]), or a path, URL or base64 that transformers' `load_image` takes.
            text: a text or several; `<｜deepseek_image｜>` stands for an image.
            options: `padding`, `padding_side`, `max_length`, `pad_to_multiple_of`, `return_tensors`; and of the
                tokenizer's those that leave a row for each text.

        Returns:
            What the tokenizer gives, images' tokens repeated, and of images `pixel_values` [P, 3 * patch_size^2],
            their patches, and `image_grid_thw` [I, 3], 1 with height and width in patches.

        Raises:
            ValueError: for images and places in the texts that are not as many; for what is no image or no text; for
                truncation, which would cut an image, and other options that it doesn't know.
        """
        if text is None:
            raise ValueError(f"give a text too, with {IMAGE} where an image stands")
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else []
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError("text must be a text or a list of texts; images go first, or by name")
        options = _known(options, *FINISH, *TOKENIZED)
        finish = {name: options.pop(name) for name in FINISH if name in options}
        rows = self.tokenizer([one.replace(IMAGE, self.image_token) for one in texts], **options)
        return self.joined(dict(rows), images, **finish)

    def apply_chat_template(  # type: ignore[override]  # what it leaves out is of sounds, or goes to the tokenizer
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or several, as text or ids; images stand in contents, as {"type": "image", "image": ...}.

        Args:
            chat_template, kwargs: as the tokenizer's takes them.
            tokenize: give what `__call__` gives (with `return_dict`; else its `input_ids`), not a text.
            processor_kwargs: `padding` and the like, which may stand among kwargs too, and `images` where messages
                have none of their own.

        Raises:
            ValueError: for an image without a source, and for one among a tool's results, which templates sort anew;
                for truncation.
        """
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError("a conversation is a list of messages, of one at least")
        template = self.tokenizer.get_chat_template(chat_template, kwargs.get("tools"))
        kwargs |= {"chat_template": template.replace(IMAGE, self.image_token), "with_images": True}
        is_batch = not isinstance(conversation[0], dict)
        chats: Any = conversation if is_batch else [conversation]
        bare = [[_without_sources(message) for message in chat] for chat in chats]
        if not tokenize:
            return self.tokenizer.apply_chat_template(bare if is_batch else bare[0], tokenize=False, **kwargs)
        finish = {name: kwargs.pop(name) for name in (*FINISH, "truncation") if name in kwargs}
        finish = _known(finish | (processor_kwargs or {}), *FINISH, "images")
        found = finish.pop("images", None) or [list(_images_of(chat)) for chat in chats]
        rows = self.tokenizer.apply_chat_template(bare, tokenize=True, return_dict=True, **kwargs)
        made = self.joined(dict(rows), found, **{"return_tensors": return_tensors, **finish})
        return made if return_dict else made["input_ids"]

    def joined(
        self,
        rows: dict[str, list[list[Any]]],
        images: Any,
        return_tensors: str | None = None,
        **padding: Any,
    ) -> BatchFeature:
        """Rows of tokens with one for each image, and the images, as `__call__` gives them.

        Raises:
            ValueError: as `__call__`.
        """
        found = [self._read(*image) for image in enumerate(self._in_order(images, rows["input_ids"]), 1)]
        places = iter([self.places_of(*grid) for _, grid in found])
        repeats = [[next(places) if token == self.image_token_id else 1 for token in row] for row in rows["input_ids"]]
        data: dict[str, Any] = {name: [_repeated(*pair) for pair in zip(values, repeats, strict=True)]
                                for name, values in rows.items()}  # fmt: skip
        data = dict(self._padded(data, **padding))
        if found:
            data["pixel_values"] = numpy.concatenate([patches for patches, _ in found])
            data["image_grid_thw"] = numpy.array([[1, *grid] for _, grid in found])
        return BatchFeature(data, tensor_type=return_tensors)

    def _in_order(self, images: Any, ids: list[list[int]]) -> list[Any]:
        """The images of all rows.

        Raises:
            ValueError: if they are not as many as their tokens.
        """
        counts = [row.count(self.image_token_id) for row in ids]
        flat = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        is_by_text = any(isinstance(row, (list, tuple)) for row in flat)
        if is_by_text and not all(isinstance(row, (list, tuple)) for row in flat):
            raise ValueError("images must be a list for each text (empty where it has none), or those of all in order")
        needed, given = ([sum(counts)], [len(flat)]) if not is_by_text else (counts, list(map(len, flat)))
        if needed != given:
            places, images = (", ".join(map(str, numbers)) for numbers in (needed, given))
            raise ValueError(
                f"the texts have {places} places for images ({self.image_token}), but {images} images were given"
            )
        return [image for row in flat for image in row] if is_by_text else flat

    def _padded(
        self,
        data: dict[str, list[list[Any]]],
        padding: bool | str | None = None,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, list[list[Any]]]:
        """Rows of one length, on the tokenizer's side or another."""
        side = padding_side or self.tokenizer.padding_side
        if (padding == "max_length") != (max_length is not None):
            raise ValueError(f"padding={padding!r} with max_length={max_length}: give both of them, or padding=True")
        if padding not in (None, False, True, "do_not_pad", "longest", "max_length") or side not in ("left", "right"):
            raise ValueError(f"padding={padding!r}, padding_side={side!r}: give True or False, and left or right")
        if padding in (None, False, "do_not_pad"):
            return data
        length = max([max_length or 0, *map(len, data["input_ids"])])
        length += -length % (pad_to_multiple_of or 1)

        def filled(name: str, row: list[Any]) -> list[Any]:
            blank = self.tokenizer.pad_token_id if name == "input_ids" else 0
            gap = [blank] * (length - len(row))
            return gap + row if side == "left" else row + gap

        return {name: [filled(name, row) for row in rows] for name, rows in data.items()}

    # Images ----------------------------------------------------------------------------------------------------------

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image in pixels -> height and width of what is made of it, in whole patches."""
        patch, cell = self.patch_size, self.patch_size * self.downsample_ratio
        wide: float = width if self.max_wh_ratio is None else min(width, height * self.max_wh_ratio)
        tall = height
        if wide * tall < self.min_pixels:
            grown = (self.min_pixels / (wide * tall)) ** 0.5
            wide, tall = int(wide * grown), int(tall * grown)
        size = math.ceil(tall / patch), math.ceil(wide / patch)
        if self.places_of(*size) <= self.max_image_tokens:
            return size
        ratio = tall / wide
        most_wide = math.sqrt((self.max_image_tokens - 2) / ratio + 0.25) - 0.5  # tokens, as a real number
        most_tall = most_wide * ratio
        if most_wide < 1:
            return (self.max_image_tokens - 2) // 2 * self.downsample_ratio, self.downsample_ratio
        if most_tall < 1:
            return self.downsample_ratio, (self.max_image_tokens - 3) * self.downsample_ratio
        shrunk = min(math.floor(most_wide) * cell / wide, math.floor(most_tall) * cell / tall)
        return math.floor(tall * shrunk / patch), math.floor(wide * shrunk / patch)

    def places_of(self, height: int, width: int) -> int:
        """How many tokens stand for an image of so many patches."""
        rows, columns = (-(-side // self.downsample_ratio) for side in (height, width))
        return rows * (columns + 1) + 2

    def _read(self, number: int, image: Any) -> tuple[numpy.ndarray, tuple[int, int]]:
        """`patches_of` of the image of a number.

        Raises:
            ValueError: if it is none, or broken.
        """
        try:
            return self.patches_of(image)
        except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            source = f" ({image})" if isinstance(image, (str, os.PathLike)) and len(str(image)) < 200 else ""
            reason = " ".join(str(error).split())[:300]  # transformers' has all letters of what is no base64
            raise ValueError(f"image {number}{source} can't be read: {reason}") from error

    def patches_of(self, image: Any) -> tuple[numpy.ndarray, tuple[int, int]]:
        """An image -> float32 [height width, 3 * patch_size^2], and height and width in patches."""
        picture = _picture(image)
        height, width = self.size_of(*picture.size)
        size, patch = (width * self.patch_size, height * self.patch_size), self.patch_size
        if self.max_wh_ratio is not None and picture.width >= self.max_wh_ratio * picture.height:
            picture = picture.resize(size)
        else:
            picture = ImageOps.pad(picture, size, color=GREY)
        pixels = (numpy.asarray(picture, dtype=numpy.float32) / 255 - 0.5) / 0.5
        patches = pixels.reshape(height, patch, width, patch, 3).transpose(0, 2, 4, 1, 3)
        return patches.reshape(height * width, -1), (height, width)

    # Opening ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers', and of a checkpoint without processor_config.json, as releases are, by its config.json.

        `AutoProcessor` comes here for every checkpoint of our models. One that has no eyes gets what it would get from
        there if no processor were known: its tokenizer, or its image processor.
        """
        if kwargs.get("_from_auto") and not cls._sees(pretrained_model_name_or_path, **kwargs):
            try:
                return AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
            except (OSError, ValueError):
                return AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _sees(cls, name: Any, **kwargs: Any) -> bool:
        place = {word: kwargs[word] for word in PLACE if kwargs.get(word) is not None}
        if cached_file(name, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **place) is not None:
            return True
        config, _ = PreTrainedConfig.get_config_dict(name, **place)
        is_release = config.get("model_type") == "deepseek_v41"
        is_head = any(word.endswith("ForImageTextToText") for word in config.get("architectures") or ())
        return isinstance(config.get("vision_config"), dict) and (is_release or is_head)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """As transformers'; what processor_config.json doesn't have comes from config.json.

        Raises:
            ValueError: if there is neither.
        """
        place = {word: kwargs[word] for word in PLACE if kwargs.get(word) is not None}
        found, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "image_token_id" in found:
            return found, rest
        config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **place)
        vision = config.get("vision_config")
        if not isinstance(vision, dict):
            raise ValueError(f"{pretrained_model_name_or_path}: config.json describes no model of images and text")
        own = {word: vision[word] for word in SETTINGS if word in vision}
        if lacking := {*SETTINGS[:-1], "image_token_id"} - {*own, *config}:
            raise ValueError(f"{pretrained_model_name_or_path}: config.json has no {min(lacking)} for images")
        return {"image_token_id": config["image_token_id"], **own, **found}, rest


def _known(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Options that are given.

    Raises:
        ValueError: for one that would cut images or change nothing.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if options.pop("truncation", False) not in (False, "do_not_truncate"):
        raise ValueError("truncation would cut images off their places; make the texts shorter")
    if foreign := sorted(options.keys() - {*names}):
        raise ValueError(f"the processor has no option {foreign[0]}; leave it out")
    return options


def _picture(image: Any) -> Image.Image:
    """What is given as an image -> RGB.

    Raises:
        ValueError: for an array that isn't one of bytes, and as `in_rgb`.
    """
    if isinstance(image, numpy.ndarray):
        shape = image.shape[:2] if image.ndim == 3 and image.shape[2] == 1 else image.shape
        is_image = len(shape) == 2 or len(shape) == 3 and shape[2] in (3, 4)
        if image.dtype != numpy.uint8 or not image.size or not is_image:
            raise ValueError(
                f"an array {list(image.shape)} of {image.dtype} is no image; give uint8, [height, width, channels]"
            )
        image = Image.fromarray(image.reshape(shape))
    is_file = isinstance(image, os.PathLike) or isinstance(image, str) and os.path.isfile(image)
    picture = Image.open(image) if is_file else image if isinstance(image, Image.Image) else load_image(image)
    return in_rgb(ImageOps.exif_transpose(picture))


def in_rgb(picture: Image.Image) -> Image.Image:
    """An image as RGB. Of 16 bits a colour's upper 8 count, where Pillow would make white of it.

    Raises:
        ValueError: for an image of real numbers, of which none says the range.
    """
    if picture.mode == "F":
        raise ValueError("it has real numbers; scale them to bytes")
    if picture.mode.startswith("I"):  # "I" may be either, by what made it
        levels = numpy.asarray(picture)
        levels = levels >> (8 if picture.mode != "I" or levels.max() > 255 else 0)
        picture = Image.fromarray(levels.clip(0, 255).astype(numpy.uint8))
    return picture.convert("RGB")


def _repeated(values: list[Any], repeats: list[int]) -> list[Any]:
    return [value for value, count in zip(values, repeats, strict=True) for _ in range(count)]


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return list(content) if isinstance(content, (list, tuple)) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _without_sources(message: dict[str, Any]) -> dict[str, Any]:
    if not any(map(_is_image, _parts(message))):
        return message
    return {**message, "content": [{"type": "image"} if _is_image(part) else part for part in _parts(message)]}


def _images_of(chat: list[dict[str, Any]]) -> Iterator[Any]:
    """The images of a conversation, in order."""
    for number, message in enumerate(chat, 1):
        for part in filter(_is_image, _parts(message)):
            url = part.get("image_url")
            source = url.get("url") if isinstance(url, dict) else url
            source = next((part[word] for word in SOURCES if part.get(word) is not None), source)
            if source is None:
                raise ValueError(f"message {number}: an image has none of {', '.join(SOURCES)}, image_url")
            if message.get("role") == "tool":
                raise ValueError(f"message {number}: an image is a tool's result; put it in a message of the user")
            yield source
