"""`Delta`: a compressed fine-tune, in memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from dtrain.artifact import Content, Role, pack_file, read_file, write_file
from dtrain.report import Report, summarise
from dtrain.runtime import apply_in_place, check_base, find_tensors, merged, remove_in_place, zero_base
from dtrain.weights import Source, Weights, read_weights


class Delta:
    """The compressed difference between a base model and a fine-tuned one.

    Made by `dtrain.compress` or `dtrain.load`, not by hand.

    Example::

        delta = dtrain.load("sst2.safetensors")
        delta.apply_(model)       # the module now holds the fine-tuned weights
        delta.remove_(model)      # and now the base's again, bit for bit

    Args:
        content: Records, fingerprint and metadata.
        origin: The file they came from, for messages.
    """

    def __init__(self, content: Content, origin: str | Path = "delta") -> None:
        self.content = content
        self.origin = origin

    def __repr__(self) -> str:
        report = self.report()
        return f"Delta({self.method}, {report.tensors} tensors, {report.file_bytes:,} bytes, {report.ratio:.1f}x)"

    @property
    def method(self) -> str:
        """Name of the method that made it."""
        return str(self.content.metadata.get("method", {}).get("name", "unknown"))

    def save(self, path: str | Path) -> int:
        """Write one self-contained safetensors-readable file, atomically.

        Returns:
            Bytes on disk.

        Raises:
            InputError: If the path cannot be written. What was there before is untouched.
        """
        return write_file(path, self.content)

    def file_bytes(self) -> int:
        """Return the bytes `save` writes."""
        return sum(map(len, pack_file(self.content)))

    def report(self) -> Report:
        """Return sizes by kind of tensor, bits per parameter and the file ratio; `print` shows it as a table."""
        return summarise(self.content, self.file_bytes())

    def verify(self, base: Source | None) -> None:
        """Check that `base` is the base; None stands for one that is zero everywhere.

        Raises:
            BaseMismatchError: If it differs in a name, a shape, a dtype or one bit.
        """
        check_base(self.content, self._read_base(base), self.origin)

    def apply_(self, model: nn.Module) -> None:
        """Add the delta to the weights of `model`, in place: all of it, or nothing.

        The values it overwrites are kept, so that `remove_` is exact. Tensors that the delta brings along (a fresh
        head) must exist in the model with the same shape.

        Raises:
            AppliedStateError: If the model carries a delta already.
            BaseMismatchError: If its weights are not the base.
        """
        apply_in_place(self.content, model, self.origin)

    def remove_(self, model: nn.Module) -> None:
        """Restore the weights that `apply_` found in `model`, bit for bit.

        Raises:
            AppliedStateError: If this delta is not applied to it, or the weights it touched changed since.
        """
        remove_in_place(self.content, model)

    def state_dict(self, base_state: Source | None) -> dict[str, Tensor]:
        """Return the fine-tuned model's weights: new tensors; `base_state` stays as it is.

        Args:
            base_state: The base: a state dict, or anything `dtrain.compress` takes, None included.

        Raises:
            BaseMismatchError: If it is not the base.
        """
        weights = self._read_base(base_state)
        check_base(self.content, weights, self.origin)
        tensors = find_tensors(self.content, weights)
        kept = [record for record in self.content.records if record.role is not Role.BASE_ONLY]
        state = {record.name: merged(record, tensors.get(record.name), self.origin) for record in kept}
        state.update(
            {alias: state[name] for alias, name in weights.aliases.items() if name in state and alias not in state}
        )
        return state

    def _read_base(self, base: Source | None) -> Weights:
        return zero_base(self.content, self.origin) if base is None else read_weights(base)


def load(path: str | Path) -> Delta:
    """Read a delta file and check every byte of it.

    Args:
        path: A file written by `Delta.save`.

    Raises:
        ArtifactError: If it is missing, damaged, malformed, or of a newer format.
    """
    return Delta(read_file(path), path)
