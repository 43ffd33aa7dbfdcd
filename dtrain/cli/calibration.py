"""What `compress` is given to look at: `--calibration` and its arguments as an objective and a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse import Namespace

from dtrain.cli.huggingface import TextModel, load_text_model
from dtrain.cli.parser import UsageError
from dtrain.cli.texts import Texts, read_texts
from dtrain.fit import Calibration, Fit, HiddenChange, LogitChange, Objective, fit_of
from dtrain.methods import Dbms, Method

#: What a fit may be asked to keep.
Measure = Literal["hidden", "mse", "top", "kl"]


@dataclass(frozen=True)
class Wanted:
    """What the command line says of the texts.

    Args:
        file: Where they are.
        column: Their column, or the two of a pair; none to have it told by its name.
        samples: How many.
        batch: How many at a time.
        device: Where the model is to run.
        objective: What is to stay as it is; None for the last hidden state of an encoder, and the five greatest logits
            of a decoder.
    """

    file: str
    column: tuple[str, ...] = ()
    samples: int = 128
    batch: int = 32
    device: str = "cpu"
    objective: Measure | None = None


class Data:
    """The fine-tuned model and training texts, for whatever has to be fitted or measured.

    Args:
        base: The model before fine-tuning.
        finetuned: The Hugging Face folder of a text model.
        wanted: Which texts.

    Raises:
        InputError: If one of them cannot be used.
    """

    def __init__(self, base: str, finetuned: str, wanted: Wanted) -> None:
        self._wanted = wanted
        self._texts: Texts = read_texts(wanted.file, wanted.column, wanted.samples)
        self._model: TextModel = load_text_model(base, finetuned, self._texts.rows, wanted.batch, wanted.device)

    def needed(self, method: Method, fit: Fit | None) -> dict[str, Any]:
        """Return the arguments of `dtrain.compress` for what has to be looked at."""
        fitted, measured = _needs(method, fit)
        given: dict[str, Any] = {"objective": self._objective()} if fitted else {}
        return given | ({"calibration": Calibration(self._model.module, self._model.batches)} if measured else {})

    def _objective(self) -> Objective:
        module, batches, writes = self._model
        measure = self._wanted.objective or ("top" if writes else "hidden")
        return HiddenChange(module, batches) if measure == "hidden" else LogitChange(module, batches, measure=measure)

    def as_dict(self) -> dict[str, Any]:
        """Return what was looked at, JSON-serialisable."""
        texts = self._texts
        tokens = sum(int(batch["attention_mask"].sum()) for batch in self._model.batches)
        counts = {
            "samples": len(texts.rows),
            "rows": texts.found,
            "batches": len(self._model.batches),
            "tokens": tokens,
        }
        return {"file": self._wanted.file, "column": list(texts.columns), **counts}

    def line(self) -> str:
        """Return that as a line."""
        found = self.as_dict()
        column = f" ({', '.join(found['column'])})" if found["column"] else ""
        return (
            f"looked at {found['samples']:,} of the {found['rows']:,} texts of {found['file']}{column}, "
            f"{found['tokens']:,} tokens in {found['batches']:,} batches"
        )


def wanted(method: Method, fit: Fit | None, calibration: Namespace, objective: Measure | None) -> Wanted | None:
    """Return what the command line says of texts; None where it names none.

    Raises:
        UsageError: If it says how to look at texts, but names none, or if nothing would look at them.
    """
    if calibration.file is None:
        if objective is not None or calibration.column:
            raise UsageError("--objective and --calibration.column say how to look at texts: give --calibration FILE.")
        return None
    fitted, measured = _needs(method, fit)
    if not (fitted or measured):
        raise UsageError(
            f"{type(method).__name__} looks at no data as it is given here. Leave out --calibration, or fit its "
            "scales: --fit Learn."
        )
    if objective is not None and not fitted:
        raise UsageError("nothing is fitted to an objective here. Leave out --objective, or fit scales: --fit Learn.")
    named: dict[str, Any] = vars(calibration) | {"column": tuple(calibration.column or ())}
    return Wanted(**named, objective=objective)


def without_data(method: Method, fit: Fit | None) -> str:
    """Return what to do where there are no texts; nothing where none are needed."""
    fitted, _ = _needs(method, fit)
    ask = "Give training texts with --calibration FILE (Parquet, JSON lines or plain text)"
    if fitted:
        if fit is not None:
            why, instead = f"{type(fit).__name__} fits scales to", "--fit ClosedForm"
        elif isinstance(method, Dbms):
            why, instead = "Dbms fits lam and eta to", "numbers for --method.lam and --method.eta, and a fixed split"
        else:
            why, instead = f"{type(method).__name__} searches q on", "--method.q keep, norm or a number such as 0.05"
        return (
            f"{why} training inputs. {ask}, or use {instead}; for models of anything but text, fit in Python: "
            "dtrain.compress(..., objective=...)."
        )
    who = method if method.needs_calibration else fit if fit is not None and fit.needs_calibration else None
    if who is None:
        return ""
    name = type(who).__name__
    fixed = {
        "DareX": "--method.q keep",
        "DeltaDQ": "--method.group alpha",
        "DeltaCoMe": "--method.gptq false",
        "EoRA": "--method.weighted false",
        "ClosedForm": "--fit.rule norm",
    }
    instead = f"use {fixed[name]}" if name in fixed else "use Magnitude, which needs none"
    return (
        f"{name} looks at the inputs of every layer. {ask}, or {instead}; for models of anything but text, compress in "
        "Python: dtrain.compress(..., calibration=...)."
    )


def _needs(method: Method, fit: Fit | None) -> tuple[bool, bool]:
    """Return whether an objective is needed, and whether the inputs of layers are."""
    found = fit_of(method, fit)
    measured = method.needs_calibration or (found is not None and found.needs_calibration)
    return found is not None and found.needs == "objective", measured
