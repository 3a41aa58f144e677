"""Captions to images, by a folder or a Hub id of a model of image generation."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..language.serving.language_model import LanguageModel
from ..training.loading import saved_tokenizer, with_padding
from ..training.saved import Saved, note
from ..training.task import CausalCollator
from . import image_tokens
from .arguments import DrawArguments, ImageGenerationArguments
from .image_tokens import ImageTokens, first_id
from .prompts import drawing_config, encode_captions
from .sheet import sheet

TASK = "image_generation"


class Drawer:
    """A language model and its image tokens; made by `open`."""

    def __init__(self, lm: LanguageModel, tokens: ImageTokens, most: int) -> None:
        self.model, self.tokenizer, self.tokens, self.most = lm.model, lm.tokenizer, tokens, most
        self.first = first_id(lm.tokenizer, tokens.number)

    @classmethod
    def open(cls, name: str, arguments: DrawArguments | None = None) -> "Drawer":
        """The model, or an adapter merged into its base; on the accelerator, if there is one and none is asked for.

        Raises:
            ValueError: if it can't be read, or was made for another task.
        """
        arguments = arguments or DrawArguments()
        saved = Saved.open(None, name, arguments.model_revision).require_model()
        saved.check_task(TASK, "CausalLM")
        settings = saved.settings_for(TASK, ImageGenerationArguments)
        tokens = image_tokens.load(image_tokens.folder_of(saved))
        tokenizer = with_padding(saved_tokenizer(saved, None, arguments.trust_remote_code))
        lm = LanguageModel.open(saved, tokenizer, arguments)
        most = settings.get("max_caption_length", ImageGenerationArguments.max_caption_length)
        return cls(lm, tokens, most)

    @torch.no_grad()
    def images(
        self,
        captions: Sequence[str],
        temperature: float = 1.0,
        guidance_scale: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        report: Callable[[int], Any] = lambda count: None,
        **options: Any,
    ) -> np.ndarray:
        """[N, H, W, 3] bytes, an image for each caption.

        Args:
            report: is told how many images each batch has.
            options: of transformers' generation config, such as top_p.

        Raises:
            ValueError: for a caption without text.
        """
        empty = [place for place, caption in enumerate(captions, start=1) if not caption.strip()]
        if empty:
            raise ValueError(f"caption {empty[0]}: it is empty; say what is to be drawn.")
        encoded = encode_captions(self.tokenizer, captions)
        long = [place for place, ids in enumerate(encoded, start=1) if len(ids) > self.most]
        if long:
            note(f"caption {long[0]} has more than {self.most} tokens; as in training, what is beyond is not read.")
        prompts = [[*ids[: self.most], self.first - 1] for ids in encoded]
        ids = range(self.first, self.first + self.tokens.number)
        options = {name: value for name, value in options.items() if value is not None}
        length = prod(self.tokens.grid)
        config = drawing_config(self.tokenizer, ids, length, temperature, guidance_scale, **options)
        collate, found = CausalCollator(int(self.tokenizer.pad_token_id)), []
        with torch.random.fork_rng(devices=self._devices()):
            torch.manual_seed(seed)
            for begin in range(0, len(prompts), batch_size):
                batch = collate([{"prompt_ids": prompt} for prompt in prompts[begin : begin + batch_size]])
                prompt_ids, mask = (batch[name].to(self.model.device) for name in ("prompt_ids", "prompt_mask"))
                output = self.model.generate(prompt_ids, attention_mask=mask, generation_config=config)
                found.append(output[:, prompt_ids.shape[1] :].cpu().numpy() - self.first)
                report(len(found[-1]))
        return self.tokens.decode(np.concatenate(found))

    def _devices(self) -> list[int]:
        return [self.model.device.index or 0] if self.model.device.type == "cuda" else []

    def draw(self, captions: Sequence[str], number: int = 1, enlarge: int = 8, **options: Any) -> Image.Image:
        """A picture: a row for each caption, `number` images in it; options as for `images`."""
        images = self.images([caption for caption in captions for _ in range(number)], **options)
        rows = [list(images[begin : begin + number]) for begin in range(0, len(images), number)]
        return sheet(rows, enlarge)


def draw_file(name: str, arguments: DrawArguments, report: Callable[[int], Any]) -> Image.Image:
    """What `deepseek-hf draw` writes."""
    drawer = Drawer.open(name, arguments)
    return drawer.draw(
        arguments.captions,
        arguments.number,
        arguments.enlarge,
        temperature=arguments.temperature,
        guidance_scale=arguments.guidance_scale,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        report=report,
    )
