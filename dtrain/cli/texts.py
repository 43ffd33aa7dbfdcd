"""Texts to calibrate on: a fixed choice of the rows of a Parquet, JSON-lines or text file."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from dtrain.errors import InputError

#: Two columns that are one input, as GLUE names them.
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"))
_SINGLE = ("text", "sentence")
_FIBONACCI = 2654435769  # 2**32 over the golden ratio, odd: Fibonacci hashing (Knuth, TAOCP 6.4)

#: The columns that hold text, by name, each as a function that reads it.
_Columns = Mapping[str, Callable[[], Sequence[str | None]]]


class Texts(NamedTuple):
    """What was chosen of a file.

    Args:
        rows: One text each, or the two texts of a pair.
        columns: Where they are from; none in a file of plain lines.
        found: How many rows the file has that are not empty.
    """

    rows: list[tuple[str, ...]]
    columns: tuple[str, ...]
    found: int


def read_texts(file: str, columns: Sequence[str], samples: int) -> Texts:
    """Return at most `samples` rows, always the same ones in the same order.

    Any stretch of what is returned lies evenly over the file, be it sorted by label or not: row i comes before row j
    where the fractional part of i times the golden ratio is the smaller one.

    Args:
        file: `.parquet`, `.jsonl` (one object per line) or `.txt` (one text per line).
        columns: One column, or the two of a pair. None given: the pair that GLUE's names tell, else the only column
            that holds text, else one called "text" or "sentence".
        samples: How many rows.

    Raises:
        InputError: If there are no texts in the file, or it is not told which.
    """
    path = Path(file)
    if path.suffix not in _READERS:
        raise InputError(f"{file} is no .parquet, .jsonl or .txt file. Give texts in one of these, one text per row.")
    try:
        held = _READERS[path.suffix](path)
        chosen = _choose(file, held, columns)
        both = [held[name]() for name in chosen]
    except InputError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are of these kinds, too
        reason = str(error).splitlines()[0]
        raise InputError(f"{file} cannot be read as {path.suffix[1:]} ({reason}). Is the download complete?") from error
    rows = [cast("tuple[str, ...]", row) for row in zip(*both, strict=True) if all(row)]
    if not rows:
        raise InputError(f"{file} holds no text{f' in {_quoted(chosen)}' if chosen != ('',) else ''}.")
    order = heapq.nsmallest(samples, range(len(rows)), key=lambda row: row * _FIBONACCI % 2**32)
    return Texts([rows[row] for row in order], tuple(name for name in chosen if name), len(rows))


def _choose(file: str, held: _Columns, columns: Sequence[str]) -> tuple[str, ...]:
    if len(columns) > 2:
        raise InputError(f"a text has one column, or two where it is a pair, got {_quoted(columns)}.")
    known = f"{file} has text in {_quoted(held)}" if held else f"{file} has text in no column"
    if missing := [name for name in columns if name not in held]:
        raise InputError(f"there is no text in a column {missing[0]!r}: {known}.")
    if columns:
        return tuple(columns)
    named = [pair for pair in _PAIRS if all(name in held for name in pair)]
    named += [(name,) for name in (held if len(held) == 1 else _SINGLE) if name in held]
    if not named:
        raise InputError(f"{known}. Say which with --calibration.column NAME, or two names for pairs of texts.")
    return named[0]


def _parquet(path: Path) -> _Columns:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {path} takes pyarrow: pip install 'dtrain[text]'") from error
    file = cast("Any", parquet).ParquetFile(path)
    kinds = cast("Any", arrow).types
    columns = [(column.name, column.type) for column in file.schema_arrow]
    names = [name for name, kind in columns if kinds.is_string(kind) or kinds.is_large_string(kind)]
    return {name: lambda name=name: file.read(columns=[name]).column(0).to_pylist() for name in names}


def _json_lines(path: Path) -> _Columns:
    rows: list[object] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if strange := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"a line is {json.dumps(strange[0])[:40]}, and no object")
    objects = cast("list[dict[str, Any]]", rows)
    names = dict.fromkeys(name for row in objects for name, value in row.items() if isinstance(value, str))
    return {
        name: lambda name=name: [value if isinstance(value := row.get(name), str) else None for row in objects]
        for name in names
    }


def _lines(path: Path) -> _Columns:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    return {"": lambda: lines}


_READERS: dict[str, Callable[[Path], _Columns]] = {".parquet": _parquet, ".jsonl": _json_lines, ".txt": _lines}


def _quoted(names: Sequence[str] | _Columns) -> str:
    return ", ".join(map(repr, names))
