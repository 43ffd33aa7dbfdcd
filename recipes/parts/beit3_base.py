"""Where the BEiT-3 recipe starts from: an official checkpoint, or a small base pre-trained here on captions of digits.

The small base learns what BEiT-3's own pre-training asks for, hidden words of a caption, and whether a caption is true
of its image. It sees one digit at a time, never two, and no image that the fine-tuning validates with or fits on.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrain
from dtrain.errors import InputError
from dtrain.progress import progress
from parts.beit3 import POSITIONS, SMALL, Beit3, Beit3ForPairs, config_of, resize_positions
from parts.digit_pairs import NUMBERS, WordTokenizer, pad_tokens
from parts.image_pairs import hold_out
from parts.images import crop_and_flip, read_digits

HEAD_WIDTH = 64  # of both official sizes

CACHE = Path("runs/cache/beit3_digits_base")
WHERE = "The official ones are at github.com/addf400/files/releases/download/beit3, beit3_base_patch16_224.pth say."


def load_beit3(pretrained: str, image_size: int, num_classes: int, drop_path: float = 0.0) -> Beit3ForPairs:
    """Return a pre-trained BEiT-3 with a fresh head for pairs of images.

    Args:
        pretrained: `digits` (pre-trained here and cached), or a file in the names of the original checkpoints, whose
            heads are 64 wide unless a `config.json` beside it gives `heads`.
        image_size: Side of the images; the positions of the patches are interpolated to it.
        num_classes: Outputs of the head.
        drop_path: Share of samples that leave out the last layer while training.
    """
    path = pretrain_on_captions() if pretrained == "digits" else Path(pretrained)
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}. {WHERE} Or run without any: --preset offline.")
    weights = dtrain.read_weights(path)
    config = config_of(weights.tensors, str(path))
    beside = path.with_name("config.json")
    heads = json.loads(beside.read_text())["heads"] if beside.is_file() else config.width // HEAD_WIDTH
    if image_size % config.patch_size or config.width % max(1, heads):
        raise InputError(
            f"{path} has patches of {config.patch_size} pixels and {config.width} numbers for {heads} heads, which "
            f"must be divisors of the side of the images ({image_size}, --data.image_size) and of the numbers."
        )
    model = Beit3ForPairs(replace(config, heads=heads, image_size=image_size, drop_path=drop_path), num_classes)
    load_backbone(model, weights)
    return model


@torch.no_grad()
def load_backbone(model: Beit3ForPairs, weights: dtrain.Weights) -> None:
    """Copy everything but the head; what else a checkpoint has, such as the head of its pre-training, is not wanted."""
    side = model.beit3.config.side
    for name, tensor in model.beit3.state_dict(prefix="beit3.").items():
        found = weights.get(name)
        if found is None and name.startswith("beit3.encoder.layer_norm."):
            continue  # fine-tunes of single images are kept without it: it starts as the identity
        if found is not None and name == POSITIONS:
            found = resize_positions(found, side)
        if found is None or found.shape != tensor.shape:
            what = "no such tensor" if found is None else f"the shape {list(found.shape)}"
            raise InputError(f"{weights.origin}: BEiT-3 has {name} of {list(tensor.shape)}, the file has {what}.")
        tensor.copy_(found)


def caption(digit: int, rng: np.random.Generator, true: bool) -> str:
    """Return a caption of one image, true or false of the digit it shows."""
    kind, other = rng.integers(3), (digit + rng.integers(1, 10)) % 10
    if kind == 0:
        return f"the image shows the digit {NUMBERS[digit if true else other]}"
    if kind == 1:
        return f"the digit is {('even', 'odd')[(digit + (not true)) % 2]}"
    return f"the digit {NUMBERS[other]} is {('smaller', 'larger')[bool(other > digit) == true]}"


def pretrain_on_captions(steps: int = 800, batch_size: int = 96) -> Path:
    """Train the small base on captions of single digits, once, and return its file."""
    path = CACHE / "model.safetensors"
    if path.exists():
        return path
    images, labels = read_digits()[0]
    rest = hold_out(len(labels), len(labels) // 8)[1]  # what fits look at is not trained on
    with torch.random.fork_rng(devices=[]):  # whether the base was cached must not change the fine-tuning
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        task = Captions()
        optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        with progress("pre-training the base on captions of digits", steps) as advance:
            for _ in range(steps):
                chosen = torch.tensor(rng.choice(rest, batch_size))
                loss = task(crop_and_flip(images[chosen], flip=False).float() / 127.5 - 1, labels[chosen].tolist(), rng)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "config.json").write_text(json.dumps(asdict(SMALL), indent=1))
    save_file(task.beit3.state_dict(prefix="beit3."), path)  # last: its presence says that the base is whole
    return path


class Captions(nn.Module):
    """The pre-training: guess hidden words of true captions, and tell true captions from false ones."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = WordTokenizer()
        self.beit3 = Beit3(SMALL)
        self.words, self.truth = nn.Linear(SMALL.width, SMALL.vocabulary), nn.Linear(2 * SMALL.width, 2)

    def forward(self, images: Tensor, digits: Sequence[int], rng: np.random.Generator) -> Tensor:
        """Return the loss; words are hidden in the first half of the batch, the second half is true or false."""
        half = len(digits) // 2
        truth = [index < half or bool(rng.integers(2)) for index in range(len(digits))]
        said = [caption(digit, rng, true) for digit, true in zip(digits, truth, strict=True)]
        tokens, padding = pad_tokens([self.tokenizer(text) for text in said])
        hidden = (torch.rand(tokens.shape) < 0.5) & (tokens > 2)  # half the words, and none of <s>, padding and </s>
        hidden[half:] = False
        found = self.beit3(images, tokens.masked_fill(hidden, len(self.tokenizer)), padding)
        text = found[:, self.beit3.image_tokens :]
        both = torch.cat((found[half:, 0], text[half:, 0]), dim=-1)
        guessed = cross_entropy(self.words(text[hidden]), tokens[hidden])
        return guessed + cross_entropy(self.truth(both), torch.tensor(truth[half:]).long())
