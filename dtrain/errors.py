"""The errors dtrain raises. Each message says what was given, what was expected, and what to do."""

from __future__ import annotations


class DtrainError(Exception):
    """Anything dtrain refuses to do. Catch this one to catch them all."""


class InputError(DtrainError, ValueError):
    """An argument, a tensor or a pair of models that cannot be used as given."""


class NeedsDataError(DtrainError):
    """A method that must be fitted got nothing to be fitted on."""


class BaseMismatchError(DtrainError):
    """The weights at hand are not the base that the delta was made from."""


class AppliedStateError(DtrainError):
    """`apply_` or `remove_` was called on a model in the wrong state."""


class ArtifactError(DtrainError):
    """A delta file that is damaged, malformed, too new, or not a delta file at all.

    Args:
        path: The file, as the user named it.
        check: The check that failed, in a few words.
        detail: What was found, what was expected, what to do.
        tensor: The tensor concerned, where one is.
    """

    def __init__(self, path: object, check: str, detail: str, tensor: str | None = None) -> None:
        where = f"{path}" if tensor is None else f"{path}, tensor {tensor!r}"
        super().__init__(f"{where}: {check}: {detail}")
        self.path, self.check, self.tensor = path, check, tensor
        self._given = (path, check, detail, tensor)

    def __reduce__(self) -> tuple[type[ArtifactError], tuple[object, str, str, str | None]]:
        """Pickle what it was made of: an error may have to be told to another process."""
        return type(self), self._given
