"""The decision chart of DAREx (arXiv 2410.09344, Fig. 4) on measured numbers, and a few questions of our own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.advice.architecture import Architecture
from dtrain.advice.measure import Measures
from dtrain.advice.sizes import Sizes

#: From this mean |D| on a delta is large. A reading: the paper has 1e-4 where dropping works and 1e-2 where it fails,
#: and draws no line; this is half of the latter.
LARGE = 5e-3
#: The same for ||D|| / ||W0||, for weights that are not of the usual size. A reading: about 5e-3 over weights of 0.02.
LARGE_RELATIVE = 0.3
#: From this share of exact zeros on the positions of the others are worth storing: at 0.9 for half a bit per weight.
SPARSE = 0.9
#: From this share of untouched rows on a tensor is worth a remark.
UNTOUCHED = 0.25
#: A matrix of at most this share of full rank is taken for a product of factors.
ADAPTER = 0.25
#: Energy that two bits with a minimum and a step per patch keep of 256 Gaussian values (measured on 20,000 patches).
TWO_BITS = 0.776

PAPER, OURS, DERIVED, COUNTED = "DAREx, Fig. 4", "ours, from one fine-tune", "ours, derived", "counted"
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


def is_large(measures: Measures) -> bool:
    """Return whether random dropping is likely to fail."""
    return measures.mean_abs >= LARGE or measures.relative >= LARGE_RELATIVE


def is_sparse(measures: Measures) -> bool:
    """Return whether most entries did not change at all."""
    return measures.zeros >= SPARSE


def stores_positions(measures: Measures) -> bool:
    """Return whether the method is one that chooses what it keeps, so that no seed draws the positions."""
    return bool(measures.tensors) and (is_sparse(measures) or is_large(measures))


def is_adapter(measures: Measures) -> bool:
    """Return whether every measured matrix is a product of thin factors, up to rounding that is small beside it."""
    spectra = [tensor.spectrum for tensor in measures.tensors if tensor.spectrum]
    return bool(spectra) and all(s.rank <= ADAPTER * s.side and s.rounding < 0.1 for s in spectra)


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
        dropping = [_fit(), _scope(architecture), *_rows(measures, keep)]
        steps += [_large(measures), *([_calibration()] if is_large(measures) else dropping)]
        steps += [_one_bit(measures), _size()]
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
    found = [(tensor, tensor.spectrum) for tensor in measures.tensors if tensor.spectrum]
    if not found:
        return Step(question, "not measured", "Every matrix is too large to be decomposed in a few minutes.", DERIVED)
    counted = f"{len(found)} of {len(measures.tensors)} matrices were decomposed"
    tensor, highest = max(found, key=lambda item: item[1].rank / item[1].side)
    if not is_adapter(measures):
        because = (
            f"{counted}; {tensor.name} has rank {highest.rank} of {highest.side}, a product of factors would have "
            f"{ADAPTER:.0%} of that at most."
        )
        return Step(question, "no", because, DERIVED)
    size = sum(2 * s.rank * (t.shape[0] + t.elements // t.shape[0]) for t, s in found)
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
        'q="norm", which keeps the norm of every tensor (ours), or SeededSign.'
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
    """Compare what three kinds of code of one bit per weight keep of the energy."""
    factors, patches = measures.spectral(lambda spectrum: spectrum.factors), measures.patches
    kept = {"signs": measures.signs}
    kept |= {} if factors is None else {"factors": factors}
    kept |= {} if patches is None else {"patches": TWO_BITS * patches}
    best = max(kept, key=lambda kind: kept[kind])
    words = {"signs": "signs", "factors": "8-bit factors", "patches": "the stronger half of the patches at two bits"}
    listed = ", ".join(f"{words[kind]} {share:.0%}" for kind, share in kept.items())
    follows = {
        "signs": "No structure that would pay for a transform: BitDelta at one bit, SeededSign below.",
        "factors": "The rank is low enough for DeltaCoMe or ImPart.",
        "patches": "The energy is uneven enough for DeltaDCT.",
    }[best]
    because = (
        f"Of its energy they keep: {listed}. {follows} Energy is not score: on our fine-tune factors of 0.12 bit "
        "scored below a seeded mask of 0.05."
    )
    return Step("Which code suits it at one bit per weight?", best, because, DERIVED)


def _size() -> Step:
    because = (
        "Below 0.2 bit per weight SeededSign, one bit for every kept weight, was ahead of every other code at equal "
        "bytes; from 0.5 bit on Ecsq is close to lossless."
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
        f"that share of its bytes on them. Try --drop {tensor.name}: it takes {cost:,} bytes at keep={keep:g}, and our "
        "fine-tune scored the same with its embeddings left at the base."
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
