"""What is compared of dtrain: one table of methods and fits, each with one knob."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import dtrain
from bench.cells import describe, plain

#: "dtrain": ours. "stand-in": our preset of a published method that no package on the index writes a file for.
Group = Literal["dtrain", "stand-in"]


@dataclass(frozen=True)
class Entry:
    """One method and how its scales are found.

    Args:
        label: Its name in keys and tables.
        make: Returns the method for a knob, with which its bytes grow, and a seed.
        group: Whose it is.
        fit: What fits the scales; None for the method's own way.
        objective: What they are fitted to.
        low: Least knob.
        high: Greatest knob.
        batches: How many batches of inputs a fit sees; None for all.
        inputs: Whether the method looks at what the layers see.
    """

    label: str
    make: Callable[[float, int], dtrain.Method]
    group: Group = "stand-in"
    fit: dtrain.Fit | None = None
    objective: Literal["hidden", "logits"] = "hidden"
    low: float = 2**-20
    high: float = 1.0
    batches: int | None = None
    inputs: bool = False

    def settings(self, seed: int) -> dict[str, Any]:
        """Return what a cell depends on, beside its budget."""
        method = plain(self.make(min(self.high, 1 / 32), seed).describe())
        fit = {"fit": describe(self.fit), "objective": self.objective, "batches": self.batches}
        return {"method": method, **fit, "knob": [self.low, self.high]}


LEARN = dtrain.Learn(steps=50)
FEW = 1  # batches that searches look at up to hundreds of times


def sign(keep: float, seed: int) -> dtrain.Method:
    return dtrain.SeededSign(keep=keep, seed=seed, q="keep")


def darex(keep: float, seed: int) -> dtrain.Method:
    return dtrain.DareX(keep=keep, seed=seed, masks=1)


def deltadq(keep: float, seed: int) -> dtrain.Method:
    return dtrain.DeltaDQ(alpha=min(65536, max(1, round(1 / keep))), seed=seed)


def deltadct(share: float, seed: int) -> dtrain.Method:
    del seed  # nothing of it is drawn
    return dtrain.DeltaDCT(patch=64, bits=(2, 0), shares=(share, 1 - share))


def shifted(keep: float, seed: int) -> dtrain.Method:
    return dtrain.Dbms(dtrain.SeededSign(keep=keep, seed=seed))


def compensated(keep: float, seed: int) -> dtrain.Method:
    del seed
    return dtrain.EoRA(host=dtrain.Magnitude(keep=keep), rank=1)


#: Named before any cell was measured: a selection among many entries by their scores would be one on evaluation data.
CHOSEN = "SeededSign + parallel"
PLAIN = (
    Entry(CHOSEN, sign, "dtrain", dtrain.ClosedForm("parallel")),
    Entry("SeededSign", sign, "dtrain"),
)
STAND_INS = (
    Entry("DeltaDQ", deltadq, low=1 / 65536),
    Entry("BitDelta", lambda _, __: dtrain.BitDelta(), low=1.0),
    Entry("DARE, seeded", lambda keep, seed: dtrain.Dare(keep=keep, seed=seed)),
    Entry("UltraDelta", lambda keep, seed: dtrain.UltraDelta(keep=keep, seed=seed)),
    Entry("Delta-CoMe", lambda bits, _: dtrain.DeltaCoMe(budget=bits), low=0.005, high=4.0),
    Entry("ComPEFT", lambda keep, _: dtrain.ComPEFT(keep=keep)),
    Entry("Delta-DCT", deltadct),
    Entry("ImPart", lambda keep, seed: dtrain.ImPart(keep=keep, seed=seed)),
    Entry("Magnitude", lambda keep, _: dtrain.Magnitude(keep=keep)),
)
OWN = (
    Entry("Lossless", lambda _, __: dtrain.Lossless(), "dtrain", low=1.0),
    Entry("Ecsq", lambda bits, _: dtrain.Ecsq(bits=bits), "dtrain", low=0.001, high=8.0),
)
LEARNED = (
    Entry("SeededSign + Learn", sign, "dtrain", LEARN),
    Entry("SeededSign + Learn (logits)", sign, "dtrain", LEARN, "logits"),
    Entry("BitDelta + Learn", lambda _, __: dtrain.BitDelta(), "dtrain", LEARN, low=1.0),
    Entry("DeltaDQ + Learn", deltadq, "dtrain", LEARN, low=1 / 65536),
)
SEARCHED = (
    Entry("DAREx-q", darex, batches=FEW, fit=dtrain.Search()),
    Entry("SeededSign + Search", sign, "dtrain", dtrain.Search(), batches=FEW),
    Entry("DBMS on SeededSign", shifted, "dtrain", dtrain.Search(), batches=FEW),
)
CALIBRATED = (
    Entry("Wanda", lambda keep, _: dtrain.Wanda(keep=keep), inputs=True),
    Entry("Structured", lambda keep, seed: dtrain.Structured(keep=keep, seed=seed, q="keep")),
    Entry("EoRA on Magnitude", compensated, inputs=True),
)
ENTRIES = {entry.label: entry for entry in (*PLAIN, *OWN, *STAND_INS, *LEARNED, *SEARCHED, *CALIBRATED)}
