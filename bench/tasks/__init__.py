"""Real tasks to compress: MiniLM on SST-2, SUBJ and CoLA, small ViTs on new classes, a small RoBERTa on word order.

    python -m bench.tasks --task sst2 subj cola cifar digits word_order --seeds 0 1 2 --shared ../shared

Fine-tunes once per seed and keeps the weights and the reference scores under `runs/bench/tasks/`. Sentences: 8,000 of
the training split, or what is left of it after 256 that are held out (SUBJ: 7,744), one epoch of AdamW at 5e-5, scored
on the whole validation split (SST-2 872, SUBJ 2,000, CoLA 516 sentences). CIFAR-10: 400 steps of 64 images, AdamW at
1e-3, scored on the first 2,000 test images; handwritten digits: likewise, on all 225 of the validation split. Order of
words: 500 steps of 32 sentences, AdamW at 1e-3, scored on the sentences of documents that nothing was trained on. No
weight decay in any, all learning rates in one cycle. The score is the accuracy; for CoLA it is the correlation of
Matthews, with the accuracy beside it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import dtrain
from bench.tasks.task import HELD_OUT, State, Task, Training, accuracy, answers, call, share_right, snapshot
from bench.tasks.text import cola, sst2, subj, word_order
from bench.tasks.vision import cifar, digits

#: Tasks by name: of the folder of data and models, the seed, how many unlabelled inputs and of what batch.
TASKS: dict[str, Callable[..., Task]] = {make.__name__: make for make in (sst2, subj, cola, cifar, digits, word_order)}


def task(name: str, shared: Path, seed: int, held_out: int = HELD_OUT, batch: int = 64) -> Task:
    """Return the task of a name: one of `TASKS`, or `module:function` of one's own with the same arguments.

    Raises:
        InputError: If there is none.
    """
    if name in TASKS:
        return TASKS[name](shared, seed, held_out, batch)
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise dtrain.InputError(
            f"there is no task {name!r} ({error}). Use one of {', '.join(TASKS)}, or `module:function`, where the "
            "function returns a bench.tasks.Task: base and fine-tuned weights, unlabelled inputs, and what scores them."
        ) from error
    return make(shared, seed, held_out, batch)


__all__ = [
    "TASKS",
    "State",
    "Task",
    "Training",
    "accuracy",
    "answers",
    "call",
    "share_right",
    "snapshot",
    "sst2",
    "task",
]
