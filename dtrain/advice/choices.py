"""What the chart ends in: methods with their arguments, ready to be pasted, and what their files would weigh."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

from dtrain.advice.architecture import Architecture
from dtrain.advice.measure import Measures
from dtrain.advice.sizes import Expected, Sizes
from dtrain.advice.verdict import best_code, is_adapter, is_large, is_sparse, wide_matrices
from dtrain.rules import Rules

Argument = float | str | list[int]

_KEEP = ((1e6, 0.3), (1e7, 0.1), (1e8, 0.03))  # weights less than, keep rate
_KEEP_BEYOND = 0.01
_SIGNS = {0.3: 0.3, 0.1: 0.3, 0.03: 0.1, 0.01: 0.03}  # of one-bit values three times as many are still far smaller
_DELTACOME = 1.085  # bits on disk per bit of its budget: steps and zeros come on top


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

    A reading of the smallest rates at which three deltas of ours lost a point or two: a tenth of 3 million weights, a
    thirtieth of 23 million, and even more of a quarter of a million; the paper's hundredth is for far larger models. A
    delta that is sparse is kept where it is not zero; one that is large begins at a tenth.
    """
    if measures.tensors and is_sparse(measures):
        return math.ceil(1000 * (1 - measures.zeros)) / 1000
    if measures.tensors and is_large(measures):
        return 0.1
    return next((keep for below, keep in _KEEP if measures.elements < below), _KEEP_BEYOND)


def choose(measures: Measures, chooser: Chooser, architecture: Architecture, keep: float) -> tuple[Choice, ...]:
    """Return what to try, the likeliest that needs no data first."""
    if not measures.tensors:
        return (chooser.choice("no matrix changed", "Dare", chooser.sizes.expect(keep, 16), keep=keep),)
    if is_sparse(measures):
        return _sparse(chooser, keep)
    finest = _factors(measures, chooser) if is_adapter(measures) else _finest(measures, chooser)
    if is_large(measures):
        return (*_large(chooser, keep), finest)
    return (*_small(chooser, architecture, keep), finest)


def _factors(measures: Measures, chooser: Chooser) -> Choice:
    """Return 8-bit factors of the rank that was found, for as many bits as the matrix takes that needs most."""
    needed = [8 * s.rank * sum(tensor.sides) / tensor.elements for tensor, s in wide_matrices(measures)]
    budget = math.ceil(100 * max(needed)) / 100
    return chooser.choice("merged adapter without its folder", "DeltaCoMe", bits=[8], ranks=[], budget=budget)


def _sparse(chooser: Chooser, keep: float) -> tuple[Choice, ...]:
    expected = chooser.sizes.expect(keep, 16, indexed=True)
    return (
        chooser.choice("nothing may be lost", "Lossless"),
        chooser.choice("all that changed", "Magnitude", expected, keep=keep),
    )


def _large(chooser: Chooser, keep: float) -> tuple[Choice, ...]:
    expected = chooser.sizes.expect(keep, 16, indexed=True)
    data = "calibration=dtrain.Calibration(model, batches)"
    return (
        chooser.choice("no data", "Magnitude", expected, keep=keep),
        chooser.choice("training inputs", "Wanda", expected, data=data, keep=keep),
    )


def _small(chooser: Chooser, architecture: Architecture, keep: float) -> tuple[Choice, ...]:
    expect, signs = chooser.sizes.expect, _SIGNS[keep]
    scope = "layer" if architecture == "encoder" else "model"
    inputs, labels = "dtrain.HiddenChange(model, batches)", "dtrain.Metric(model, evaluate)"
    fitted: dict[str, Argument] = {"keep": keep, "scope": scope}
    return (
        chooser.choice("no data", "SeededSign", expect(signs, 1), keep=signs),
        chooser.choice(
            "no data, finer values", "Dare", expect(keep, 4), keep=keep, mask="stratified", values="uniform4"
        ),
        chooser.choice("training inputs", "DareX", expect(keep, 16), data=f"objective={inputs}", **fitted),
        chooser.choice("labelled examples", "DareX", expect(keep, 16), data=f"objective={labels}", **fitted),
    )


def _finest(measures: Measures, chooser: Chooser) -> Choice:
    """Return what loses next to nothing: one bit per weight where the rank is low, else two."""
    if best_code(measures) == "factors":
        expected = chooser.sizes.expect(1, _DELTACOME)
        return chooser.choice("next to no loss", "DeltaCoMe", expected, budget=1.0)
    return chooser.choice("next to no loss", "Ecsq", chooser.sizes.expect(1, 2), bits=2.0)


def rule_words(rules: Rules) -> list[str]:
    """Return the command-line words that stand for `rules`: nothing for the defaults."""
    words: list[str] = []
    for field in fields(rules):
        given = cast("str | Sequence[str]", getattr(rules, field.name))
        if given != field.default:
            words += [f"--{field.name}", *([given] if isinstance(given, str) else given)]
    return words
