"""What is trained small instead of compressed: adapters of `peft`, and the floors, a linear probe and biases alone.

Every adapter is trained on the task's own batches, for as many steps, with AdamW and one cycle of its learning rate,
and a fresh head that belongs to its file. The file is what `save_pretrained` writes, its configuration counted too, and
the score is that of a model that has loaded it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.quality.budgets import bytes_allowed
from bench.quality.measure import point
from bench.quality.peers.disk import bytes_on_disk, check_version, told
from bench.record import Cell
from bench.tasks import Task, answers, share_right
from dtrain import InputError, Rules
from dtrain.rules import matches

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
ATTENTION = ("query", "value", "qkv")  # the linear layers that LoRA's paper adapts; timm's are one


@dataclass(frozen=True)
class Adapter:
    """One kind of adapter.

    Args:
        label: Its name in keys and tables.
        config: Returns peft's configuration for a rank and the names of the linear layers; None for biases alone.
        only: Ends of the names of the linear layers it is put on; none for all of them.
        ranked: Whether it has a rank.
    """

    label: str
    config: Callable[[int, list[str]], Any] | None
    only: tuple[str, ...] = ()
    ranked: bool = True

    def settings(self, name: str) -> dict[str, Any]:
        """Return what a cell of a task depends on, beside its budget."""
        ranks = list(RANKS) if self.ranked else []
        return {**told("peft"), "rates": list(rates_of(name, self.label)), "only": list(self.only), "ranks": ranks}

    def measure(self, task: Task, budget: float | None) -> Cell:
        """Return the cell of the greatest rank within a budget, or of the only file there is."""
        if task.training is None:
            return {"refused": "how it was fine-tuned is not known, so nothing can be trained like it"}
        if self.config is not None:
            check_version("peft")
        if not self.ranked or budget is None:
            return self.trained(task, 1)
        most = bytes_allowed(task, budget)
        fitting = [rank for rank in RANKS if self.size(task, rank) <= most]
        if not fitting:
            return {"most": most, "refused": f"at rank 1 its file has {self.size(task, 1)} bytes, {most} are allowed"}
        return {"knob": fitting[-1], "most": most, **self.trained(task, fitting[-1])}

    def size(self, task: Task, rank: int) -> int:
        """Return the bytes of its files, which do not depend on what is learnt."""
        with TemporaryDirectory() as folder:
            self.save(self.wrap(task, rank), Path(folder))
            return bytes_on_disk(Path(folder))

    def trained(self, task: Task, rank: int) -> Cell:
        """Train at each of its rates, save the one with the least training loss, load into a fresh model, and score."""
        start, tried = time.process_time(), []
        for rate in rates_of(task.name, self.label):
            model = self.wrap(task, rank)
            tried.append((self.learn(task, model, rate), rate, model))
        if not tried:
            raise InputError(f"no rate has been tried for {self.label} on {task.name}. Run bench.quality.rates.")
        loss, rate, model = min(tried, key=lambda found: math.inf if math.isnan(found[0]) else found[0])
        seconds = (time.process_time() - start) / len(tried)
        with TemporaryDirectory() as folder:
            self.save(model, Path(folder))
            size, restored = bytes_on_disk(Path(folder)), self.load(task, Path(folder))
        found, labels = answers(restored, task.val)
        sizes = {"rank": rank if self.ranked else None, "rate": rate, "loss": loss}
        scores = {"score": task.metric(found, labels), "accuracy": share_right(found, labels)}
        return {"seconds": seconds, **sizes, **point(task, size), **scores}

    def learn(self, task: Task, model: nn.Module, rate: float) -> float:
        """Train `model` as the task was fine-tuned, and return the mean loss of the last fifth of the steps."""
        if task.training is None:
            raise ValueError(f"how {task.name} was fine-tuned is not known, so nothing can be trained like it.")
        learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return task.training.run(model, torch.optim.AdamW(learnt, rate, weight_decay=0.0), task.seed)

    def wrap(self, task: Task, rank: int) -> nn.Module:
        """Return a copy of the base in which only what is saved is trained."""
        model = fresh(task)
        if self.config is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad = name.endswith("bias") or matches(name, Rules().whole)
            return model
        from peft import get_peft_model

        torch.manual_seed(task.seed)
        return get_peft_model(model, self.config(rank, list(self.layers(model))))

    def layers(self, model: nn.Module) -> Iterator[str]:
        for name, module in model.named_modules():
            linear = isinstance(module, nn.Linear) and not matches(f"{name}.weight", Rules().whole)
            if linear and (not self.only or name.endswith(self.only)):
                yield name

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what has to be kept of a trained model."""
        if self.config is None:
            kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            save_file(kept, folder / "model.safetensors")
            return
        model.save_pretrained(str(folder))  # type: ignore[operator]
        (folder / "README.md").unlink(missing_ok=True)  # a model card to fill in

    def load(self, task: Task, folder: Path) -> nn.Module:
        """Return the base with what `save` has written."""
        model = fresh(task)
        if self.config is None:
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]


def fresh(task: Task) -> nn.Module:
    """Return a copy of the model with the weights from before fine-tuning."""
    model = deepcopy(task.model)
    model.load_state_dict(task.base)
    return model


def lora(rank: int, layers: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=["head"])


def rslora(rank: int, layers: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=4, use_rslora=True, target_modules=layers, modules_to_save=["head"])


def shira(rank: int, layers: list[str]) -> Any:
    from peft import ShiraConfig

    return ShiraConfig(r=rank, random_seed=42, target_modules=layers, modules_to_save=["head"])


def ia3(_: int, layers: list[str]) -> Any:
    from peft import IA3Config

    wide = [name for name in layers if name.endswith((".output.dense", "fc2")) and "attention" not in name]
    keys = [name for name in layers if name.endswith(("key", "value", "qkv"))]
    return IA3Config(target_modules=keys + wide, feedforward_modules=wide, modules_to_save=["head"])


@dataclass(frozen=True)
class Probe:
    """The floor: the base with a linear probe, of which the file is a head in the checkpoint's own dtype.

    Its score is the task's reference: logistic regression on the base's features, fitted to convergence.
    """

    label: str = "linear probe"

    def settings(self) -> dict[str, Any]:
        return {}

    def measure(self, task: Task, budget: float | None) -> Cell:
        del budget  # there is one file
        head = {name: tensor for name, tensor in task.tuned.items() if matches(name, Rules().whole)}
        with TemporaryDirectory() as folder:
            save_file(head, Path(folder) / "head.safetensors")
            size = bytes_on_disk(Path(folder))
        return {**point(task, size), "score": task.references["linear probe"]}


#: In the order in which they are measured.
ADAPTERS: dict[str, Adapter] = {
    adapter.label: adapter
    for adapter in (
        Adapter("LoRA on attention", lora, ATTENTION),
        Adapter("LoRA", lora),
        Adapter("biases only", None, ranked=False),
        Adapter("IA3", ia3, ranked=False),
        Adapter("SHiRA", shira),
        Adapter("rsLoRA", rslora),
    )
}

#: Rates that `bench.quality.rates` has tried, and whose a task takes that has none of its own.
TRIED = Path(__file__).parents[1] / "results/quality/rates.json"
AS_FOR = {"cifar": "digits", "subj": "sst2", "cola": "sst2"}
FAMILIAR = "LoRA on attention"  # its rate is taken for what has not been tried


def rates_of(name: str, label: str) -> tuple[float, ...]:
    """Return the learning rates of an adapter for a task: the best of those tried, and a third of it for higher ranks.

    The best has the least training loss. What has been tried for nothing like it has none.
    """
    rates, name = rates_tried(TRIED), AS_FOR.get(name, name)
    tried = rates.get((name, label)) or rates.get((name, FAMILIAR), {})
    return tuple(part for best in sorted(tried, key=tried.__getitem__)[:1] for part in (best, best / 3))


@lru_cache
def rates_tried(path: Path) -> dict[tuple[str, str], dict[float, float]]:
    """Return the losses by rate, of every task and adapter."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    if not path.exists():
        return found
    for key, cell in json.loads(path.read_text())["cells"].items():
        name, label, rate = key.split(" | ")
        found.setdefault((name, label), {})[float(rate)] = cell["loss"]
    return found
