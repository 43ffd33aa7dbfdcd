"""Where the BEiT-3 recipe starts from: an official checkpoint, or a small base pre-trained here on captions of digits.

The small base learns what BEiT-3's own pre-training asks for, hidden words of a caption, and whether a caption is true
of its image. It sees one digit at a time, never two, and no image that the fine-tuning validates with or fits on.
"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import dtrain
from dtrain.artifact.atomic import write_atomic
from dtrain.errors import InputError
from dtrain.progress import progress
from parts.beit3 import POSITIONS, SMALL, Beit3, Beit3ForPairs, config_of, resize_positions
from parts.digit_pairs import NUMBERS, WordTokenizer, pad_tokens
from parts.image_pairs import hold_out
from parts.images import crop_and_flip, read_digits

DIGITS = range(10)
HEAD_WIDTH = 64  # of both official sizes
CACHE = Path("runs/cache/beit3_digits_base")
STEPS, BATCH_SIZE = 1200, 96  # of the pre-training
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
    said = json.loads(beside.read_text()) if beside.is_file() else {}
    heads = said.get("heads", max(1, config.width // HEAD_WIDTH))
    if image_size % config.patch_size or config.width % heads:
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


def captions() -> dict[str, list[bool]]:
    """Return every caption of one digit, and of which digits it is true."""
    said = {
        f"the image shows the digit {NUMBERS[named]}": lambda digit, named=named: digit == named for named in DIGITS
    }
    said |= {f"the digit {NUMBERS[than]} is larger": lambda digit, than=than: than > digit for than in DIGITS[1:]}
    said |= {f"the digit {NUMBERS[than]} is smaller": lambda digit, than=than: than < digit for than in DIGITS[:-1]}
    said |= {
        f"the digit is {kind}": lambda digit, odd=odd: digit % 2 == odd for odd, kind in enumerate(("even", "odd"))
    }
    return {text: [holds(digit) for digit in DIGITS] for text, holds in said.items()}


def pretrain_on_captions() -> Path:
    """Train the small base on captions of single digits, once, and return its file."""
    path = CACHE / "model.safetensors"
    if path.exists():
        return path
    images, labels = read_digits()[0]
    rest = hold_out(len(labels), len(labels) // 8)[1]  # what fits look at is not trained on
    with torch.random.fork_rng(devices=[]):  # whether the base was cached must not change the fine-tuning
        torch.manual_seed(0)
        task = Captions()
        optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
        with progress("pre-training the base on captions of digits", STEPS) as advance:
            for _ in range(STEPS):
                chosen = torch.tensor(rest)[torch.randint(len(rest), (BATCH_SIZE,))]
                loss = task(crop_and_flip(images[chosen], flip=False).float() / 127.5 - 1, labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")
    CACHE.mkdir(parents=True, exist_ok=True)
    write_atomic(CACHE / "config.json", [json.dumps(asdict(SMALL), indent=1).encode()])
    write_atomic(path, [save(task.beit3.state_dict(prefix="beit3."))])  # last: its presence says that the base is whole
    return path


class Captions(nn.Module):
    """The pre-training: which captions are true of an image, whether the one beside it is, and hidden words of it."""

    def __init__(self) -> None:
        super().__init__()
        self.beit3 = Beit3(SMALL)
        self.words, self.truth = nn.Linear(SMALL.width, SMALL.vocabulary), nn.Linear(SMALL.width, 1)
        tokenizer, said = WordTokenizer(), captions()
        self.mask = len(tokenizer)
        self.tokens, self.padding = pad_tokens([tokenizer(text) for text in said])
        self.holds = torch.tensor(list(said.values())).T.float()  # of a digit, a caption

    def forward(self, images: Tensor, digits: Tensor) -> Tensor:
        """Return the loss of a batch; a third of the captions are true and have hidden words."""
        holds, third = self.holds[digits], len(digits) // 3
        chosen = torch.multinomial(torch.cat((holds[:third], holds[third:] + 0.5)), 1)[:, 0]
        tokens, padding = self.tokens[chosen], self.padding[chosen]
        hidden = (torch.rand(tokens.shape) < 0.5) & (tokens > 2)  # words, and not <s>, </s> or padding
        hidden[third:] = False
        found = self.beit3(images, tokens.masked_fill(hidden, self.mask), padding)
        pictures, said = found[:, 0], found[:, self.beit3.image_tokens :]
        texts = self.beit3(None, self.tokens, self.padding)[:, 0]
        of_all = binary_cross_entropy_with_logits(pictures @ texts.T / math.sqrt(SMALL.width), holds)
        of_one = holds.gather(1, chosen[:, None])[third:, 0]
        beside = binary_cross_entropy_with_logits(self.truth(said[third:, 0])[:, 0], of_one)
        words = cross_entropy(self.words(said[hidden]), tokens[hidden])
        return of_all + beside + words
