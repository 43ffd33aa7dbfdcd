"""The decision chart of DAREx (arXiv 2410.09344, Fig. 4) on measured numbers, and a few questions of our own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.advice.architecture import Architecture
from dtrain.advice.measure import Measures
from dtrain.advice.sizes import Sizes
from dtrain.advice.verdict import (
    ADAPTER,
    LARGE,
    LARGE_RELATIVE,
    NARROW,
    SPARSE,
    UNTOUCHED,
    best_code,
    is_adapter,
    is_large,
    is_sparse,
    kept_at_one_bit,
    stores_positions,
    wide_matrices,
)

PAPER, OURS, DERIVED, COUNTED = "DAREx, Fig. 4", "ours, measured", "ours, derived", "counted"
YOU = "only you know"


@dataclass(frozen=True)
class Step:
    """One question of the chart.

    Args:
        question: What is asked.
        answer: The answer in a word or two; "only you know" where the weights do not tell.
        because: The measured number the answer rests on, and what follows from it.
        source: Whose rule it is.
    """

    question: str
    answer: str
    because: str
    source: str


def walk(measures: Measures, sizes: Sizes, architecture: Architecture, keep: float) -> tuple[Step, ...]:
    """Walk the chart.

    Args:
        measures: What the delta looks like.
        sizes: What the file would weigh.
        architecture: What the names look like.
        keep: The keep rate that is going to be recommended.

    Returns:
        The questions on the way, in order.
    """
    if not measures.tensors:
        return (_nothing(sizes),)
    steps = [_training(), _adapter(measures), _zeros(measures)]
    if not is_sparse(measures):
        dropping = [_fit(), _scope(architecture), *_rows(measures, keep), _size()]
        steps += [_large(measures), *([_calibration()] if is_large(measures) else dropping), _one_bit(measures)]
    return (*steps, _rest(sizes, keep, indexed=stores_positions(measures)))


def _nothing(sizes: Sizes) -> Step:
    because = (
        "No matrix that the rules give to the method has changed, so the method makes no difference to the "
        f"{sizes.fixed_bytes:,} bytes of the rest."
    )
    return Step("Is there a matrix to compress?", "no", because, COUNTED)


def _training() -> Step:
    because = (
        'If it may, fine-tune with dtrain.AdamR(norm="l2"), which keeps the delta small, and use Dare; or with '
        'norm="l1", which keeps it sparse, and use Magnitude. What follows is for a model that is done.'
    )
    return Step("May training still change?", YOU, because, PAPER)


def _adapter(measures: Measures) -> Step:
    question = "Is it a merged adapter?"
    found = wide_matrices(measures)
    if not found:
        because = f"No matrix is both {NARROW} wide and small enough to be decomposed in a few minutes."
        return Step(question, "not measured", because, DERIVED)
    counted = f"{len(measures.with_spectrum)} of {len(measures.tensors)} matrices were decomposed"
    tensor, highest = max(found, key=lambda item: item[1].rank / item[1].side)
    if not is_adapter(measures):
        because = (
            f"{counted}; {tensor.name} has rank {highest.rank} of {highest.side}; a product of factors would have "
            f"{ADAPTER:.0%} of that at most."
        )
        return Step(question, "no", because, DERIVED)
    size = sum(2 * s.rank * sum(t.sides) for t, s in found)
    because = (
        f"{counted}, and none has a rank above {max(s.rank for _, s in found)}: {size:,} bytes of factors in half "
        "precision. Keep the adapter's own folder if you have it; dtrain compress zeros FOLDER OUT makes it smaller."
    )
    return Step(question, "it looks like one", because, DERIVED)


def _zeros(measures: Measures) -> Step:
    share = f"{measures.zeros:.1%} of the entries did not change (most: {SPARSE:.0%})"
    if is_sparse(measures):
        because = f"{share}: a random mask would keep mostly zeros. Lossless codes them away, Magnitude skips them."
        return Step("Is most of it exactly zero?", "yes", because, DERIVED)
    return Step("Is most of it exactly zero?", "no", f"{share}: a random mask is worth its while.", DERIVED)


def _large(measures: Measures) -> Step:
    numbers = (
        f"mean |D| is {short(measures.mean_abs)} (large: {short(LARGE)}), "
        f"||D|| / ||W0|| is {short(measures.relative)} (large: {LARGE_RELATIVE:g})"
    )
    if is_large(measures):
        because = f"{numbers}: random dropping would drown it in noise, so the largest changes are kept instead."
        return Step("Are the deltas large?", "yes", because, f"{PAPER}; limits: a reading")
    because = f"{numbers}: random dropping should work."
    return Step("Are the deltas large?", "no", because, f"{PAPER}; limits: a reading")


def _calibration() -> Step:
    because = (
        "With training inputs Wanda weighs every change by the size of its input; without, Magnitude takes the "
        "largest. Neither rescales."
    )
    return Step("Is there calibration data?", YOU, because, PAPER)


def _fit() -> Step:
    because = (
        "Labelled training examples: q_v, dtrain.Metric. Training inputs only: q_e, dtrain.HiddenChange. Nothing: "
        "1/keep as Dare and SeededSign do, which held at a hundredth of a MiniLM but only at a tenth of a ViT (ours)."
    )
    return Step("What is there to fit the scale on?", YOU, because, PAPER)


def _scope(architecture: Architecture) -> Step:
    answer, because = {
        "encoder": ("per layer", 'The names are an encoder\'s: scope="layer", or q="bound" with a calibration.'),
        "decoder": ("one for the model", 'The names are a decoder\'s: scope="model".'),
        "both": ("try both", 'There are names of an encoder (scope="layer") and of a decoder (scope="model").'),
        "unknown": ("try both", 'Encoders take scope="layer", decoders scope="model"; the names tell neither.'),
    }[architecture]
    return Step("One scale per layer, or one?", answer, because, PAPER)


def _one_bit(measures: Measures) -> Step:
    kept, best = kept_at_one_bit(measures), best_code(measures)
    words = {"signs": "signs", "factors": "8-bit factors", "patches": "the stronger half of the patches at two bits"}
    listed = ", ".join(f"{words[code]} {share:.0%}" for code, share in kept.items())
    follows = {
        "signs": "No structure that would pay for a transform: BitDelta.",
        "factors": "The rank is low enough for DeltaCoMe or ImPart.",
        "patches": "The energy is uneven enough for DeltaDCT.",
    }[best]
    because = f"Of its energy they keep: {listed}. {follows} At one bit, not far below: energy is not score."
    return Step("Which code suits it at one bit per weight?", best, because, DERIVED)


def _size() -> Step:
    because = (
        "On three fine-tunes each of a MiniLM and a small ViT, codes on random masks were ahead below 0.3 bit per "
        "weight: DeltaDQ at 0.25 bit, and on the MiniLM down to 0.015, SeededSign within two points of it; on the "
        "ViT SeededSign was ahead from 0.06 bit. At one bit DeltaDQ and DeltaCoMe lost nothing, nor did Ecsq at two."
    )
    return Step("How small must the file be?", YOU, because, OURS)


def _rows(measures: Measures, keep: float) -> list[Step]:
    found = [tensor for tensor in measures.tensors if tensor.unchanged_rows >= UNTOUCHED * tensor.shape[0]]
    if not found:
        return []
    tensor = max(found, key=lambda tensor: tensor.elements)
    untouched, cost = tensor.unchanged_rows / tensor.shape[0], math.ceil(2 * keep * tensor.elements)
    because = (
        f"{untouched:.0%} of the {tensor.shape[0]:,} rows of {tensor.name} did not change, and a random mask spends "
        f"that share of its bytes on them. Try --drop {tensor.name}: it takes {cost:,} bytes of 16-bit values at "
        f"keep={keep:g}, and a MiniLM of ours scored the same with its embeddings left at the base."
    )
    return [Step("Are there untouched rows?", "yes", because, OURS)]


def _rest(sizes: Sizes, keep: float, *, indexed: bool) -> Step:
    shares = {bits: sizes.fixed_bytes / sizes.expect(keep, bits, indexed=indexed).file_bytes for bits in (16, 1)}
    because = (
        "Vectors, whole tensors, names and digests, whatever the method does: "
        f"{shares[16]:.1%} of a file with keep={keep:g} and 16-bit values, {shares[1]:.1%} of one with 1-bit values."
    )
    return Step("What else is in the file?", f"{sizes.fixed_bytes:,} bytes", because, COUNTED)


def short(value: float) -> str:
    """Return a number in two digits, small ones as 3.1e-4."""
    if not math.isfinite(value) or value >= 0.01:
        return f"{value:.2g}"
    return f"{value:.1e}".replace("e-0", "e-")
