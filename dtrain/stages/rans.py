"""Entropy coding: range asymmetric numeral systems (Duda 2013) with the table of frequencies in the stream.

The coder is `constriction`'s: 32-bit words, a 64-bit state that starts at 0, 24-bit probabilities. It takes floats, but
when these are whole numbers that add up to 2**24 less their count, its table is exactly those integers plus one. So a
stream is defined by integers alone, and a decoder of twenty lines can read it (tests/artifact has one).
"""

from __future__ import annotations

from typing import Any, cast

import constriction
import numpy as np
import torch
from torch import Tensor

from dtrain.stages.bits import as_tensor
from dtrain.stages.cursor import Cursor, varint

MAX_SYMBOLS = 4096
_PRECISION = 24  # constriction's
_PRECISIONS = (6, 8, 10, 12, 14, 16, 20)  # of the table in the stream: a short stream is not worth a long table

_stream = cast("Any", constriction).stream
Array = np.ndarray[Any, Any]


def rans_encode(symbols: Tensor) -> Tensor:
    """Return a self-delimiting stream (uint8) of integer `symbols` of shape (n,), each in [0, 4096)."""
    flat = symbols.reshape(-1).cpu().numpy().astype(np.int32)
    if not flat.size:
        return torch.empty(0, dtype=torch.uint8)
    counts = np.bincount(flat)
    precisions = (bits for bits in _PRECISIONS if np.count_nonzero(counts) <= 1 << bits)
    precision, table = min(((bits, _table(counts, bits)) for bits in precisions), key=lambda item: _cost(counts, *item))
    coder = _stream.stack.AnsCoder()
    coder.encode_reverse(flat, _model(table, precision))
    words = cast("Array", coder.get_compressed()).astype("<u4")
    head = bytes([precision]) + varint(len(table)) + b"".join(varint(int(share)) for share in table)
    return as_tensor(head + varint(len(words)) + words.tobytes())


def rans_decode(cursor: Cursor, count: int, limit: int) -> Tensor:
    """Read `count` symbols, each less than `limit`: uint8 where these fit, else int32.

    Raises:
        ValueError: If the bytes are no stream of that many symbols.
    """
    dtype = torch.uint8 if limit <= 256 else torch.int32
    if not count:
        return torch.empty(0, dtype=dtype)
    precision = cursor.take(1)[0]
    table = np.array(cursor.sequence(cursor.varint, min(limit, MAX_SYMBOLS)), dtype=np.int64)
    if precision > 20 or not table.size or int(table.sum()) != 1 << precision or int(table.max()) > 1 << precision:
        raise ValueError(f"the frequencies of {len(table)} symbols do not add up to 2**{precision}")
    words = np.frombuffer(cursor.take(4 * cursor.varint()), dtype="<u4").astype(np.uint32)
    try:
        coder = _stream.stack.AnsCoder(words)
        symbols = cast("Array", coder.decode(_model(table, precision), count))
    except ValueError as error:
        raise ValueError(f"the coded symbols cannot be read ({error})") from error
    if not coder.is_empty():  # the state returns to where it started, or these are not the bytes that were written
        raise ValueError(f"the coded symbols do not end after {count}")
    return torch.from_numpy(symbols.astype(np.uint8 if limit <= 256 else np.int32))


def _table(counts: Array, precision: int) -> Array:
    """Return integer shares that add up to 2**precision: 1 for every symbol that occurs, the rest in proportion."""
    used = counts > 0
    free = (1 << precision) - int(np.count_nonzero(used))
    table = used + counts * free // counts.sum()
    # What rounding down left over goes to the greatest, where it changes least.
    table[int(np.argmax(counts))] += (1 << precision) - int(table.sum())
    return table


def _cost(counts: Array, precision: int, table: Array) -> float:
    """Return the bytes that table and symbols will take."""
    used = counts > 0
    bits = float((counts[used] * (precision - np.log2(table[used]))).sum())
    # A share is at most 2**20: a byte of its variable length for every seven bits.
    return bits / 8 + len(table) + sum(np.count_nonzero(table >= 1 << more) for more in (7, 14))


def _model(table: Array, precision: int) -> Any:
    """Return constriction's model with exactly these shares of 2**24; a symbol that never occurs gets 1."""
    if len(table) == 1:
        table = np.append(table, 0)  # constriction wants two symbols
    shares = np.maximum(table << (_PRECISION - precision), 1)
    shares[int(np.argmax(shares))] -= int(shares.sum()) - (1 << _PRECISION)
    return _stream.model.Categorical((shares - 1).astype(np.float64), perfect=False)
