"""Object detection: boxes and classes by the tokens of an image.

`GridBoxes` gives a box for each token and learns from few images; `SetBoxes` one for each of some learned tokens
behind those of the image (YOLOS, arXiv 2106.00666), trained by bipartite matching as DETR is (arXiv 2005.12872). Both
give what `post_process_object_detection` of transformers' DETR processor takes: N + 1 logits, of which the last is of
no object, and boxes in shares of the image.

Letters: B images, C channels, H x W pixels, S tokens, Q boxes of an image, D hidden width, N labels.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput, can_return_tuple

from .boxes import corners_of, suppressed
from .configuration_deepseek import DeepSeekConfig
from .feature_pyramid import FeaturePyramid
from .grid_boxes import assigned, grid_losses, objects_of, total
from .image_model import DeepSeekImageModel
from .image_stem import ImageTokens

SELDOM = -4.6  # added to the logit of an object, so that of a new model's cells one in a hundred says yes
MOST_BOXES = 1000  # of an image, the best, of which any are kept: memory grows with their square
SIZES = (-4.0, 6.0)  # a box is from exp(-4) to exp(6) cells wide
# DETR's costs of a match and weights of losses (arXiv 2005.12872, appendix A.4).
SET_LOSS = {
    "class_cost": 1,
    "bbox_cost": 5,
    "giou_cost": 2,
    "eos_coefficient": 0.1,
    "bbox_loss_coefficient": 5,
    "giou_loss_coefficient": 2,
    "auxiliary_loss": False,
}
Labels = list[dict[str, torch.Tensor]]


@dataclass
class DeepSeekDetectionOutput(ModelOutput):
    """What a detector gives.

    Attributes:
        loss, loss_dict: if there were labels: what is trained, and its parts.
        logits: [B, Q, N + 1]; the softmax gives the chance of each class and, last, of no object.
        pred_boxes: [B, Q, 4], centre x, centre y, width, height in shares of the image without its padding. Both are
            float32, also of a model in half precision, whose steps are larger than a pixel.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Found(NamedTuple):
    """Boxes before any is suppressed.

    Attributes:
        scores: [B, Q, 1 + N] logits as the head gives them, float32.
        logits: [B, Q, N + 1] of classes and no object.
        boxes: [B, Q, 4] in shares of the image.
    """

    scores: torch.Tensor
    logits: torch.Tensor
    boxes: torch.Tensor


class Boxes(nn.Module):
    """What both ways share: two small networks on the states of tokens, one for scores and one for boxes."""

    def __init__(self, config: DeepSeekConfig, stride: int):
        super().__init__()
        self.config, self.stride = config, stride
        self.score = self._network(1 + config.num_labels)
        self.box = self._network(4)

    def _network(self, width: int) -> nn.Sequential:
        hidden = self.config.hidden_size
        return nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))

    def extended(self, tokens: ImageTokens) -> ImageTokens:
        """The tokens that the trunk reads, of those of the image."""
        return tokens

    def cells(self, hidden_states: torch.Tensor, tokens: ImageTokens) -> ImageTokens:
        """What boxes are given by, of what the trunk made of its tokens, [B, S, D]."""
        return tokens._replace(states=hidden_states)

    def forward(self, cells: ImageTokens, size: torch.Tensor) -> Found:
        """What `cells` gave; size: [B, 2], width and height of each image in pixels."""
        raise NotImplementedError

    def losses(
        self, found: Found, labels: Labels, cells: ImageTokens, size: torch.Tensor, loss_function: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What is trained, and its parts."""
        raise NotImplementedError

    def kept(self, found: Found) -> torch.Tensor:
        """[B, Q, N + 1] logits in which boxes that aren't to be shown are no object."""
        return found.logits


class GridBoxes(Boxes):
    """A box for each token or finer cell, about its middle. The chance of a class is that of an object times that of
    the class among objects."""

    def __init__(self, config: DeepSeekConfig, stride: int):
        super().__init__(config, config.box_stride or stride)
        self.pyramid = None if self.stride == stride else FeaturePyramid(config)

    def cells(self, hidden_states: torch.Tensor, tokens: ImageTokens) -> ImageTokens:
        return super().cells(hidden_states, tokens) if self.pyramid is None else self.pyramid(hidden_states, tokens)

    def forward(self, cells: ImageTokens, size: torch.Tensor) -> Found:
        scores = self.score(cells.states).float()
        scores = torch.cat((scores[..., :1] + SELDOM, scores[..., 1:]), dim=-1)
        shift, extent = self.box(cells.states).float().split(2, dim=-1)
        boxes = torch.cat((centres_of(cells) + shift, extent.clamp(*SIZES).exp()), dim=-1)  # in cells
        of_object, of_none = F.logsigmoid(scores[..., :1]), F.logsigmoid(-scores[..., :1])
        logits = torch.cat((of_object + scores[..., 1:].log_softmax(-1), of_none), dim=-1)
        if cells.is_token is not None:
            logits = no_object(logits, ~cells.is_token)
        return Found(scores, logits, boxes * (self.stride / size.repeat(1, 2)[:, None]))

    def losses(
        self, found: Found, labels: Labels, cells: ImageTokens, size: torch.Tensor, loss_function: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        in_cells = size / self.stride
        objects = objects_of(labels, in_cells)
        corners = corners_of(found.boxes * in_cells.repeat(1, 2)[:, None])
        is_cell = torch.ones_like(found.scores[..., 0], dtype=torch.bool)
        is_cell = is_cell if cells.is_token is None else cells.is_token
        targets = assigned(corners, centres_of(cells), is_cell, objects)
        losses = grid_losses(
            found.scores[..., 0], found.scores[..., 1:], corners, is_cell, targets, objects.is_there.sum()
        )
        return total(losses), losses

    def kept(self, found: Found) -> torch.Tensor:
        if self.config.nms_threshold == 1:
            return found.logits
        scores, labels = found.logits[..., :-1].max(-1)
        best = scores.topk(min(MOST_BOXES, scores.shape[1]), dim=1).indices.sort(dim=1).values  # equal ones in order
        corners = corners_of(found.boxes).gather(1, best[..., None].expand(-1, -1, 4))
        dropped = suppressed(corners, scores.gather(1, best), labels.gather(1, best), self.config.nms_threshold)
        return no_object(found.logits, torch.ones_like(labels, dtype=torch.bool).scatter(1, best, dropped))


class SetBoxes(Boxes):
    """A box for each of some learned tokens behind those of the image, anywhere in it."""

    def __init__(self, config: DeepSeekConfig, stride: int):
        super().__init__(config, stride)
        self.tokens = nn.Embedding(config.num_detection_tokens, config.hidden_size)

    def extended(self, tokens: ImageTokens) -> ImageTokens:
        batch, count = len(tokens.states), self.config.num_detection_tokens
        more = self.tokens(torch.arange(count, device=tokens.states.device)).expand(batch, -1, -1)
        is_token = tokens.is_token if tokens.is_token is None else F.pad(tokens.is_token, (0, count), value=True)
        positions = F.pad(tokens.positions, (0, 0, 0, count))  # all of them at the corner: they differ by vectors
        return tokens._replace(states=torch.cat((tokens.states, more), dim=1), is_token=is_token, positions=positions)

    def forward(self, cells: ImageTokens, size: torch.Tensor) -> Found:
        states = cells.states[:, -self.config.num_detection_tokens :]
        scores = self.score(states).float()
        return Found(scores, scores, self.box(states).float().sigmoid())

    def losses(
        self, found: Found, labels: Labels, cells: ImageTokens, size: torch.Tensor, loss_function: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weights = SimpleNamespace(num_labels=self.config.num_labels, **SET_LOSS)
        loss, parts, _ = loss_function(found.logits, labels, found.logits.device, found.boxes, weights)
        return loss, parts


def centres_of(tokens: ImageTokens) -> torch.Tensor:
    """[1 or B, S, 2], x and y of the middle of each token's cell, in cells."""
    return tokens.positions.flip(-1).float() + 0.5


def no_object(logits: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """[B, Q, N + 1] with the last class for certain at some of [B, Q]."""
    is_class = torch.arange(logits.shape[-1], device=logits.device) < logits.shape[-1] - 1
    lowest = torch.finfo(torch.float16).min  # so that a cast to half precision leaves numbers
    return logits.masked_fill(where[..., None] & is_class, lowest).masked_fill(where[..., None] & ~is_class, 0.0)


BOXES: dict[str, type[Boxes]] = {"grid": GridBoxes, "set": SetBoxes}


class DeepSeekForObjectDetection(DeepSeekImageModel):
    """Boxes and classes by the tokens of an image. In training mode no box is suppressed."""

    # The loss is a mean over the batch's objects, so Trainer has to divide it by its gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: DeepSeekConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.boxes = BOXES[config.box_prediction](config, self.stem.stride)
        self.post_init()

    def extended(self, tokens: ImageTokens) -> ImageTokens:
        return self.boxes.extended(tokens)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: Labels | None = None,
        **kwargs,
    ) -> DeepSeekDetectionOutput:
        """
        Args:
            pixel_values: [B, C, H, W].
            pixel_mask: [B, H, W], 0 at padding, which is right of an image and below it.
            labels: for each image `class_labels` [G] and `boxes` [G, 4], centre x, centre y, width and height in
                shares of the image without its padding.
            kwargs: `output_hidden_states` and the like.

        Raises:
            ValueError: for other channels than the config's, images of more tokens than the model takes, and labels
                of another form.
        """
        tokens, outputs = self.read(pixel_values, pixel_mask, **kwargs)
        size = size_of(pixel_values, pixel_mask)
        cells = self.boxes.cells(outputs.last_hidden_state, tokens)
        found = self.boxes(cells, size)
        loss, parts = None, None
        if labels is not None:
            refuse_other_labels(labels, len(size))
            loss, parts = self.boxes.losses(found, labels, cells, size, self.loss_function)
        return DeepSeekDetectionOutput(
            loss=loss,
            loss_dict=parts,
            logits=found.logits if self.training else self.boxes.kept(found),
            pred_boxes=found.boxes,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def size_of(pixel_values: Any, pixel_mask: torch.Tensor | None) -> torch.Tensor:
    """[B, 2], width and height in pixels of images without their padding, float32."""
    batch, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return torch.tensor([[width, height]], dtype=torch.float32, device=pixel_values.device).expand(batch, 2)
    is_own = pixel_mask.bool()
    return torch.stack((is_own.any(1).sum(1), is_own.any(2).sum(1)), dim=-1).float().clamp(min=1)  # of none, too


def refuse_other_labels(labels: Labels, batch: int) -> None:
    """Refuse labels of another form than `forward` takes.

    Raises:
        ValueError: saying what they are.
    """
    are_shaped = isinstance(labels, (list, tuple)) and all(
        {"class_labels", "boxes"} <= set(one) and tuple(one["boxes"].shape) == (len(one["class_labels"]), 4)
        for one in labels
    )
    if not are_shaped or len(labels) != batch:
        raise ValueError(
            f"labels must be a list of {batch} dictionaries, one per image, with class_labels [objects] and boxes "
            "[objects, 4]"
        )
