"""Calibration: what every weight matrix gets to see, on training inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dtrain.errors import InputError
from dtrain.fit.running import call, run, tensors_of
from dtrain.methods.inputs import Inputs
from dtrain.progress import progress

_ROWS = 64  # rows in a sample
_FIBONACCI = 2654435769  # 2**32 over the golden ratio, odd: Fibonacci hashing (Knuth, TAOCP 6.4)
_attend = functional.multi_head_attention_forward
_ATTENTION = inspect.signature(_attend)

#: Where a tensor lies: the same for a parameter, for what the state dict says of it, and for those tied to it.
_Place = tuple[object, ...]


class Calibration:
    """Training inputs on which the inputs of weights are measured, for methods that weigh or rotate by them.

    Args:
        module: The model; its tensor names are the delta's. It is measured with the weights that it has at the time,
            which should be the fine-tuned ones.
        batches: Training inputs without augmentation. A mapping is passed by keyword, a sequence by position, anything
            else as the only argument.
        forward: Runs the model on one batch, where calling the module on it is not right.

    Raises:
        InputError: If there are no batches.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], object] | None = None,
    ) -> None:
        self.module, self._batches, self._forward = module, list(batches), forward or call
        if not self._batches:
            raise InputError("`batches` is empty. Give at least one batch of training inputs.")

    def collect(self, names: Iterable[str], *, gram: bool = False) -> dict[str, Inputs]:
        """Run all batches once, in evaluation mode, and return what the weights saw.

        Seen are products with the very weight (`F.linear`, `torch.addmm`), be it in a layer or not, convolutions, and
        `nn.MultiheadAttention`. A tied weight sees the inputs of all its products; looking up an embedding is none.
        Every token counts: a padding mask is not looked at.

        Args:
            names: Tensor names of the module.
            gram: Whether to measure `Inputs.gram`; it takes columns^2 floats per weight on the module's device.

        Returns:
            The inputs by name, in the order of `names`. Absent are weights that were in no such product (embeddings,
            norms, experts that no token was sent to or that are stacked in one tensor), and weights whose rows do not
            all see the same (grouped convolutions, the packed projection of cross-attention).

        Raises:
            InputError: If the module lacks one of the tensors or cannot be called on a batch, or if inputs are NaN or
                infinite.
        """
        places = {name: _place(tensor) for name, tensor in tensors_of(self.module, names).items()}
        with _Watch(places.values(), gram) as watch, progress("calibrating", len(self._batches)) as advance:
            for batch in self._batches:
                run(self.module, self._forward, batch)
                advance("")
        sums = {name: watch.sums[place] for name, place in places.items() if place in watch.sums}
        return {name: item.inputs(name) for name, item in sums.items() if item.tokens}


class _Watch(TorchFunctionMode):
    """A context in which the inputs of watched weights are summed up.

    It watches products rather than layers: a hook on a layer does not fire where a model multiplies by the layer's
    weight itself, as BEiT, EVA and Swin V2 do in timm, and `nn.MultiheadAttention` in torch.
    """

    def __init__(self, places: Iterable[_Place], gram: bool) -> None:
        super().__init__()
        self.sums: dict[_Place, _Sums] = {}
        self._watched, self._gram = set(places), gram
        self._products: dict[object, Callable[..., None]] = {
            functional.linear: self._linear,
            torch.addmm: self._addmm,  # Hugging Face's Conv1D, whose weight is (inputs, outputs)
            functional.conv1d: self._convolution,
            functional.conv2d: self._convolution,
            functional.conv3d: self._convolution,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make one call of a torch function and look at it; calls from in here are not looked at."""
        named = kwargs or {}
        if func is _attend:
            return self._attention(_ATTENTION.bind(*args, **named).arguments)
        output = func(*args, **named)  # first: where it fails, its own error is the one to read
        if func in self._products:
            self._products[func](*args, **named)
        return output

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self._see(weight, [input])

    def _addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> None:
        self._see(mat2, [mat1], transposed=True)

    def _convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        kernel = weight.shape[2:]
        images = input.reshape(-1, *input.shape[-1 - len(kernel) :])  # there may be no batch dimension
        # One image at a time: its patches take as many times its memory as the kernel has positions.
        patches = (_patches(image, kernel, stride, padding, dilation) for image in images)
        self._see(weight, patches if groups == 1 else None)

    def _attention(self, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        # What the output projection sees comes to light where an identity stands in for it.
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        bare: dict[str, Any] = {**given, "out_proj_weight": identity, "out_proj_bias": None}
        context, attention = _attend(**bare)
        output = functional.linear(context, weight, bias)
        self._see(weight, [context])
        query, key, value = given["query"], given["key"], given["value"]
        if given.get("use_separate_proj_weight"):
            self._see(given["q_proj_weight"], [query])
            self._see(given["k_proj_weight"], [key])
            self._see(given["v_proj_weight"], [value])
        else:
            self._see(given["in_proj_weight"], [query] if query is key is value else None)
        return output, attention

    def _see(self, weight: Tensor, inputs: Iterable[Tensor] | None, *, transposed: bool = False) -> None:
        """Add inputs, one token per last dimension; None where not all rows of the weight see the same."""
        place = _place(weight)
        if place not in self._watched:
            return
        if place not in self.sums:
            self.sums[place] = _Sums(weight, self._gram, transposed)
        sums = self.sums[place]
        if inputs is None or transposed != sums.transposed:
            self._watched.remove(place)  # one matrix cannot tell what this weight sees
            del self.sums[place]
            return
        for tokens in inputs:
            sums.add(tokens)


class _Sums:
    """Running sums over the inputs of one weight, on its device."""

    def __init__(self, weight: Tensor, gram: bool, transposed: bool) -> None:
        columns, device = len(weight) if transposed else weight.shape[1:].numel(), weight.device
        self.tokens, self.transposed = 0, transposed
        self._squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self._gram = torch.zeros(columns, columns, device=device) if gram else None
        self._keys = torch.empty(0, dtype=torch.int64, device=device)
        self._sample = torch.empty(0, columns, device=device)

    def add(self, tokens: Tensor) -> None:
        """Add inputs of any shape and type, one token per last dimension."""
        x = tokens.reshape(-1, len(self._squares)).float()
        self._squares += x.square().sum(0)
        if self._gram is not None:
            self._gram.addmm_(x.T, x)  # autocast leaves in-place products in float32
        # The tokens of least hash are spread evenly over all that have passed, however they were batched. A stride
        # would do so too, but where sequences are as long it would see one position only, such as [CLS].
        keys = torch.arange(self.tokens, self.tokens + len(x), device=x.device) * _FIBONACCI % 2**32
        keys, rows = _least(keys, x)
        self._keys, self._sample = _least(torch.cat([self._keys, keys]), torch.cat([self._sample, rows]))
        self.tokens += len(x)

    def inputs(self, name: str) -> Inputs:
        """Return the statistics of the weight called `name`."""
        norms = self._squares.sqrt().float().cpu()
        if not bool(norms.isfinite().all()):
            raise InputError(
                f"the inputs of tensor {name!r} are NaN or infinite. Check the batches, and that the fine-tuned model "
                "can be run in its dtype."
            )
        gram = None if self._gram is None else self._gram.cpu()
        return Inputs(norms, self._sample.cpu(), gram, self.transposed)


def _least(keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    order = keys.topk(min(_ROWS, len(keys)), largest=False).indices
    return keys[order], rows[order]


def _patches(
    image: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """Return what a convolution multiplies its flattened weight by: (positions, channels * kernel)."""
    n = len(kernel)
    strides, dilations = _each(stride, n), _each(dilation, n)
    spans = [step * (size - 1) + 1 for step, size in zip(dilations, kernel, strict=True)]
    if isinstance(padding, str):  # "same" or "valid"; "same" puts the odd one at the end
        sides = [((span - 1) // 2, span // 2) if padding == "same" else (0, 0) for span in spans]
    else:
        sides = [(side, side) for side in _each(padding, n)]
    patches = functional.pad(image, [side for pair in reversed(sides) for side in pair])
    for axis in range(n):
        patches = patches.unfold(axis + 1, spans[axis], strides[axis])[..., :: dilations[axis]]
    positions = patches.movedim(0, n)  # (*positions, channels, *kernel)
    return positions.reshape(positions.shape[:n].numel(), -1)


def _each(value: int | Sequence[int], n: int) -> Sequence[int]:
    """Return one number per dimension; torch takes one for all of them, alone or in a list."""
    numbers = [value] if isinstance(value, int) else value
    return numbers if len(numbers) == n else [*numbers] * n


def _place(tensor: Tensor) -> _Place:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
