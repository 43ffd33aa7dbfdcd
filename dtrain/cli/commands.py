"""What every command does: functions from arguments to an `Outcome`, which the caller prints."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from dtrain.advice import advise as make_advice
from dtrain.artifact import file_digest
from dtrain.cli.calibration import Data, Measure, wanted, without_data
from dtrain.cli.checkpoint import write_merged
from dtrain.cli.models import is_zeros, open_pair
from dtrain.cli.outcome import Outcome, describe, method_table, report_lines, tensor_table
from dtrain.cli.parser import ZEROS, UsageError
from dtrain.compression import compress as make_delta
from dtrain.delta import Delta, load
from dtrain.errors import InputError, NeedsDataError
from dtrain.fit import Fit
from dtrain.lora import save_adapter
from dtrain.methods import METHODS, Method
from dtrain.methods.catalogue import catalogue
from dtrain.methods.catalogue import markdown as as_markdown
from dtrain.rules import Rules
from dtrain.shared import Merge, shared_base
from dtrain.weights import read_weights


def compress(
    base: str,
    finetuned: str,
    out: str,
    method: Method,
    calibration: Namespace,
    fit: Fit | None = None,
    objective: Measure | None = None,
    shared: str | None = None,
    **patterns: Any,
) -> Outcome:
    """Compress what fine-tuning changed into the file `out`; `patterns` are the fields of `Rules` that were given."""
    _check_out(out, BASE=base, FINETUNED=finetuned, **({"SHARED": shared} if shared else {}))
    texts = wanted(method, fit, calibration, objective)
    pair, rules = open_pair(base, finetuned), _rules(patterns)
    data = None if texts is None else Data(base, finetuned, texts)
    given = {} if data is None else data.needed(method, fit)
    try:
        with _busy("compressing") if data is None else nullcontext():  # a fit shows its own progress
            delta = make_delta(pair.base, pair.finetuned, method, fit=fit, shared=shared, rules=rules, **given)
    except NeedsDataError as error:
        missing = "" if texts else without_data(method, fit)
        raise UsageError(missing or str(error)) from error
    delta.save(out)
    report = delta.report()
    found = {"out": out, "fingerprint": _fingerprint(delta), "adapter": pair.adapter, **report.as_dict()}
    found |= {"fit": delta.content.metadata.get("fit"), "calibration": data and data.as_dict()}
    looked = [] if data is None else [data.line(), *describe({"fit": found["fit"]} if found["fit"] else {})]
    return Outcome(found, [*report_lines(report), *looked, *pair.note(finetuned, out), f"wrote {out}"])


def share(
    base: str, finetuned: Sequence[str], out: str, method: Method, merge: Merge, **patterns: Sequence[str] | None
) -> Outcome:
    """Compress what several fine-tunes have in common into the file `out`; `patterns` are fields of `Rules`."""
    if Path(out).suffix != ".safetensors":
        instead = Path(out).with_suffix(".safetensors")
        raise UsageError(f"OUT must end with .safetensors, to be found by what refers to it, got {out}. Use {instead}")
    for path in finetuned:
        _check_out(out, BASE=base, FINETUNED=path)
    if is_zeros(base):
        raise UsageError(f"BASE {ZEROS} has no fine-tunes in common. Give the base that {finetuned[0]} was trained on.")
    with _busy("compressing"):
        tuned = [open_pair(base, path).finetuned for path in finetuned]
        try:
            delta = shared_base(base, tuned, method, merge=merge, rules=_rules(patterns))
        except NeedsDataError as error:
            raise UsageError(str(error)) from error
    delta.save(out)
    report, digest = delta.report(), file_digest(delta.content).hex()
    data = {"out": out, "fingerprint": _fingerprint(delta), "sha256": digest, **report.as_dict()}
    return Outcome(data, [*report_lines(report), f"wrote {out}, which deltas refer to as {digest}"])


def apply(base: str, delta: str, out: str, shared: str | None = None) -> Outcome:
    """Write the fine-tuned checkpoint that a base and a delta make, or the adapter that a delta to zeros is."""
    if is_zeros(base):
        return _apply_to_zeros(delta, out, shared)
    if Path(out).suffix != ".safetensors":
        raise UsageError(f"OUT must end with .safetensors, got {out}. Use {Path(out).with_suffix('.safetensors')}")
    # A base of one file may be replaced by what is made from it; one shard of a folder may not.
    folder = {"BASE": base} if Path(base).is_dir() else {}
    _check_out(out, DELTA=delta, **folder, **({"SHARED": shared} if shared else {}))
    loaded = load(delta, shared)
    tensors, size = write_merged(Path(out), loaded.resolved, read_weights(base), delta)
    data = {"out": out, "fingerprint": _fingerprint(loaded), "tensors": tensors, "bytes": size}
    return Outcome(data, [f"wrote {out}: {tensors:,} tensors, {size:,} bytes"])


def _apply_to_zeros(delta: str, out: str, shared: str | None) -> Outcome:
    if Path(out).suffix == ".safetensors":
        raise UsageError(f"OUT must be a folder where BASE is {ZEROS}, got {out}. Use {Path(out).with_suffix('')}")
    loaded = load(delta, shared)
    size = save_adapter(loaded, out)
    tensors = len(loaded.content.records)
    data = {"out": out, "fingerprint": _fingerprint(loaded), "tensors": tensors, "bytes": size}
    return Outcome(data, [f"wrote {out}: an adapter for PEFT, {tensors:,} tensors, {size:,} bytes"])


def inspect(delta: str, tensors: bool = False, shared: str | None = None) -> Outcome:
    """Show what a delta file holds."""
    loaded = load(delta, shared)
    report, metadata = loaded.report(), loaded.content.metadata
    data = {"delta": delta, "fingerprint": _fingerprint(loaded), "metadata": metadata, **report.as_dict()}
    shown = [*report_lines(report), *describe(metadata), f"fingerprint of the base: {_fingerprint(loaded)}"]
    if tensors:
        data["records"], table = tensor_table(loaded.content.records)
        shown.append(table)
    return Outcome(data, shown)


def verify(base: str, delta: str, shared: str | None = None) -> Outcome:
    """Check every byte of a delta file, and that `base` is its base."""
    with _busy("verifying"):
        loaded = load(delta, shared)
        loaded.verify(None if is_zeros(base) else base)
    fingerprint = _fingerprint(loaded)
    data = {"ok": True, "delta": delta, "base": base, "fingerprint": fingerprint}
    return Outcome(data, [f"ok: {delta} is intact and {base} is its base, fingerprint {fingerprint}"])


def advise(base: str, finetuned: str, **patterns: Sequence[str] | None) -> Outcome:
    """Measure the delta and say which method suits it; `patterns` are the fields of `Rules` that were given."""
    pair = open_pair(base, finetuned)
    if pair.base is None:
        raise UsageError(f"BASE {ZEROS} leaves no delta to measure. Give the base that {finetuned} was trained on.")
    advice = make_advice(pair.base, pair.finetuned, _rules(patterns))
    return Outcome({"base": base, "finetuned": finetuned, **advice.as_dict()}, advice.lines())


def methods(markdown: bool = False) -> Outcome:
    """List the compression methods."""
    entries = catalogue(METHODS)
    shown = as_markdown(entries) if markdown else method_table(entries)
    return Outcome({"methods": [asdict(entry) for entry in entries]}, [shown])


#: The commands by name.
COMMANDS: dict[str, Callable[..., Outcome]] = {
    "compress": compress,
    "share": share,
    "apply": apply,
    "inspect": inspect,
    "verify": verify,
    "advise": advise,
    "methods": methods,
}


def _rules(given: Mapping[str, Any]) -> Rules:
    return Rules(**{field: value for field, value in given.items() if value is not None})


def _fingerprint(delta: Delta) -> str:
    return delta.content.fingerprint.hex()


def _check_out(out: str, **inputs: str) -> None:
    """Refuse, before any work is done, a place that cannot be written to or that holds one of the inputs."""
    path = Path(out)
    for name, given in inputs.items():
        source = Path(given)
        if not (path.exists() and source.exists()):
            continue
        if path.samefile(source):
            raise UsageError(f"OUT and {name} are the same file, {out}. Give another OUT.")
        if source.resolve() in path.resolve().parents:
            raise UsageError(f"OUT {out} is a file of {name} {given}. Give another OUT.")
    if path.is_dir():
        raise InputError(f"{out} cannot be written: it is a folder. Give the path of a file in it.")
    if not path.parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no folder {path.parent}. Make it, or give another OUT.")


@contextmanager
def _busy(what: str) -> Generator[None]:
    """Show on a terminal's standard error that something is going on."""
    with Console(stderr=True).status(what):
        yield
