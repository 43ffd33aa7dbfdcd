"""English that is always there: the documentation topics of the standard library, and two tasks made of it."""

import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pydoc_data.topics import topics

import torch
from torch import Generator

from parts.glue import Texts

Documents = list[list[str]]
Labelled = list[tuple[tuple[str, ...], int]]

HEADING = re.compile(r"^(?=[^\s*=~\-][^\n]*\n[*=~\-]{4,}$)", re.MULTILINE)
END = re.compile(r'(?<=[.?!:])\s+(?=[A-Z"“(])')
WORDS = (5, 40)  # of a sentence; what is shorter is a heading, what is longer a table
COPIES = 4  # training examples of either kind per sentence: there are few sentences
VALIDATION_EVERY = 5  # every fifth document is for validation
CALIBRATION_EVERY = 10  # and every tenth, none of them, to fit scales on


@cache
def english() -> Documents:
    """Return the sentences of every section of the documentation, each sentence once.

    Some topics are parts of others. A sentence stays in the longest of them alone, so that no two documents share one.
    """
    seen: set[str] = set()
    documents = []
    for text in sorted(topics.values(), key=len, reverse=True):
        for section in HEADING.split(text):
            fresh = [sentence for sentence in dict.fromkeys(sentences(section)) if sentence not in seen]
            seen.update(fresh)
            if len(fresh) > 1:
                documents.append(fresh)
    return documents


def sentences(section: str) -> list[str]:
    """Return what reads as English in a section: no code, no grammar, no tables."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", section))
    found = (sentence for block in blocks for sentence in END.split(re.sub(r"^(\*|\d+\.) ", "", block)))
    return [sentence for sentence in found if reads_as_english(sentence)]


def reads_as_english(sentence: str) -> bool:
    """Return whether a piece of text begins and ends as a sentence and is mostly of letters."""
    whole = re.match(r'[A-Z"“(].*[.?!:]$', sentence) is not None
    letters = sum(char.isalpha() or char == " " for char in sentence)
    return whole and WORDS[0] <= len(sentence.split()) <= WORDS[1] and letters > 0.85 * len(sentence)


def split_english() -> dict[str, Documents]:
    """Return the documents of "train", of "validation" and of "calibration"."""
    splits: dict[str, Documents] = {"train": [], "validation": [], "calibration": []}
    for index, document in enumerate(english()):
        is_held = index % CALIBRATION_EVERY == 0
        splits["validation" if is_val(index) else "calibration" if is_held else "train"].append(document)
    return splits


def to_pretrain() -> Documents:
    """Return what a base may be pre-trained on: all documents but those for validation.

    Those for calibration are among them: what must not have seen them is the fine-tuning, whose change is compressed.
    """
    return [document for index, document in enumerate(english()) if not is_val(index)]


def is_val(index: int) -> bool:
    return index % VALIDATION_EVERY == VALIDATION_EVERY - 1


def word_order() -> dict[str, Texts]:
    """Return sentences as they were written (1) and with half of their neighbouring words swapped (0).

    The first and the last word stay where they are, so capitals and full stops give nothing away.
    """

    def examples(documents: Documents, copies: int, generator: Generator) -> Labelled:
        long = [sentence for document in documents for sentence in document if len(sentence.split()) > WORDS[0]]
        pairs = [((text,), (swapped(text, generator),)) for text in long for _ in range(copies)]
        return [(row, label) for intact, other in pairs for row, label in ((intact, 1), (other, 0))]

    return to_splits(examples)


def swapped(sentence: str, generator: Generator) -> str:
    """Return a sentence in which about half of the neighbouring words have changed places, at least one pair has."""
    words = sentence.split()
    pairs = [place for place in range(1, len(words) - 2, 2) if words[place] != words[place + 1]]
    chosen = [place for place in pairs if pick(2, generator)] or pairs[:1]
    for place in chosen:
        words[place : place + 2] = words[place + 1], words[place]
    return " ".join(words)


def next_sentence() -> dict[str, Texts]:
    """Return a sentence with the one that follows it (1), or with one from elsewhere in the same split (0)."""

    def examples(documents: Documents, copies: int, generator: Generator) -> Labelled:
        every = [(index, sentence) for index, document in enumerate(documents) for sentence in document]
        found: Labelled = []
        for index, document in enumerate(documents):
            elsewhere = [sentence for other, sentence in every if other != index]
            for first, second in pairwise(document):
                for _ in range(copies):
                    found += [((first, second), 1), ((first, elsewhere[pick(len(elsewhere), generator)]), 0)]
        return found

    return to_splits(examples)


def to_splits(examples: Callable[[Documents, int, Generator], Labelled]) -> dict[str, Texts]:
    """Return the splits of a task: several examples per sentence for training, one of either kind for the others."""
    splits = {}
    for seed, (name, documents) in enumerate(split_english().items()):
        found = examples(documents, COPIES if name == "train" else 1, Generator().manual_seed(seed))
        splits[name] = Texts([row for row, _ in found], torch.tensor([label for _, label in found]))
    return splits


def pick(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
