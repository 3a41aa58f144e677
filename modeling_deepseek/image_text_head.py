"""The head for images and text (V4.1): the language model, with a vision tower that makes tokens of images.

In `input_ids` every place of an image holds `config.image_token_id`, so that routers and Engram know it. What stands
there in place of the token's embedding, for an image of which the aligner made h x w tokens:

    start   t t t .. t newline   t t t .. t newline   ..   end             h (w + 1) + 2 places

start, newline and end are learned vectors. Places of images are read as text is: each sees what came before it.

Letters: B batch, S tokens, I images, P patches of all images, N places of all images, D hidden width.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .cache import takes_cache
from .configuration_deepseek import DeepSeekConfig
from .language_heads import DeepSeekForCausalLM
from .layers import is_traced
from .losses import IGNORED
from .outputs import DeepSeekCausalLMOutput
from .transformers_names import CACHE_WORD
from .vision_tower import DeepSeekAligner, DeepSeekVisionTower, Grids

logger = logging.get_logger(__name__)
IMAGES = ("pixel_values", "image_grid_thw")


def stretches(is_image: torch.Tensor) -> list[list[int]]:
    """[B, S] -> row and length of each stretch of an image's places, in order."""
    steps = F.pad(is_image.int(), (1, 1)).diff(dim=1)
    begins, ends = (steps == 1).nonzero(), (steps == -1).nonzero()
    return torch.stack((begins[:, 0], ends[:, 1] - begins[:, 1]), dim=1).tolist()


def images_of_rows(input_ids: torch.Tensor, image_token_id: int, places: list[int]) -> list[int]:
    """[B, S] and the places of each image -> how many of the images each row has; they are given row by row.

    Raises:
        ValueError: if a stretch of image tokens is not one or several whole images, and for images without a place.
    """
    counts, taken = [0] * len(input_ids), 0
    for row, length in stretches(input_ids == image_token_id):
        first, found = taken, 0
        while found < length and taken < len(places):
            found, taken = found + places[taken], taken + 1
        if found != length:
            raise ValueError(
                f"row {row} of input_ids has {length} image tokens (id {image_token_id}) together, but the images "
                f"that stand there have {found} places; make input_ids and pixel_values by one call of the processor"
            )
        counts[row] += taken - first
    if taken < len(places):
        raise ValueError(
            f"{len(places)} images were given, but input_ids have image tokens (id {image_token_id}) for {taken}; "
            "make input_ids and pixel_values by one call of the processor"
        )
    return counts


class SuppressImages(SuppressTokensLogitsProcessor):
    """A class of its own: transformers drops what `suppress_tokens` asks for if one of that class is given."""


class DeepSeekForImageTextToText(DeepSeekForCausalLM):
    """The language model of images and text. It learns and generates text."""

    input_modalities = ["image", "text"]
    _own_weights = ("vision.", "aligner.", "image_")
    _keys_to_ignore_on_load_unexpected: list[str] = []

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.vision = DeepSeekVisionTower(config)
        self.aligner = DeepSeekAligner(config)
        for name in ("image_start", "image_newline", "image_end"):
            setattr(self, name, nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range))
        self.post_init()

    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | str = 0,
        output_draft_states: bool = False,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs,
    ) -> DeepSeekCausalLMOutput:
        """Arguments as in `DeepSeekForCausalLM.forward`, and

        pixel_values: [P, 3 * patch_size^2], the images' patches: of each, channel by channel, row by row; image after
            image, row of the batch after row.
        image_grid_thw: [I, 3]; 1, and height and width of each image in patches.
        labels: those at places of images are left out; who counts labels, as Trainer does, has to have them -100.

        Raises:
            ValueError: where image tokens and images do not fit together, or only one of the two is given.
        """
        embeds = self.image_embeds(input_ids, pixel_values, image_grid_thw)
        if labels is not None and input_ids is not None:
            labels = self._of_text(labels, input_ids == self.config.image_token_id, **kwargs)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_draft_states=output_draft_states,
            image_embeds=embeds,
            **kwargs,
        )

    def _of_text(
        self, labels: torch.Tensor, is_image: torch.Tensor, num_items_in_batch: Any = None, **kwargs
    ) -> torch.Tensor:
        """[B, S] labels, those at places of images left out. What they were counted for is told once."""
        if num_items_in_batch is not None and (labels[is_image] != IGNORED).any():
            logger.warning_once(
                "labels at places of images are left out of the loss, but who trains has counted them, so that loss "
                "and gradients are too small; set labels to -100 where input_ids are image_token_id"
            )
        return labels.masked_fill(is_image, IGNORED)

    def image_embeds(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """[N, D] what stands at the places of images, `None` without images; arguments as in `forward`."""
        grids = self.grids_of(pixel_values, image_grid_thw)
        if input_ids is None:
            if grids:
                raise ValueError("images need input_ids, which say where they stand; inputs_embeds do not")
            return None
        if grids or not (input_ids.shape[1] == 1 or is_traced()):  # a generated token is no place of an image
            images_of_rows(input_ids, self.config.image_token_id, self.places_of(grids))
        if not grids and self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # Processes wait for each other at every weight: one whose batch has no image reads a patch for nobody.
            pixel_values, grids = input_ids.new_zeros(1, 3 * self.vision.fields.patch_size**2), [(1, 1)]
        return self.read(pixel_values, grids) if grids else None

    def read(self, pixel_values: Any, grids: Grids) -> torch.Tensor:
        """[P, 3 * patch_size^2] -> [N, D]."""
        patches = pixel_values.to(self.image_start.device, self.vision.patch_embed.proj.weight.dtype)
        tokens = self.aligner(self.vision(patches, grids), grids)
        sizes = [(-(-height // self.aligner.ratio), -(-width // self.aligner.ratio)) for height, width in grids]
        images = tokens.split([height * width for height, width in sizes])
        return torch.cat([self.laid_out(image, *size) for image, size in zip(images, sizes, strict=True)])

    def laid_out(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[h w, D] -> [h (w + 1) + 2, D], as at the head of this file."""
        newlines = self.image_newline.to(tokens.dtype).expand(height, 1, -1)
        lines = torch.cat((tokens.unflatten(0, (height, width)), newlines), dim=1).flatten(0, 1)
        return torch.cat((self.image_start.to(tokens.dtype)[None], lines, self.image_end.to(tokens.dtype)[None]))

    def places_of(self, grids: Grids) -> list[int]:
        """How many places of `input_ids` each image takes."""
        ratio = self.aligner.ratio
        return [-(-height // ratio) * (-(-width // ratio) + 1) + 2 for height, width in grids]

    def grids_of(self, pixel_values: torch.Tensor | None, image_grid_thw: torch.Tensor | None) -> Grids:
        """Height and width of each image in patches.

        Raises:
            ValueError: if pixels and grids do not fit together.
        """
        if pixel_values is None and image_grid_thw is None:
            return []
        if pixel_values is None or image_grid_thw is None:
            raise ValueError("give pixel_values and image_grid_thw together, as the processor makes them")
        given, patch = torch.as_tensor(image_grid_thw), 3 * self.vision.fields.patch_size**2
        grids = given.tolist()
        if given.ndim != 2 or given.shape[1] != 3 or given.is_floating_point():
            raise ValueError(f"image_grid_thw={grids} must have shape [images, 3], of whole numbers")
        if any(time != 1 or height < 1 or width < 1 for time, height, width in grids):
            raise ValueError(f"image_grid_thw={grids} must hold 1, height and width of each image, in patches")
        shape = (sum(height * width for _, height, width in grids), patch)
        found = tuple(getattr(pixel_values, "shape", ()))
        if found != shape:
            raise ValueError(f"pixel_values has shape {found}, but image_grid_thw={grids} asks for {shape}")
        return [(height, width) for _, height, width in grids]

    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, use_cache=True, **kwargs):
        """As `DeepSeekForCausalLM`'s; images are read once, and what a cache holds of them after that."""
        cache, images = kwargs.get(CACHE_WORD), [kwargs.get(name) for name in IMAGES]
        is_empty = (
            cache is not None and cache.get_seq_length() == 0
        )  # as an assistant's, which is told of no first one
        is_first_iteration = is_first_iteration or is_empty
        if use_cache and not is_first_iteration:
            kwargs |= dict.fromkeys(IMAGES)
        elif use_cache and cache is not None and self.grids_of(*images):  # of a chat's turns before
            kwargs |= self._behind(input_ids, cache.get_seq_length(), *images)
        return super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )

    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """As `DeepSeekForCausalLM.generate`; no place of an image is generated."""
        suppress = SuppressImages([self.config.image_token_id], device=self.device)
        processors = LogitsProcessorList([*(logits_processor or ()), suppress])
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, pixel_values=None, image_grid_thw=None, **kwargs
    ):
        """As transformers', which takes the first axis of everything for the batch: of images it is another one."""
        grids = self.grids_of(pixel_values, image_grid_thw)
        counts = images_of_rows(input_ids, self.config.image_token_id, self.places_of(grids)) if grids else []
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if not grids:
            return input_ids, kwargs
        rows = torch.arange(len(grids)).split(counts)
        order = [image for row in rows for _ in range(expand_size) for image in row.tolist()]
        return input_ids, kwargs | self._chosen(order, pixel_values, image_grid_thw)

    def _chosen(self, order: list[int], pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> dict[str, Any]:
        """The images of these numbers, in this order; absent if there are none."""
        patches = pixel_values.split([height * width for height, width in self.grids_of(pixel_values, image_grid_thw)])
        chosen = [torch.cat([patches[image] for image in order]), image_grid_thw[order]] if order else [None, None]
        return dict(zip(IMAGES, chosen, strict=True))

    def _behind(
        self, input_ids: torch.Tensor, seen: int, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor
    ) -> dict[str, Any]:
        """The images that do not stand among the first `seen` tokens of their row."""
        places = self.places_of(self.grids_of(pixel_values, image_grid_thw))
        counts = images_of_rows(input_ids, self.config.image_token_id, places)
        read = (input_ids[:, :seen] == self.config.image_token_id).sum(1).tolist()
        rows = zip(torch.arange(len(places)).split(counts), torch.tensor(places).split(counts), read, strict=True)
        left = [row[size.cumsum(0) > tokens] for row, size, tokens in rows]
        return self._chosen(torch.cat(left).tolist(), pixel_values, image_grid_thw)


# As those of the heads for text, where this package isn't installed, too. Trainer shifts the labels that it smooths
# for names of the second table, whatever they stand under.
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[DeepSeekConfig.model_type] = "DeepSeekForImageTextToText"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["deepseek_images_and_text"] = "DeepSeekForImageTextToText"
