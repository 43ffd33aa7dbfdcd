"""Arguments that no method takes: refused when it is made, with a sentence that names them."""

import math

import pytest
import torch

import dtrain
from dtrain import (
    BitDelta,
    ComPEFT,
    Dare,
    DareX,
    Dbms,
    DeltaCoMe,
    DeltaDCT,
    DeltaDQ,
    Ecsq,
    EoRA,
    ImPart,
    InputError,
    Lossless,
    Magnitude,
    NeedsDataError,
    SeededSign,
    Structured,
    UltraDelta,
    Wanda,
)

SEED = r"`seed`.* in \[0, 2\*\*64\)"
VALUES = [
    ({"values": "int8"}, "`values` must be one of float16, bfloat16, uniform8, uniform4, uniform2, sign, got 'int8'")
]
COUNTED = [  # a share of the elements
    ({"keep": 0}, r"`keep` must be in .*1\], got 0"),
    ({"keep": 1.1}, r"`keep` must be in .*1\], got 1\.1"),
    ({"keep": math.nan}, "`keep` must be in .*got nan"),
    ({"keep": True}, "`keep` must be a number, got True"),
    ({"keep": "0.1"}, "`keep` must be a number, got '0.1'"),
]
SEEDED = [
    ({"seed": -1}, SEED),
    ({"seed": 2**64}, SEED),
    ({"seed": 1.0}, "`seed` must be an integer, got 1.0"),
]
SCALED = [  # what is divided by q
    ({"q": 0}, r"`q` must be in \(0, 1\], got 0"),
    ({"q": 1.01}, r"`q` must be in \(0, 1\], got 1\.01"),
    ({"q": "best"}, "`q` must be a number in .*'search', 'norm', 'parallel' or 'keep', got 'best'"),
    ({"scope": "row"}, "`scope` must be 'model' or 'layer', got 'row'"),
    ({"search": "sgd"}, "`search` must be 'grid' or 'golden', got 'sgd'"),
    ({"masks": 0}, "`masks` must be at least 1, got 0"),
    ({"masks": 2.0}, "`masks` must be an integer"),
]
NO_BOUND = [({"q": "bound"}, "`q` must be a number .* got 'bound'")]
BAD = {
    Dare: [*COUNTED, *SEEDED, *VALUES, ({"mask": "none"}, "`mask` must be 'bernoulli' or 'stratified', got 'none'")],
    DareX: [
        *COUNTED,
        *SEEDED,
        *VALUES,
        *SCALED,
        ({"q": "bound", "eta": 0}, "`eta` must be a positive number, got 0"),
        ({"q": "bound", "eta": math.inf}, "`eta` must be a positive number, got inf"),
        ({"eta": math.nan}, "`eta` must be a positive number, got nan"),
        ({"eta": "1"}, "`eta` must be a number"),
    ],
    Structured: [
        *COUNTED,
        *SEEDED,
        *VALUES,
        *SCALED,
        *NO_BOUND,
        ({"unit": "tile"}, "`unit` must be 'row' or 'column' or 'block', got 'tile'"),
        ({"unit": "block", "block": 1}, "`block` must be at least 2, got 1. Use DareX for single elements"),
        ({"unit": "block", "block": 1025}, r"`block` must be in \[1, 1024\]"),
        ({"block": 2.0}, "`block` must be an integer"),
    ],
    SeededSign: [*COUNTED, *SEEDED, *SCALED, *NO_BOUND],
    Dbms: [
        ({"host": Lossless()}, "`host` must be a lossy method"),
        ({"host": Dbms()}, "`host` must be a lossy method"),
        ({"host": BitDelta("row")}, "bytes of BitDelta cannot be split"),
        ({"source": "ours"}, "`source` must be 'own' or 'shared', got 'ours'"),
        ({"split": 1.0}, r"`split` must be in \(0, 1\), 'search' or None, got 1.0"),
        ({"split": True}, "`split` must be a number"),
        ({"lam": -1.0}, "`lam` must be 'fit' or a number from 0 on"),
        ({"eta": "best"}, "`eta` must be a number"),
    ],
    Magnitude: [*COUNTED, *VALUES, ({"rescale": "mean"}, "`rescale` must be 'none' or 'norm', got 'mean'")],
    Wanda: [*COUNTED, *VALUES],
    BitDelta: [({"scale": "block"}, "`scale` must be 'tensor' or 'row' or 'column', got 'block'")],
    ComPEFT: [
        *COUNTED,
        *(({"alpha": a}, f"`alpha` must be a positive number, got {a}") for a in (0, -1.0, math.nan, math.inf)),
        ({"scope": "layer"}, "`scope` must be 'model' or 'tensor', got 'layer'"),
    ],
    DeltaDQ: [
        *SEEDED,
        ({"alpha": 0}, r"`alpha` must be in \[1, 65536\].*; got 0,"),
        ({"alpha": 65537}, r"`alpha` must be in \[1, 65536\]"),
        ({"alpha": 8.0}, "`alpha` must be an integer, got 8.0"),
        ({"bits": 17, "parts": 1}, r"`bits` in \[1, 16\]"),
        ({"group": 12}, "`group` must be a multiple of alpha=8 up to 65536, got 12"),
        ({"group": 0}, "`group` must be a multiple of alpha=8"),
        ({"group": 1 << 17}, "`group` must be a multiple of alpha=8 up to 65536"),
        ({"group": "layer"}, "`group` must be a multiple of alpha=8 .* got 'layer'"),
        ({"scope": 1}, "`scope` must be 'tensor', 'row' or at least 2, got 1"),
        ({"scope": "block"}, "`scope` must be 'tensor', 'row' or at least 2, got 'block'"),
        ({"parts": 3}, r"`parts` must be a power of two up to 2\*\*bits and 256, got 3"),
        ({"parts": 32}, r"`parts` must be a power of two up to 2\*\*bits and 256, got 32"),
        ({"parts": 0}, "`parts` must be a power of two"),
    ],
    DeltaDCT: [
        ({"patch": 1}, r"`patch` must be in \[2, 128\], got 1"),
        ({"patch": 16.0}, "`patch` must be an integer"),
        ({"bits": (9, 0)}, r"`bits` must be 0 to 8, one per share; got \(9, 0\)"),
        ({"bits": (2, 1, 0)}, "`bits` must be 0 to 8, one per share"),
        ({"bits": 2}, r"`bits` must be a list of numbers, got 2. Use bits=\[...\]"),
        ({"bits": "20"}, "`bits` must be a list of numbers, got '20'"),
        ({"bits": (2.0, 0)}, "`bits` must be an integer, got 2.0"),
        ({"shares": (0.5, 0.4)}, r"`shares` must be shares of 1, got \(0.5, 0.4\)"),
        ({"shares": (1.5, -0.5)}, "`shares` must be shares of 1"),
        ({"shares": (math.nan, 0.5)}, "`shares` must be shares of 1"),
        ({"shares": (0.5, math.nan)}, "`shares` must be shares of 1"),
        ({"bits": (), "shares": ()}, r"`shares` must be shares of 1, got \(\)"),
        ({"shares": ("a", 1)}, "`shares` must be a number, got 'a'"),
        ({"fill": "median"}, "`fill` must be 'mean' or 'zero', got 'median'"),
    ],
    DeltaCoMe: [
        ({"bits": (8, 3, 17)}, r"`bits` must be in \[1, 16\], got 17"),
        ({"bits": (8, 3, 2.5)}, "`bits` must be an integer, got 2.5"),
        ({"bits": 8}, "`bits` must be a list of numbers, got 8"),
        ({"ranks": (2,)}, r"`ranks` must be one less than `bits`, none negative; got \(2,\)"),
        ({"ranks": (2, -1)}, "`ranks` must be one less than `bits`, none negative"),
        ({"bits": (), "ranks": ()}, "`ranks` must be one less than `bits`"),
        ({"budget": 0}, "`budget` must be a positive number, `block` 2 or more; got 0"),
        ({"budget": math.inf}, "`budget` must be a positive number"),
        ({"block": 1}, "`block` 2 or more; got 1.0 and 1"),
    ],
    ImPart: [
        *SEEDED,
        *VALUES,
        *COUNTED[-2:],
        ({"keep": 0}, r"`keep` must be in \(0, 2\], got 0"),
        ({"keep": 2.1}, r"`keep` must be in \(0, 2\], got 2.1"),
        ({"beta": 1}, r"`beta` must be in \[0, 1\), got 1"),
        ({"beta": math.nan}, r"`beta` must be in \[0, 1\), got nan"),
    ],
    UltraDelta: [
        *COUNTED,
        *SEEDED,
        ({"step": 1}, r"`step` must be in \[0, 1\).* got 1, 0.5, 4, 0"),
        ({"gamma": 0}, r"`gamma` in \(0, 1\].* got 0.5, 0, 4, 0"),
        ({"bits": 13}, r"`bits` in \[1, 12\].* got 0.5, 0.5, 13, 0"),
    ],
    EoRA: [
        *VALUES,
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"rank": 2.0}, "`rank` must be an integer"),
        ({"host": "Magnitude"}, r"`host` must be a method such as dtrain.BitDelta\(\), got 'Magnitude'"),
        ({"host": Magnitude}, "`host` must be a method such as"),
        ({"host": EoRA()}, "EoRA cannot complete EoRA .*not EoRA itself"),
        ({"host": Lossless()}, "EoRA cannot complete Lossless .*must be lossy"),
        ({"host": DareX()}, "EoRA cannot complete DareX .*Use q='norm' or a number where q is searched"),
    ],
    Ecsq: [
        *(({"bits": bits}, r"`bits` must be in \(0, 8\], got") for bits in (0, -1, 8.1, math.nan)),
        ({"bits": "1"}, "`bits` must be a number, got '1'"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        pytest.param(kind, arguments, message, id=f"{kind.__name__} {arguments}")
        for kind, rows in BAD.items()
        for arguments, message in rows
    ],
)
def test_bad_arguments_are_refused_at_construction(kind, arguments, message):
    with pytest.raises(InputError, match=message):
        kind(**arguments)


def test_every_method_with_arguments_is_in_the_table():
    assert set(BAD) == set(dtrain.METHODS) - {Lossless}


@pytest.mark.parametrize("method", [DareX(keep=0.1), Structured(), SeededSign(q="search")], ids=repr)
def test_a_search_needs_an_objective(method):
    base = {"w": torch.zeros(4, 4)}
    with pytest.raises(NeedsDataError, match=f"{type(method).__name__} with Search fits scales on .*q='norm'"):
        dtrain.compress(base, {"w": torch.ones(4, 4)}, method)
