"""What every command does: functions from arguments to an `Outcome`, which the caller prints."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dtrain.advice import advise as make_advice
from dtrain.cli.checkpoint import write_merged
from dtrain.cli.models import is_zeros, open_pair
from dtrain.cli.outcome import Outcome, describe, method_table, report_lines, tensor_table
from dtrain.cli.parser import ZEROS, UsageError
from dtrain.compression import compress as make_delta
from dtrain.delta import Delta, load
from dtrain.errors import InputError, NeedsDataError
from dtrain.lora import save_adapter
from dtrain.methods import METHODS, Method
from dtrain.methods.catalogue import catalogue
from dtrain.methods.catalogue import markdown as as_markdown
from dtrain.rules import Rules
from dtrain.weights import read_weights


def compress(base: str, finetuned: str, out: str, method: Method, **patterns: Sequence[str] | None) -> Outcome:
    """Compress what fine-tuning changed into the file `out`; `patterns` are the fields of `Rules` that were given."""
    _check_out(out, BASE=base, FINETUNED=finetuned)
    rules = _rules(patterns)
    try:
        with _busy("compressing"):
            pair = open_pair(base, finetuned)
            delta = make_delta(pair.base, pair.finetuned, method, rules=rules)
    except NeedsDataError as error:
        raise UsageError(_without_data(method)) from error
    delta.save(out)
    report = delta.report()
    data = {"out": out, "fingerprint": _fingerprint(delta), "adapter": pair.adapter, **report.as_dict()}
    return Outcome(data, [*report_lines(report), *pair.note(finetuned, out), f"wrote {out}"])


def apply(base: str, delta: str, out: str) -> Outcome:
    """Write the fine-tuned checkpoint that a base and a delta make, or the adapter that a delta to zeros is."""
    if is_zeros(base):
        return _apply_to_zeros(delta, out)
    if Path(out).suffix != ".safetensors":
        raise UsageError(f"OUT must end with .safetensors, got {out}. Use {Path(out).with_suffix('.safetensors')}")
    # A base of one file may be replaced by what is made from it; one shard of a folder may not.
    _check_out(out, DELTA=delta, **({"BASE": base} if Path(base).is_dir() else {}))
    loaded = load(delta)
    tensors, size = write_merged(Path(out), loaded.content, read_weights(base), delta)
    data = {"out": out, "fingerprint": _fingerprint(loaded), "tensors": tensors, "bytes": size}
    return Outcome(data, [f"wrote {out}: {tensors:,} tensors, {size:,} bytes"])


def _apply_to_zeros(delta: str, out: str) -> Outcome:
    if Path(out).suffix == ".safetensors":
        raise UsageError(f"OUT must be a folder where BASE is {ZEROS}, got {out}. Use {Path(out).with_suffix('')}")
    loaded = load(delta)
    size = save_adapter(loaded, out)
    tensors = len(loaded.content.records)
    data = {"out": out, "fingerprint": _fingerprint(loaded), "tensors": tensors, "bytes": size}
    return Outcome(data, [f"wrote {out}: an adapter for PEFT, {tensors:,} tensors, {size:,} bytes"])


def inspect(delta: str, tensors: bool = False) -> Outcome:
    """Show what a delta file holds."""
    loaded = load(delta)
    report, metadata = loaded.report(), loaded.content.metadata
    data = {"delta": delta, "fingerprint": _fingerprint(loaded), "metadata": metadata, **report.as_dict()}
    shown = [*report_lines(report), *describe(metadata), f"fingerprint of the base: {_fingerprint(loaded)}"]
    if tensors:
        data["records"], table = tensor_table(loaded.content.records)
        shown.append(table)
    return Outcome(data, shown)


def verify(base: str, delta: str) -> Outcome:
    """Check every byte of a delta file, and that `base` is its base."""
    with _busy("verifying"):
        loaded = load(delta)
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
    "apply": apply,
    "inspect": inspect,
    "verify": verify,
    "advise": advise,
    "methods": methods,
}


def _rules(patterns: Mapping[str, Sequence[str] | None]) -> Rules:
    return Rules(**{field: given for field, given in patterns.items() if given is not None})


def _without_data(method: Method) -> str:
    name = type(method).__name__
    if method.needs == "objective":
        return (
            f"{name} searches q on training inputs, which the command line has none of yet. Use --method.q keep, "
            "norm or a number such as 0.05, or search in Python: dtrain.compress(..., objective=...)."
        )
    fixed = {
        "DareX": "--method.q keep",
        "DeltaDQ": "--method.group alpha",
        "DeltaCoMe": "--method.gptq false",
        "EoRA": "--method.weighted false",
    }
    instead = f"Use {fixed[name]}, or" if name in fixed else "Use Magnitude, which needs none, or"
    return (
        f"{name} looks at the inputs of every layer, which the command line has none of yet. {instead} compress in "
        "Python: dtrain.compress(..., calibration=...)."
    )


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
