"""What the chart ends in: methods with their arguments, ready to be pasted, and what their files would weigh."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

from dtrain.advice.architecture import Architecture
from dtrain.advice.chart import is_adapter, is_large, is_sparse
from dtrain.advice.measure import Measures
from dtrain.advice.sizes import Expected, Sizes
from dtrain.rules import Rules

Argument = float | str | list[int]


@dataclass(frozen=True)
class Choice:
    """One method to try.

    Args:
        when: What it takes, or what it is for.
        method: The call that constructs it.
        data: What `dtrain.compress` has to be given beside it; empty where it needs none.
        command: The command line that does the same; empty where it needs data.
        expected: What its file would weigh; None where the weights have to be coded to know.
    """

    when: str
    method: str
    data: str
    command: str
    expected: Expected | None


@dataclass(frozen=True)
class Chooser:
    """Writes choices for one pair of models.

    Args:
        base: The base, as the command line has it.
        finetuned: The fine-tuned model, likewise.
        rules: The rules that were measured with.
        sizes: What the file would weigh.
    """

    base: str
    finetuned: str
    rules: Rules
    sizes: Sizes

    def choice(
        self, when: str, name: str, expected: Expected | None = None, *, data: str = "", **arguments: Argument
    ) -> Choice:
        """Return the choice of the method called `name`."""
        given = ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())
        return Choice(when, f"dtrain.{name}({given})", data, "" if data else self._command(name, arguments), expected)

    def _command(self, name: str, arguments: dict[str, Argument]) -> str:
        words = ["dtrain", "compress", self.base, self.finetuned, "delta.safetensors", "--method", name]
        for key, value in arguments.items():
            words += [f"--method.{key}", value if isinstance(value, str) else json.dumps(value)]
        return shlex.join([*words, *rule_words(self.rules)])


def start_keep(measures: Measures) -> float:
    """Return the keep rate to begin with.

    A reading of three small deltas of ours: 23 million weights lost nothing at 0.01, 3 million lost a few points there,
    and a quarter of a million only just stood 0.1. A delta that is sparse is kept where it is not zero; one that is
    large begins at 0.1.
    """
    if measures.tensors and is_sparse(measures):
        return math.ceil(1000 * (1 - measures.zeros)) / 1000
    if measures.elements < 1_000_000 or is_large(measures):
        return 0.1
    return 0.03 if measures.elements < 10_000_000 else 0.01


def choose(measures: Measures, chooser: Chooser, architecture: Architecture, keep: float) -> tuple[Choice, ...]:
    """Return what to try, the likeliest that needs no data first."""
    if not measures.tensors:
        return (chooser.choice("no matrix changed", "Dare", chooser.sizes.expect(keep, 16), keep=keep),)
    if is_sparse(measures):
        chosen = _sparse(chooser, keep)
    elif is_large(measures):
        chosen = _large(chooser, keep)
    else:
        chosen = _small(chooser, architecture, keep)
    if is_adapter(measures):
        chosen.insert(0, _factors(measures, chooser))
    return tuple(chosen)


def _factors(measures: Measures, chooser: Chooser) -> Choice:
    """Return 8-bit factors of the rank that was found, for as many bits as the matrix takes that needs most."""
    needed = [
        8 * tensor.spectrum.rank * (tensor.shape[0] + tensor.elements // tensor.shape[0]) / tensor.elements
        for tensor in measures.tensors
        if tensor.spectrum
    ]
    budget = math.ceil(100 * max(needed)) / 100
    return chooser.choice("merged adapter without its folder", "DeltaCoMe", bits=[8], ranks=[], budget=budget)


def _sparse(chooser: Chooser, keep: float) -> list[Choice]:
    expected = chooser.sizes.expect(keep, 16, indexed=True)
    return [
        chooser.choice("nothing may be lost", "Lossless"),
        chooser.choice("all that changed", "Magnitude", expected, keep=keep),
    ]


def _large(chooser: Chooser, keep: float) -> list[Choice]:
    expected = chooser.sizes.expect(keep, 16, indexed=True)
    data = "calibration=dtrain.Calibration(model, batches)"
    return [
        chooser.choice("no data", "Magnitude", expected, keep=keep),
        chooser.choice("training inputs", "Wanda", expected, data=data, keep=keep),
    ]


def _small(chooser: Chooser, architecture: Architecture, keep: float) -> list[Choice]:
    half, bit = (chooser.sizes.expect(keep, bits) for bits in (16, 1))
    scope = "layer" if architecture == "encoder" else "model"
    inputs, labels = "dtrain.HiddenChange(model, batches)", "dtrain.Metric(model, evaluate)"
    return [
        chooser.choice("no data", "DareX", half, keep=keep, q="norm"),
        chooser.choice("training inputs", "DareX", half, data=f"objective={inputs}", keep=keep, scope=scope),
        chooser.choice("labelled examples", "DareX", half, data=f"objective={labels}", keep=keep, scope=scope),
        chooser.choice("smallest file", "SeededSign", bit, keep=keep),
        chooser.choice("near-lossless", "Ecsq", chooser.sizes.expect(1, 1), bits=1.0),
    ]


def rule_words(rules: Rules) -> list[str]:
    """Return the command-line words that stand for `rules`: nothing for the defaults."""
    words: list[str] = []
    for field in fields(rules):
        patterns = cast("Sequence[str]", getattr(rules, field.name))
        if patterns != field.default:
            words += [f"--{field.name}", *patterns]
    return words
