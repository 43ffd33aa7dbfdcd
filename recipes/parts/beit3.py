"""BEiT-3: one transformer for images, text and both, with the tensor names of the original checkpoints.

Every layer keeps two copies of its weights, `A` for the tokens of an image and `B` for those of a text, and attention
looks across both ("Image as a Foreign Language", arXiv 2208.10442). Written from the paper and from the names and
shapes of the checkpoints of microsoft/unilm; it agrees with torchscale, their host, and with timm's vision tower.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, pad, scaled_dot_product_attention
from torchvision.ops import StochasticDepth

from dtrain.errors import InputError

OFFSET = 2  # positions count from 2, as in fairseq, where 1 was padding: two rows of every table are never looked up
LAYER_NORM_EPS = 1e-5
POSITIONS = "beit3.encoder.embed_positions.A.weight"  # of the patches, in a checkpoint


@dataclass(frozen=True)
class Beit3Config:
    """Sizes of a BEiT-3; the defaults are those of the base model.

    Args:
        width: Numbers per token.
        depth: Layers.
        heads: Attention heads.
        image_size: Side of the images, in pixels.
        patch_size: Side of a patch.
        vocabulary: Tokens of the text.
        positions: Rows of the table of text positions: a text is at most so long, less two.
        drop_path: Share of samples that leave out the last layer while training; it grows linearly with the depth.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    vocabulary: int = 64010
    positions: int = 1024
    drop_path: float = 0.0

    @property
    def side(self) -> int:
        """Patches along the side of an image."""
        return self.image_size // self.patch_size


SMALL = Beit3Config(width=48, depth=2, heads=4, image_size=8, patch_size=4, vocabulary=64, positions=66)  # for digits
BASE = Beit3Config()
LARGE = Beit3Config(width=1024, depth=24, heads=16)


class Multiway(nn.Module):
    """Two layers of one kind: `A` for the first tokens, an image's, and `B` for the others, a text's."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.A, self.B = make(), make()

    def forward(self, x: Tensor, split: int) -> Tensor:
        if split == 0:
            return self.B(x)
        if split == x.shape[1]:
            return self.A(x)
        return torch.cat((self.A(x[:, :split]), self.B(x[:, split:])), dim=1)


def multiway_linear(inputs: int, outputs: int) -> Multiway:
    return Multiway(lambda: nn.Linear(inputs, outputs))


def multiway_norm(width: int) -> Multiway:
    return Multiway(lambda: nn.LayerNorm(width, eps=LAYER_NORM_EPS))


class Attention(nn.Module):
    """Self-attention over image and text together; a norm before the output layer (sub-LN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (multiway_linear(width, width) for _ in range(4))
        self.inner_attn_ln = multiway_norm(width)

    def forward(self, x: Tensor, split: int, seen: Tensor | None) -> Tensor:
        query, key, value = (
            project(x, split).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.out_proj(self.inner_attn_ln(found.transpose(1, 2).flatten(2), split), split)


class FeedForward(nn.Module):
    """Two linear layers with a GELU and a norm between them (sub-LN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ffn_layernorm = nn.LayerNorm(4 * width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(gelu(self.fc1(x))))


class Layer(nn.Module):
    """A transformer layer, norms first."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = multiway_norm(width)
        self.ffn = Multiway(lambda: FeedForward(width))
        self.final_layer_norm = multiway_norm(width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, split: int, seen: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.self_attn(self.self_attn_layer_norm(x, split), split, seen))
        return x + self.drop_path(self.ffn(self.final_layer_norm(x, split), split))


class Encoder(nn.Module):
    """Positions and layers."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        rows = iter((config.side**2 + 1 + OFFSET, config.positions))  # one more patch than there are: the class token
        self.embed_positions = Multiway(lambda: nn.Embedding(next(rows), config.width))
        rates = [config.drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.layers = nn.ModuleList(Layer(config.width, config.heads, rate) for rate in rates)
        self.layer_norm = multiway_norm(config.width)

    def forward(self, x: Tensor, split: int, padding: Tensor | None) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        places = torch.where(places < split, places, places - split) + OFFSET
        x = x + self.embed_positions(places[None], split)
        seen = None if padding is None else ~padding[:, None, None]
        for layer in self.layers:
            x = layer(x, split, seen)
        return self.layer_norm(x, split)


class VisionEmbedding(nn.Module):
    """Patches of an image behind a class token."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))

    def forward(self, images: Tensor, masked: Tensor | None) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        if masked is not None:
            patches = torch.where(masked[..., None], self.mask_token, patches)
        return torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1)


class Beit3(nn.Module):
    """The multiway transformer, for images, for texts, or for pairs of both.

    Args:
        config: Its sizes.
    """

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.config = config
        self.text_embed = nn.Embedding(config.vocabulary, config.width)
        self.vision_embed = VisionEmbedding(config)
        self.encoder = Encoder(config)
        self.apply(initialise)
        gain = math.sqrt(math.log(2 * config.depth))  # what sub-LN asks for in an encoder (arXiv 2210.06423)
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and any(part in name for part in ("fc1", "fc2", "v_proj", "out_proj")):
                nn.init.xavier_normal_(weight, gain)

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        padding: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (n, length, width): of the class token, the patches, then the text.

        Args:
            images: (n, 3, height, width), normalised; None for text alone.
            tokens: Ids (n, length); None for images alone.
            padding: (n, length), true where `tokens` are padding.
            masked: (n, patches), true where a patch is hidden behind the mask token.
        """
        if images is not None and images.shape[-2:] != (self.config.image_size,) * 2:
            raise InputError(
                f"the images are {images.shape[-2]} x {images.shape[-1]}, the model takes "
                f"{self.config.image_size} x {self.config.image_size}. Set --data.image_size."
            )
        parts = [] if images is None else [self.vision_embed(images, masked)]
        split = parts[0].shape[1] if parts else 0
        if tokens is not None:
            parts.append(self.text_embed(tokens))
            if padding is not None:
                padding = pad(padding, (split, 0), value=False)
        return self.encoder(torch.cat(parts, dim=1), split, padding)

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: the first token of a text behind it has this number."""
        return self.config.side**2 + 1


class MlpHead(nn.Module):
    """Two linear layers, each behind a norm."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(inputs), nn.LayerNorm(hidden)
        self.dense1, self.dense2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(gelu(self.norm2(self.dense1(self.norm1(x)))))


class Beit3ForPairs(nn.Module):
    """Classifies two images and a statement about them (NLVR2), with the names of the original's checkpoints.

    Args:
        config: Sizes of the transformer.
        num_classes: Classes of the head.
    """

    def __init__(self, config: Beit3Config, num_classes: int = 2) -> None:
        super().__init__()
        self.beit3 = Beit3(config)
        self.beit3.vision_embed.mask_token.requires_grad_(False)  # nothing is masked: it would never get a gradient
        self.head = MlpHead(4 * config.width, 2 * config.width, num_classes)

    def forward(self, left: Tensor, right: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        """Return the logits (n, classes)."""
        return self.head(self.class_tokens(left, right, tokens, padding))

    def class_tokens(self, left: Tensor, right: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        """Return what the head sees (n, 4 x width); both images go through one batch, each with the statement."""
        hidden = self.beit3(torch.cat((left, right)), tokens.repeat(2, 1), padding.repeat(2, 1))
        both = torch.cat((hidden[:, 0], hidden[:, self.beit3.image_tokens]), dim=-1)  # the image's and the text's
        return torch.cat(both.chunk(2), dim=-1)


def initialise(layer: nn.Module) -> None:
    """Draw the weights of one layer in the scale of its width: BEiT's 0.02 for all is meant for a width of 768."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Embedding):
        nn.init.normal_(layer.weight, std=layer.embedding_dim**-0.5)


def config_of(weights: Mapping[str, Tensor], origin: str) -> Beit3Config:
    """Return the sizes of the model that a checkpoint in the original's names holds; shapes do not show its heads.

    Raises:
        InputError: If it is no BEiT-3.
    """
    try:
        patches = weights["beit3.vision_embed.proj.weight"]
        pictures, texts = weights[POSITIONS], weights["beit3.encoder.embed_positions.B.weight"]
        vocabulary = len(weights["beit3.text_embed.weight"])
    except KeyError as error:
        raise InputError(
            f"{origin} has no tensor {error}: it is no BEiT-3 in the names of the original checkpoints "
            f"({next(iter(weights), None)!r} is one of its tensors)."
        ) from error
    width, _, _, patch = patches.shape
    side = math.isqrt(len(pictures) - 1 - OFFSET)
    depth = len({name.split(".")[3] for name in weights if name.startswith("beit3.encoder.layers.")})
    return Beit3Config(
        width=width,
        depth=depth,
        image_size=side * patch,
        patch_size=patch,
        vocabulary=vocabulary,
        positions=len(texts),
    )


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Return the positions of an image's patches for another number of patches, bicubic; the other rows stay."""
    kept, grid = table.split((OFFSET + 1, len(table) - OFFSET - 1))
    old = math.isqrt(len(grid))
    if old == side:
        return table
    planes = grid.float().T.reshape(1, -1, old, old)
    wide = interpolate(planes, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((kept, wide[0].flatten(1).T.to(table.dtype)))
