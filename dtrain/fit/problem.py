"""The problem that a fit solves: payloads whose scales are free, on the module of an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.difference import Change
from dtrain.errors import InputError
from dtrain.fit.objective import Differentiable, Objective
from dtrain.fit.rows import scale_rows
from dtrain.fit.trial import Trial, share_memory
from dtrain.methods import Dbms, Inputs, Method, Rescaled, Shifted
from dtrain.methods.dbms import scaled
from dtrain.methods.method import Encoder, Groups
from dtrain.stages import Decoded, Payload, Sign, decode, matrix_shape
from dtrain.stages.quantise import float32
from dtrain.weights import read_weights

#: By tensor name, logarithms of what the scales are multiplied with: float64 of shape (groups, 1) or (groups, rows).
Factors = dict[str, Tensor]
Watch = Callable[[int, float], None]

_HALF_SCALE = 16  # as torch's GradScaler begins
_SPAN = math.log(4)  # how far a scale without a range of its own is searched, to either side


class Range(NamedTuple):
    """Where the logarithm of a factor is searched, and where it starts."""

    low: float
    start: float
    high: float


@dataclass
class _Codes:
    """One encoding of all tensors. `shifts` are the factors of the base vectors that residuals were taken from."""

    encoder: Encoder
    groups: dict[str, Groups]
    decoded: dict[str, tuple[tuple[Decoded, ...], ...]]
    shifts: dict[str, float]


class Problem:
    """A context in which scales can be tried on the module of an objective; on exit it holds what it held before.

    Args:
        method: Made the payloads.
        changes: All tensors of the fine-tuned model.
        vectors: Payloads of norms and biases by name: their scales are learnt, but not searched or computed.
        masks: For every random mask that the objective is averaged over what encodes a tensor, and what it made of
            each, by name; the first is the file's.
        inputs: What the tensors are multiplied with, where it was measured.
        rest: The other tensors as they will be after decoding, by name.
        objective: Evaluated on training inputs; None where scales follow from the delta alone.
        watch: Called with a number and the loss after every evaluation or step.
    """

    def __init__(
        self,
        method: Method,
        changes: Sequence[Change],
        masks: Sequence[tuple[Encoder, dict[str, Groups]]],
        vectors: Mapping[str, tuple[Payload, ...]],
        inputs: Mapping[str, Inputs],
        rest: Mapping[str, Tensor],
        objective: Objective | None,
        watch: Watch | None = None,
    ) -> None:
        self.method, self.inputs, self.objective = method, inputs, objective
        self.evaluations = 0
        self._rest, self._watch = rest, watch
        self._changes = _apart(changes, objective)
        self.matrices = {change.name: change for change in self._changes if change.role == "method"}
        self.changes = {c.name: c for c in self._changes if c.name in self.matrices or c.name in vectors}
        fixed: dict[str, Groups] = {
            name: ((), found) if isinstance(masks[0][0], Shifted) else (found,) for name, found in vectors.items()
        }
        self._masks = [
            _Codes(encoder, groups | fixed, {}, dict.fromkeys(self.changes, 1.0)) for encoder, groups in masks
        ]
        self._trial: Trial | None = None
        self._bases: dict[str, Tensor] = {}
        self._written: _Codes | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Problem:
        if self.objective is None:
            return self
        tuned = {change.name: change.tuned for change in self._changes if change.role != "base_only"}
        with ExitStack() as stack:  # so that the module is restored where this fails as well
            self._trial = stack.enter_context(Trial(self.objective.module, tuned))
            self._trial.write(tuned)
            self.objective.remember()
            self._trial.write(self._rest)
            # Once: a base on another device than the module would be moved at every evaluation.
            self._bases = {n: _base(c).to(self._trial.tensor(n).device) for n, c in self.changes.items()}
            for codes in self._masks:
                self._decode(codes, self.changes)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def groups(self) -> int:
        """Number of scales per tensor: one, or two where there is a base vector."""
        return 2 if isinstance(self._masks[0].encoder, Shifted) else 1

    @property
    def free(self) -> tuple[bool, ...]:
        """Which of a tensor's scales are to be found."""
        return self.method.free

    @property
    def range(self) -> Range:
        """Where the last scale of every tensor is searched."""
        return _range(self.method)

    @property
    def label(self) -> str:
        """What scales are fitted to, for people; empty where there is no objective."""
        return "" if self.objective is None else self.objective.label

    def start(self) -> Factors:
        """Return the factors that a fit starts from."""
        return self.constant(*[0.0] * (self.groups - 1), self.range.start)

    def constant(self, *logs: float) -> Factors:
        """Return factors that are the same for all matrices, one logarithm per scale; vectors keep theirs."""
        moved = torch.tensor(logs, dtype=torch.float64)[:, None]
        return {name: moved if name in self.matrices else torch.zeros_like(moved) for name in self.changes}

    def evaluate(self, x: Factors) -> float:
        """Return the objective, averaged over the masks; residuals are taken from the base as it is shifted now."""
        if self.objective is None:
            raise InputError("there is no objective to look at. Pass objective=dtrain.HiddenChange(model, batches).")
        loss = self._mean(x, self.objective.loss)
        self.evaluations += 1
        self.tell(self.evaluations, loss)
        return loss

    def evaluate_on(self, x: Factors, batches: Sequence[int]) -> float:
        """Return the mean loss of some batches, averaged over the masks."""
        objective = self._differentiable()
        return self._mean(x, lambda: sum(float(objective.batch_loss(i)) for i in batches) / len(batches))

    def gradient(self, x: Factors, batch: int, mask: int = 0) -> tuple[float, Factors]:
        """Return the loss of one batch and its derivatives with respect to `x`; all codes are taken as they are.

        A tensor's own gradient is reduced to those of its scales as soon as it is there: the model's are never in
        memory together.
        """
        self._write(self._masks[mask], x)
        half = any(self._open().tensor(name).dtype == torch.float16 for name in self.changes)
        power = _HALF_SCALE if half else 0  # derivatives of a mean are too small for half precision
        while True:
            loss, found = self._backward(x, batch, mask, 2.0**power)
            if power <= 0 or all(bool(value.isfinite().all()) for value in found.values()):
                return loss, found
            power -= 4

    def _backward(self, x: Factors, batch: int, mask: int, scale: float) -> tuple[float, Factors]:
        found = {name: torch.zeros_like(value) for name, value in x.items()}
        leaves: dict[str, Tensor] = {}
        with torch.enable_grad():  # whatever the caller is in
            for name in self.changes:
                leaf = leaves[name] = self._open().tensor(name).detach().requires_grad_()
                into = partial(self._reduce, self._masks[mask], name, x[name], found[name])
                leaf.register_post_accumulate_grad_hook(into)
            loss = self._differentiable().batch_loss(batch, leaves)
            if not loss.requires_grad:
                raise InputError("the objective does not depend on the compressed tensors, so no scale can be learnt.")
            # Into these only: the module's other parameters may want gradients too, and belong to whoever trains it.
            torch.autograd.backward(loss * scale, inputs=list(leaves.values()))
        return float(loss.detach()), {name: value / scale for name, value in found.items()}

    def evaluate_stored(self, x: Factors) -> float:
        """Return the objective with the payloads of the file: factors of rows are rounded when they are stored."""
        (*_, mask), masks = self._masks[:1], self._masks
        stored = _Codes(mask.encoder, self.scaled(x), {}, dict.fromkeys(self.changes, 1.0))
        self._decode(stored, self.changes)
        try:
            self._masks = [stored]
            return self.evaluate(self.constant(*[0.0] * self.groups))
        finally:
            self._masks, self._written = masks, None

    def payloads(self) -> dict[str, Groups]:
        """Return every tensor's payloads of the first mask, not scaled yet."""
        return self._masks[0].groups

    def scaled(self, x: Factors) -> dict[str, Groups]:
        """Return every tensor's payloads of the first mask, scaled by `x`: what the file will hold."""
        codes = self._masks[0]
        self._follow(codes, x)
        return {name: _scaled(codes, name, x[name], change.tuned.shape) for name, change in self.changes.items()}

    def tell(self, number: int, loss: float) -> None:
        """Let whoever watches know of a loss."""
        if self._watch is not None:
            self._watch(number, loss)

    def _mean(self, x: Factors, loss: Callable[[], float]) -> float:
        losses: list[float] = []
        for codes in self._masks:
            self._follow(codes, x)
            self._write(codes, x)
            losses.append(loss())
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    def _follow(self, codes: _Codes, x: Factors) -> None:
        """Encode anew the residuals whose base vector was scaled since."""
        if not isinstance(codes.encoder, Shifted):
            return
        for name, change in self.changes.items():
            shift = _factor(x[name][0, 0])
            if codes.shifts[name] == shift:
                continue
            if not (base := codes.groups[name][0]):
                continue
            residual = codes.encoder.residual(name, change.delta(), scaled(base, shift), self.inputs.get(name))
            codes.groups[name], codes.shifts[name] = (base, residual), shift
            if self._trial is not None:
                self._decode(codes, {name: change})
            self._written = None

    def _decode(self, codes: _Codes, changes: Mapping[str, Change]) -> None:
        for name, change in changes.items():
            device = self._open().tensor(name).device
            codes.decoded[name] = tuple(
                tuple(decode(item, name, change.tuned.shape, device) for item in group) for group in codes.groups[name]
            )

    def _write(self, codes: _Codes, x: Factors) -> None:
        trial = self._open()
        if self._written is not codes:  # a patch changes no more than what it keeps
            trial.write(self._bases)
            self._written = codes
        for name, change in self.changes.items():
            decoded: list[Decoded] = []
            scales: list[float] = []
            for group, items, factors in zip(codes.groups[name], codes.decoded[name], x[name], strict=True):
                for payload, item in zip(group, items, strict=True):
                    if factors.numel() == 1:
                        decoded.append(item)
                        scales.append(float32(payload.scale * _factor(factors[0])))
                    else:
                        by_row = _rows(item, factors.exp(), change.tuned.shape)
                        decoded.append(Decoded(item.positions, item.values * by_row))
                        scales.append(payload.scale)
            trial.put(name, self._bases[name], decoded, scales)

    def _reduce(self, codes: _Codes, name: str, x: Tensor, out: Tensor, leaf: Tensor) -> None:
        """Add up the derivatives of one tensor's scales, and let its own gradient go."""
        gradient, leaf.grad = leaf.grad, None
        if gradient is None:
            return
        flat = gradient.reshape(-1).float()
        for number, (group, items) in enumerate(zip(codes.groups[name], codes.decoded[name], strict=True)):
            for payload, item in zip(group, items, strict=True):
                product = (flat if item.positions is None else flat[item.positions]) * item.values * payload.scale
                if x.shape[1] == 1:
                    out[number] += float(product.sum()) * x[number, 0].exp()
                else:  # on the CPU, where sums are the same each time
                    rows, sums = _row_of(item, leaf.shape).cpu(), torch.zeros(x.shape[1], dtype=torch.float64)
                    out[number] += sums.index_add_(0, rows, product.cpu().double()) * x[number].exp()

    def _differentiable(self) -> Differentiable:
        if not isinstance(self.objective, Differentiable):
            raise InputError(
                f"scales are learnt by gradient, and {type(self.objective).__name__} has none. Give "
                "dtrain.HiddenChange or dtrain.LogitChange, or use dtrain.Search."
            )
        return self.objective

    def _open(self) -> Trial:
        if self._trial is None:
            raise InputError("a problem is tried on its module within `with problem:` and with an objective.")
        return self._trial


def _apart(changes: Sequence[Change], objective: Objective | None) -> list[Change]:
    """Copy what the objective's module shares memory with: what is read later must not move with it."""
    taken = [] if objective is None else list(read_weights(objective.module).tensors.values())

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if any(share_memory(tensor, other) for other in taken) else tensor

    return [
        replace(change, base=own(_base(change)), tuned=own(change.tuned))
        if change.role in ("method", "vector")
        else change
        for change in changes
    ]


def _scaled(codes: _Codes, name: str, factors: Tensor, shape: Sequence[int]) -> Groups:
    if factors.shape[1] > 1:
        return tuple(
            tuple(scale_rows(item, name, shape, x.exp()) for item in group)
            for group, x in zip(codes.groups[name], factors, strict=True)
        )
    groups = [scaled(group, _factor(x[0])) for group, x in zip(codes.groups[name], factors, strict=True)]
    if isinstance(codes.encoder, Shifted):
        groups[0] = codes.encoder.stored(codes.groups[name][0], _factor(factors[0, 0]))
    return tuple(groups)


def _range(method: Method) -> Range:
    if isinstance(method, Dbms):
        return _range(method.hosts[1])
    if not isinstance(method, Rescaled):
        return Range(-_SPAN, 0.0, _SPAN)
    span = math.log(1 / method.keep)
    # One magnitude for all: what is right for the mean of |D| is too little for its square, so q may fall below keep.
    more = _SPAN if isinstance(method.pipeline.quantise, Sign) else 0.0
    if method.q == "search":  # payloads are not rescaled yet: 1/q is searched, and DARE is at the far end
        return Range(0.0, span, span + more)
    if method.q == "keep":
        return Range(-span, 0.0, more)
    if isinstance(method.q, str):
        return Range(-span / 2, 0.0, span / 2)
    return Range(math.log(method.q), 0.0, math.log(method.q) + span)


def _rows(item: Decoded, factors: Tensor, shape: Sequence[int]) -> Tensor:
    return factors.float().to(item.values.device)[_row_of(item, shape)]


def _row_of(item: Decoded, shape: Sequence[int]) -> Tensor:
    """Return the row of every value."""
    rows, columns = matrix_shape(shape)
    if item.positions is None:
        return torch.arange(rows, device=item.values.device).repeat_interleave(columns)
    return torch.div(item.positions, columns, rounding_mode="floor")


def _factor(log: Tensor) -> float:
    """Return the factor, rounded to float32 as the file holds lam."""
    return float32(math.exp(float(log)))


def _base(change: Change) -> Tensor:
    if change.base is None:
        raise InputError(f"tensor {change.name!r} is new in the fine-tuned model and has no base.")
    return change.base
