"""DAREx-q: drop, and choose the rescaling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.dare import RandomDrop
from dtrain.methods.method import check_type
from dtrain.stages import Payload, decode

Search = Literal["grid", "golden"]
Scope = Literal["model", "layer"]


@dataclass(frozen=True)
class DareX(RandomDrop):
    """Keep a random share of the delta and divide it by a fitted q instead of that share (DAREx-q).

    `D_hat = (M * D) / q` with keep <= q <= 1: a larger q trades some of the mean of the change for much less noise.

    * **Source**: Deng et al., "DARE the Extreme", arXiv 2410.09344, section 4. That q is searched on labels (q_v) or on
      the change of the last hidden state (q_e) is certain; searching it on a *logarithmic* scale, over several masks,
      is ours, as is the layer-wise search: the paper finds its layer-wise q in closed form.
    * **Data needed**: with q="search" an objective on *training* inputs: `HiddenChange` (q_e) or `Metric` (q_v). A
      number or "norm" needs none.
    * **Bits per parameter**: nominal 16 * keep; on disk the same.
    * **When it fails**: when almost nothing is kept of a large delta; and one batch can lead to an unlucky q.

    Args:
        keep: Share of the delta's elements that is kept, in [2**-24, 1].
        seed: Seed of the masks. A mask costs no bytes: it is drawn again from the seed and the tensor's name.
        mask: "bernoulli" keeps each element independently; "stratified" keeps one out of every 1/keep neighbours.
        values: How kept values are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".
        q: A number in (0, 1]; "norm" to keep every tensor's Frobenius norm; "search" to fit it to the objective.
        scope: One q for the "model", or one for every "layer" (tensor), found after the model's.
        search: "grid": a logarithmic grid, refined once around its best point; "golden": golden-section search.
        masks: Number of masks the objective is averaged over while searching. The file holds the first one.

    Raises:
        InputError: If an argument is out of its range.
    """

    q: float | Literal["search", "norm"] = "search"
    scope: Scope = "model"
    search: Search = "grid"
    masks: int = 3
    source: ClassVar[str] = "arXiv 2410.09344"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("masks", self.masks, int)
        if not isinstance(self.q, str):
            check_type("q", self.q, float)
        if isinstance(self.q, str) and self.q not in ("search", "norm"):
            raise InputError(f"`q` must be a number in (0, 1], 'search' or 'norm', got {self.q!r}.")
        if not isinstance(self.q, str) and not 0 < self.q <= 1:
            raise InputError(f"`q` must be in (0, 1], got {self.q}. q=keep is DARE, q=1 is no rescaling.")
        if self.scope not in ("model", "layer") or self.search not in ("grid", "golden"):
            raise InputError(
                f"`scope` must be 'model' or 'layer', `search` 'grid' or 'golden'; got {self.scope!r}, {self.search!r}."
            )
        if self.masks < 1:
            raise InputError(f"`masks` must be at least 1, got {self.masks}. Use masks=3 for a stable q.")

    @property
    def needs(self) -> str:
        """An objective where q is searched; nothing otherwise."""
        return "objective" if self.q == "search" else "nothing"

    def encode(self, name: str, delta: Tensor) -> tuple[Payload, ...]:
        """Return the kept values, scaled by 1/q; where q is yet to be searched, they are not rescaled."""
        payload = self.unscaled(name, delta)
        if self.q == "norm":
            kept = decode(payload, name, delta.shape, delta.device).values
            norm = _norm(kept) * payload.scale
            return (replace(payload, scale=payload.scale * _norm(delta) / norm if norm else payload.scale),)
        q = 1.0 if isinstance(self.q, str) else self.q
        return (replace(payload, scale=payload.scale / q),)


def _norm(values: Tensor) -> float:
    # float64 sums differ between thread counts by far less than a float32 scale can show.
    return float(values.double().square().sum().sqrt())
