"""`advise`: which method for this pair of models, and why."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from dtrain.advice.architecture import Architecture, guess_architecture
from dtrain.advice.chart import Step, walk
from dtrain.advice.choices import Choice, Chooser, choose, start_keep
from dtrain.advice.measure import Measures, measure
from dtrain.advice.show import chart_table, choice_lines, measure_table, role_table, size_table, worst_table
from dtrain.advice.sizes import Expected, Sizes, size_up
from dtrain.advice.verdict import stores_positions
from dtrain.difference import pair
from dtrain.rules import Rules
from dtrain.weights import Source, read_weights

_KEEPS = (0.1, 0.03, 0.01, 0.003)
_BITS = (16, 1)


@dataclass(frozen=True)
class Advice:
    """What a delta looks like and which method suits it; `print` shows all of it.

    Args:
        measures: Magnitude, tails, zeros, patches and ranks of the tensors that a method would compress.
        sizes: All tensors by what the rules make of them.
        architecture: Encoder or decoder, guessed from the names.
        steps: The decision chart of DAREx (arXiv 2410.09344, Fig. 4) and a few questions of our own, in order.
        choices: What to try, the likeliest that needs no data first.
        expected: What files would weigh at a few keep rates, an estimate.
    """

    measures: Measures
    sizes: Sizes
    architecture: Architecture
    steps: tuple[Step, ...]
    choices: tuple[Choice, ...]
    expected: tuple[Expected, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        sizes = {"checkpoint_bytes": self.sizes.checkpoint_bytes, "fixed_bytes": self.sizes.fixed_bytes}
        return {
            "measures": self.measures.as_dict(),
            "sizes": {**asdict(self.sizes), **sizes},
            "architecture": self.architecture,
            "steps": [asdict(step) for step in self.steps],
            "choices": [asdict(choice) for choice in self.choices],
            "expected": [asdict(item) for item in self.expected],
        }

    def lines(self) -> list[RenderableType]:
        """Return what to show, from top to bottom: texts and rich tables."""
        shown: list[RenderableType] = []
        if self.measures.tensors:
            shown += [measure_table(self.measures), worst_table(self.measures)]
        shown += ["Which method, and why", chart_table(self.steps), ""]
        shown += ["What to run; then lower keep for as long as your score holds", *choice_lines(self.choices), ""]
        return [*shown, role_table(self.sizes), size_table(self.expected)]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110)
        for part in self.lines():
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def advise(base: Source, finetuned: Source, rules: Rules | None = None) -> Advice:
    """Measure a delta and walk DAREx's decision chart on the numbers: which method, why, and what it would weigh.

    Nothing is compressed and nothing is fitted. A statement is marked as the paper's, as a reading of it, or as ours.

    Args:
        base: The model before fine-tuning, anything that `dtrain.compress` takes.
        finetuned: The model after it, likewise.
        rules: Which tensor is treated how; only what they leave to the method is measured.

    Returns:
        The advice; `print` it.

    Raises:
        InputError: If the models cannot be paired, do not differ, or the delta holds NaN or inf.
    """
    rules = rules or Rules()
    changes = pair(read_weights(base), read_weights(finetuned), rules)
    measures, sizes = measure(changes), size_up(changes, rules)
    architecture = guess_architecture(change.name for change in changes if change.role != "base_only")
    keep = start_keep(measures)
    indexed = stores_positions(measures)
    chooser = Chooser(_word(base, "BASE"), _word(finetuned, "FINETUNED"), rules, sizes)
    return Advice(
        measures=measures,
        sizes=sizes,
        architecture=architecture,
        steps=walk(measures, sizes, architecture, keep),
        choices=choose(measures, chooser, architecture, keep),
        expected=tuple(sizes.expect(keep, bits, indexed=indexed) for keep in _KEEPS for bits in _BITS),
    )


def _word(source: Source, placeholder: str) -> str:
    """Return how the command line would name a model."""
    return str(source) if isinstance(source, str | Path) else placeholder
