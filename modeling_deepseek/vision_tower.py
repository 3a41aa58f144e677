"""V4.1's eyes: a tower that reads an image's patches, and the aligner that makes tokens of what it found.

As the release's own code has them. Patches are squares of pixels, laid out as a grid of h x w places:

    place     x_0 = W p + b                                    p: a patch's pixels, channel by channel, row by row
    block     x = x + attention(norm1(x));  x = x + w2( silu(gate) * up ),  gate, up = w1 norm2(x)
    attention each place sees all places of its image; queries and keys are turned, the first half of the pairs of a
              head by the place's row and the second by its column, each at theta^(-2i / (W / 2)), i < W / 4
    aligner   r x r places become one token: their channels beside each other (channel by channel, then row, then
              column; zeros beyond the grid), then w2( gelu( w1 . ) )

Norms are root mean square norms in float32. Places of all images stand one behind the other, so that every weight is
used once in a call, whatever their number and sizes; attention alone goes image by image. Letters: S places of all
images, N tokens that become of them, H heads of width W, C width of the tower, D of the text model, r
downsample_ratio.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .attention_core import attend
from .configuration_deepseek import DeepSeekConfig
from .layers import DeepSeekFloat32RMSNorm, gated
from .rope import apply_rotary
from .transformers_names import GradientCheckpointingLayer
from .vision import vision_fields

Rotation = tuple[torch.Tensor, torch.Tensor]
Grids = list[tuple[int, int]]  # height and width of each image, in patches


def grid_rotation(grids: Grids, head_dim: int, theta: float, device: torch.device) -> Rotation:
    """cos and sin, float32 [1, S, W / 2]: a place's row turns the first half of the pairs, its column the other."""
    half = head_dim // 2
    frequencies = theta ** -(torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    places = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2) for h, w in grids])
    angles = (places.to(device).unsqueeze(-1) * frequencies).flatten(1).unsqueeze(0)
    return angles.cos(), angles.sin()


class DeepSeekVisionAttention(nn.Module):
    """Attention of the places of each image with each other. Parameter names are the checkpoints'."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__()
        vision = vision_fields(config)
        self.config, self.is_causal = config, False
        self.num_key_value_groups, self.attention_dropout = 1, 0.0
        self.head_dim, self.scaling = vision.head_dim, vision.head_dim**-0.5
        self.wqkv = nn.Linear(vision.hidden_size, 3 * vision.hidden_size)
        self.wo = nn.Linear(vision.hidden_size, vision.hidden_size)

    def forward(self, hidden_states: torch.Tensor, rotation: Rotation, places: list[int]) -> torch.Tensor:
        """[1, S, C] -> [1, S, C]; places: of each image, S together."""
        states = self.wqkv(hidden_states).unflatten(-1, (3, -1, self.head_dim))  # [1, S, 3, H, W]
        query, key, value = states.permute(2, 0, 3, 1, 4)
        query, key = (apply_rotary(x.float(), *rotation, interleaved=False).to(value.dtype) for x in (query, key))
        images = zip(query.split(places, 2), key.split(places, 2), value.split(places, 2), strict=True)
        output = torch.cat([attend(self, q, k, v, None, self.scaling)[0] for q, k, v in images], dim=1)
        return self.wo(output.flatten(2))


class DeepSeekVisionMLP(nn.Module):
    """SwiGLU with gate and up in one projection."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__()
        vision = vision_fields(config)
        self.w1 = nn.Linear(vision.hidden_size, 2 * vision.intermediate_size, bias=False)
        self.w2 = nn.Linear(vision.intermediate_size, vision.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[1, S, C] -> [1, S, C]."""
        gate, up = self.w1(hidden_states).chunk(2, dim=-1)
        return self.w2(gated(F.silu, gate, up, None))


class DeepSeekVisionBlock(GradientCheckpointingLayer):
    """Pre-norm block of the tower."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__()
        width = vision_fields(config).hidden_size
        self.norm1, self.norm2 = DeepSeekFloat32RMSNorm(width), DeepSeekFloat32RMSNorm(width)
        self.attn, self.mlp = DeepSeekVisionAttention(config), DeepSeekVisionMLP(config)

    def forward(self, hidden_states: torch.Tensor, rotation: Rotation, places: list[int]) -> torch.Tensor:
        """[1, S, C] -> [1, S, C]; places: of each image, S together."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), rotation, places)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class DeepSeekPatchEmbedding(nn.Module):
    """A linear map of a patch's pixels."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__()
        vision = vision_fields(config)
        self.proj = nn.Linear(3 * vision.patch_size**2, vision.hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[1, S, 3 * patch_size^2] -> [1, S, C]."""
        return self.proj(patches)


class DeepSeekVisionTower(nn.Module):
    """Patches of images to what the tower finds at each place."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__()
        self.fields = vision_fields(config)
        self.patch_embed = DeepSeekPatchEmbedding(config)
        self.blocks = nn.ModuleList(DeepSeekVisionBlock(config) for _ in range(self.fields.num_hidden_layers))
        self.norm = DeepSeekFloat32RMSNorm(self.fields.hidden_size)

    def forward(self, patches: torch.Tensor, grids: Grids) -> torch.Tensor:
        """[S, 3 * patch_size^2] -> [S, C]."""
        hidden_states = self.patch_embed(patches.unsqueeze(0))
        rotation = grid_rotation(grids, self.fields.head_dim, self.fields.rope_theta, patches.device)
        places = [height * width for height, width in grids]
        for block in self.blocks:
            hidden_states = block(hidden_states, rotation, places)
        return self.norm(hidden_states).squeeze(0)


class DeepSeekAligner(nn.Module):
    """What the tower found to tokens of the text model."""

    def __init__(self, config: DeepSeekConfig):
        super().__init__()
        vision = vision_fields(config)
        self.ratio = vision.downsample_ratio
        self.w1 = nn.Linear(vision.hidden_size * self.ratio**2, config.hidden_size)
        self.w2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, grids: Grids) -> torch.Tensor:
        """[S, C] -> [N, D]: of each image ceil(h / r) ceil(w / r) tokens."""
        images = hidden_states.split([height * width for height, width in grids])
        joined = torch.cat([self.join(image, *grid) for image, grid in zip(images, grids, strict=True)])
        return self.w2(F.gelu(self.w1(joined)))

    def join(self, image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[h w, C] -> [tokens, C r r]."""
        grid = image.unflatten(0, (height, width))
        grid = F.pad(grid, (0, 0, 0, -width % self.ratio, 0, -height % self.ratio))
        grid = grid.unflatten(1, (-1, self.ratio)).unflatten(0, (-1, self.ratio))  # [h / r, r, w / r, r, C]
        return grid.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)
