"""`lora_product`: the model that an adapter makes of its base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dtrain.errors import InputError
from dtrain.lora.adapter import Adapter, AdapterSource, Target, model_name, read_adapter
from dtrain.weights import Source, Weights, read_weights


def lora_product(base: Source, adapter: AdapterSource) -> Weights:
    """Merge a LoRA adapter into its base: W + scaling * B A, as PEFT's `merge_and_unload` does.

    `dtrain.compress(base, dtrain.lora_product(base, "adapter/"), dtrain.Dare(keep=0.01))` drops in the product, which
    has as many elements as the weight. To drop in the far smaller factors themselves see `lora_factors`.

    Args:
        base: The model the adapter was trained on, in floating point; anything `dtrain.compress` takes. Its names may
            stand behind a prefix in the adapter, or the adapter's behind one in it.
        adapter: A PEFT folder, or (state dict, configuration) of an adapter: linear layers, convolutions and
            embeddings, trained biases, `modules_to_save`.

    Returns:
        All tensors of the base, under its names. Those that the adapter changes are new, computed in float64 on the
        CPU and rounded once to the base's dtype; the others share its memory. Tied tensors stay tied, as when PEFT
        merges, but for those of saved modules. Tensors that the base does not have come as they are.

    Raises:
        InputError: If the adapter is no plain LoRA adapter (DoRA is not), or was not trained on this base.
    """
    weights, read = read_weights(base), read_adapter(adapter)
    names = [*weights.tensors, *weights.aliases]
    state = {name: tensor for name in names if (tensor := weights.get(name)) is not None}
    place = _find_place(state, read, weights.origin)
    for name in sorted(read.whole):
        _replace(state, place, name, read, weights.origin)
    turned = _turned(read, place, state)
    for target in read.targets:
        _add(state, place.of(f"{target.module}.weight"), _product(target, turned[target.module]), target, read.origin)
        if target.bias is not None:
            name = _known(state, place.of(f"{target.module}.bias"), target, read, weights.origin)
            _add(state, name, target.bias.cpu().double() * target.scaling, target, read.origin)
    return replace(read_weights(state), origin=f"{read.origin} on {weights.origin}")


@dataclass(frozen=True)
class _Place:
    """How names of the adapted model become names of the base: a prefix is taken off or put on."""

    off: str
    on: str

    def of(self, name: str) -> str:
        """Return the name a tensor has in the base, or would have there."""
        return self.on + name.removeprefix(self.off)


def _find_place(state: Mapping[str, Tensor], adapter: Adapter, base: str) -> _Place:
    names = state.keys()
    targets = {f"{target.module}.weight" for target in adapter.targets}
    found = Counter[tuple[str, str]]({("", ""): len(targets & names)})
    found.update((name.removesuffix(rest), "") for name in targets for rest in _ends(name) if rest in names)
    found.update(("", name.removesuffix(rest)) for name in names for rest in _ends(name) if rest in targets)
    fitting = [prefixes for prefixes, count in found.items() if count == len(targets)]
    if len(fitting) > 1 and ("", "") not in fitting:
        places = ", ".join(sorted(repr(off + on) for off, on in fitting))
        raise InputError(
            f"{adapter.origin} fits {base} behind several prefixes ({places}). Give the part that it was trained on."
        )
    place = _Place(*(min(fitting) if fitting else found.most_common(1)[0][0]))
    for target in adapter.targets:
        _known(state, place.of(f"{target.module}.weight"), target, adapter, base)
    return place


def _known(state: Mapping[str, Tensor], name: str, target: Target, adapter: Adapter, base: str) -> str:
    if name not in state:
        raise InputError(
            f"{adapter.origin} changes {target.module!r}, but {base} has no tensor {name!r} "
            f"({next(iter(state))!r} is one). Give the base that the adapter was trained on."
        )
    return name


def _ends(name: str) -> Iterator[str]:
    """Yield what follows each dot of a name."""
    return (name[dot + 1 :] for dot, char in enumerate(name) if char == ".")


def _replace(state: dict[str, Tensor], place: _Place, saved_as: str, adapter: Adapter, base: str) -> None:
    if ".original_module." in saved_as:
        return  # bias="all" saves it too, but the model runs the saved module in its place
    name, tensor = place.of(model_name(saved_as)), adapter.tensors[saved_as]
    known = state.get(name)
    if any(f"{module}." in saved_as for module in adapter.config.get("modules_to_save", ())):
        # PEFT trains a copy of a saved module: its tensors are no longer tied.
        state[name] = tensor if known is None else tensor.to(known)
    elif known is not None:
        _put(state, name, tensor.to(known))
    else:
        raise InputError(
            f"{adapter.origin} holds {saved_as!r}, but {base} has no tensor {name!r} and modules_to_save is silent. "
            "Give the base that the adapter was trained on."
        )


def _put(state: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Replace a tensor under all the names it is tied by."""
    before = state[name]
    state.update({tied: tensor for tied, value in state.items() if value is before})


def _turned(adapter: Adapter, place: _Place, state: Mapping[str, Tensor]) -> dict[str, bool]:
    """Return by module whether its weight is the transpose of B A, as of an embedding or of Hugging Face's Conv1D.

    PEFT writes into `fan_in_fan_out` what held for the module it came to last, so shapes are asked first.
    """
    flag = bool(adapter.config.get("fan_in_fan_out"))
    turned = {target.module: target.embedding for target in adapter.targets}
    against, square = list[str](), list[str]()
    for target in adapter.targets:
        if target.embedding or target.a.dim() > 2:
            continue
        shape, stored = _shape(target), tuple(state[place.of(f"{target.module}.weight")].shape)
        if shape == shape[::-1]:
            turned[target.module] = flag
            square.append(target.module)
        elif stored in (shape, shape[::-1]):
            turned[target.module] = stored != shape
            against += [target.module] * (turned[target.module] != flag)
    if square and against:
        raise InputError(
            f"{adapter.origin} says fan_in_fan_out={flag}, which the shape of {against[0]!r} contradicts, so that the "
            f"square {square[0]!r} may be stored either way. Merge it with PEFT and give the merged model."
        )
    return turned


def _shape(target: Target) -> tuple[int, ...]:
    return (target.b.shape[0], *target.a.shape[1:])


def _product(target: Target, turned: bool) -> Tensor:
    # float64: then the sum over the rank hardly depends on the machine's matrix kernels, and the files agree.
    a, b = target.a.cpu().double(), target.b.cpu().double()
    product = (b.flatten(1) @ a.flatten(1)).view(_shape(target)) * target.scaling
    return product.T if turned else product


def _add(state: dict[str, Tensor], name: str, change: Tensor, target: Target, origin: str) -> None:
    weight = state[name]
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise InputError(
            f"{origin} changes {target.module!r}, which is {weight.dtype} in the base. Give the base as it was before "
            "quantisation."
        )
    if weight.shape != change.shape:
        raise InputError(
            f"{origin} changes {target.module!r} by a tensor of shape {tuple(change.shape)}, but the base's is "
            f"{tuple(weight.shape)}. Give the base that the adapter was trained on."
        )
    _put(state, name, (weight.cpu().double() + change).to(weight.dtype).to(weight.device))
