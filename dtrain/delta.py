"""`Delta`: a compressed fine-tune, in memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from dtrain.artifact import Content, Role, find_shared, pack_file, read_file, resolve, write_file
from dtrain.report import Report, summarise, visible
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
        content: Records, fingerprint and metadata, as they stand in the file.
        origin: The file they came from, for messages.
        shared: What the family's shared file holds, where `content` refers to one.

    Raises:
        ArtifactError: If `shared` is not what `content` refers to.
    """

    def __init__(self, content: Content, origin: str | Path = "delta", shared: Content | None = None) -> None:
        self.content = content
        self.origin = origin
        self.shared = shared if content.shared else None
        #: What is applied: `content` with the shared payloads in the place of references to them.
        self.resolved = resolve(content, shared, origin)

    def __repr__(self) -> str:
        report = self.report()
        return (
            f"Delta({visible(self.method)}, {report.tensors} tensors, {report.file_bytes:,} bytes, {report.ratio:.1f}x)"
        )

    @property
    def method(self) -> str:
        """Name of the method that made it."""
        return str(self.content.metadata.get("method", {}).get("name", "unknown"))

    def save(self, path: str | Path) -> int:
        """Write one safetensors-readable file, atomically; a shared file is not part of it.

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
        """Return sizes by kind of tensor, bits per parameter and the file ratio; `print` shows it as a table.

        They are those of its own file; a shared file, which is there once for a family, is named beside them.
        """
        shared_bytes = sum(map(len, pack_file(self.shared))) if self.shared else 0
        return summarise(self.content, self.file_bytes(), shared_bytes)

    def verify(self, base: Source | None) -> None:
        """Check that `base` is the base; None stands for one that is zero everywhere.

        Raises:
            BaseMismatchError: If it differs in a name, a shape, a dtype or one bit.
        """
        check_base(self.resolved, self._read_base(base), self.origin)

    def apply_(self, model: nn.Module) -> None:
        """Add the delta to the weights of `model`, in place: all of it, or nothing.

        The values it overwrites are kept, so that `remove_` is exact. Tensors that the delta brings along (a fresh
        head) must exist in the model with the same shape.

        Raises:
            AppliedStateError: If the model carries a delta already.
            BaseMismatchError: If its weights are not the base.
        """
        apply_in_place(self.resolved, model, self.origin)

    def remove_(self, model: nn.Module) -> None:
        """Restore the weights that `apply_` found in `model`, bit for bit.

        Raises:
            AppliedStateError: If this delta is not applied to it, or the weights it touched changed since.
        """
        remove_in_place(self.resolved, model)

    def state_dict(self, base_state: Source | None) -> dict[str, Tensor]:
        """Return the fine-tuned model's weights: new tensors; `base_state` stays as it is.

        Args:
            base_state: The base: a state dict, or anything `dtrain.compress` takes, None included.

        Raises:
            BaseMismatchError: If it is not the base.
        """
        weights = self._read_base(base_state)
        check_base(self.resolved, weights, self.origin)
        tensors = find_tensors(self.resolved, weights)
        kept = [record for record in self.resolved.records if record.role is not Role.BASE_ONLY]
        state = {record.name: merged(record, tensors.get(record.name), self.origin) for record in kept}
        state.update(
            {alias: state[name] for alias, name in weights.aliases.items() if name in state and alias not in state}
        )
        return state

    def _read_base(self, base: Source | None) -> Weights:
        return zero_base(self.content, self.origin) if base is None else read_weights(base)


def load(path: str | Path, shared: str | Path | Delta | None = None) -> Delta:
    """Read a delta file and check every byte of it.

    Args:
        path: A file written by `Delta.save`.
        shared: The family's shared file (see `dtrain.shared_base`), which is looked at only where `path` refers to one.
            Without it, the `.safetensors` file of the same folder that ends with the right SHA-256.

    Raises:
        ArtifactError: If a file is missing, damaged, malformed, or of a newer format, or if the shared file is not the
            one referred to.
    """
    content = read_file(path)
    if not content.shared:
        return Delta(content, path)
    if isinstance(shared, Delta):
        return Delta(content, path, shared.content)
    return Delta(content, path, read_file(shared or find_shared(content, path)))
