"""The vision tower of a config: the fields of the published `vision_config`, and the shapes of its weights.

The file travels to the Hub with configuration_deepseek.py.
"""

from typing import Any, NamedTuple

from .requiring import require

Shapes = dict[str, tuple[int, ...]]
OF_PROCESSOR = ("max_image_tokens", "min_pixels", "max_wh_ratio")  # how pixels are made ready; the tower reads none


class VisionFields(NamedTuple):
    """The fields that the tower is made of, by their published names.

    num_hidden_layers, hidden_size, num_attention_heads, intermediate_size: of its blocks.
    patch_size: pixels across and down of what one place of the tower sees.
    downsample_ratio: so many places across and down become one token of the text model.
    rope_theta: rotary base, of rows and columns alike.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int
    downsample_ratio: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        """Width of a head, of which one half is turned by the row and the other by the column."""
        return self.hidden_size // self.num_attention_heads


def vision_fields(config: Any) -> VisionFields:
    """The tower that a `DeepSeekConfig` describes.

    Raises:
        ValueError: if it describes none, or one that can't be.
    """
    given, image = config.vision_config, config.image_token_id
    require(
        isinstance(given, dict),
        f"vision_config={given!r:.60} describes no vision tower; set its fields: {', '.join(VisionFields._fields)}",
    )
    require(
        image is not None and 0 <= image < config.vocab_size,
        f"image_token_id={image} must be the token that stands at an image's places, below "
        f"vocab_size={config.vocab_size}",
    )
    for name in VisionFields._fields:
        value = given.get(name)
        require(
            isinstance(value, (int, float)) and value > 0,
            f"vision_config has {name}={value!r:.60}, which must be a positive number",
        )
    fields = VisionFields(*(given[name] for name in VisionFields._fields))
    require(
        fields.hidden_size % (4 * fields.num_attention_heads) == 0,
        f"vision_config has hidden_size={fields.hidden_size}, which must be a multiple of 4 * num_attention_heads="
        f"{4 * fields.num_attention_heads}: a head is turned in pairs by rows and by columns",
    )
    return fields


def vision_shapes(config: Any) -> Shapes:
    """Name -> shape of the tower's weights, of what joins it to the text model, and of the vectors around images."""
    vision = vision_fields(config)
    width, inner, out = vision.hidden_size, vision.intermediate_size, config.hidden_size
    shapes: Shapes = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes.update({f"{name}.bias": (rows,)} if bias else {})

    linear("vision.patch_embed.proj", width, 3 * vision.patch_size**2)
    for i in range(vision.num_hidden_layers):
        block = f"vision.blocks.{i}"
        linear(f"{block}.attn.wqkv", 3 * width, width)
        linear(f"{block}.attn.wo", width, width)
        linear(f"{block}.mlp.w1", 2 * inner, width, bias=False)
        linear(f"{block}.mlp.w2", width, inner, bias=False)
        shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
    linear("aligner.w1", out, width * vision.downsample_ratio**2)
    linear("aligner.w2", out, out)
    vectors = dict.fromkeys(("image_start", "image_end", "image_newline"), (out,))
    return shapes | {"vision.norm.weight": (width,)} | vectors
