"""What weights see, against oracles that keep every input."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dtrain import Calibration, InputError, read_weights

INPUTS = torch.randn(6, 5, 4)


class Conv1D(nn.Module):
    """Hugging Face's: a linear layer whose weight is (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Bare(nn.Module):
    """A layer whose weight is multiplied by, and whose `forward` is never called: BEiT in timm."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(x, weight=self.qkv.weight, bias=self.qkv.bias)


class Wrapped(nn.Module):
    """Layers of any kind, called by a function."""

    def __init__(self, forward=None, **layers):
        super().__init__()
        self.layers, self.run = nn.ModuleDict(layers), forward

    def forward(self, *args):
        return self.run(self.layers, *args)


def collect(module, *batches, forward=None):
    return Calibration(module, batches, forward).collect(read_weights(module).tensors, gram=True)


def assert_saw(inputs, rows):
    """Compare with all rows that were seen."""
    rows = rows.detach().double()
    gram = rows.T @ rows
    torch.testing.assert_close(inputs.gram.double(), gram, rtol=1e-5, atol=1e-5 * float(gram.abs().max()))
    torch.testing.assert_close(inputs.norms.double(), rows.square().sum(0).sqrt(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(inputs.gram.diagonal().sqrt(), inputs.norms, rtol=1e-5, atol=1e-6)
    assert {t.dtype for t in (inputs.norms, inputs.sample, inputs.gram)} == {torch.float32}
    assert len(inputs.sample) == min(64, len(rows))
    known = {tuple(row) for row in rows.float().tolist()}
    assert all(tuple(row) in known for row in inputs.sample.tolist())


def im2col(image, kernel, stride, padding, dilation):
    """Return the patches of one image (channels, *space), position by position."""
    for axis, side in enumerate(padding, start=1):
        zeros = torch.zeros(*image.shape[:axis], side, *image.shape[axis + 1 :])
        image = torch.cat([zeros, image, zeros], dim=axis)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    starts = [range(0, n - span + 1, s) for n, span, s in zip(image.shape[1:], spans, stride, strict=True)]
    rows = []
    for corner in itertools.product(*starts):
        window = [slice(c, c + span, d) for c, span, d in zip(corner, spans, dilation, strict=True)]
        rows.append(image[(slice(None), *window)].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (7, 4), (6, 5, 4), (2, 3, 40, 4)])
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), Conv1D(3, 4), Bare()], ids=["Linear", "Conv1D", "weight only"])
def test_products_of_any_shape_and_type(layer, shape, dtype):
    layer, x = layer.to(dtype), torch.randn(shape).to(dtype)
    if isinstance(layer, Conv1D) and len(shape) == 1:
        x = x[None]
    (inputs,) = collect(layer, x).values()
    assert_saw(inputs, x.reshape(-1, 4).float())
    layer.to(torch.float32)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), Conv1D(3, 4), nn.Conv2d(2, 3, (2, 3))], ids=lambda x: type(x).__name__
)
def test_the_matrix_of_a_weight_maps_the_inputs_seen_to_outputs(layer):
    x = torch.randn(5, 4) if not isinstance(layer, nn.Conv2d) else torch.randn(1, 2, 4, 5)
    inputs = collect(layer, x)["weight"]
    outputs = inputs.sample @ inputs.matrix(layer.weight.detach()).T + layer.bias.detach()
    found = layer(x).detach() if x.ndim == 2 else layer(x).detach()[0].flatten(1).T
    order, known = outputs[:, 0].argsort(), found[:, 0].argsort()
    torch.testing.assert_close(outputs[order], found[known], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": 2, "dilation": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "stride": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_convolutions(n, settings):
    kernel = (3, 1, 2)[:n] if settings.get("padding") != "same" else (3, 1, 3)[:n]
    layer = getattr(nn, f"Conv{n}d")(2, 3, kernel, **settings)
    images = torch.randn(3, 2, *(7, 6, 5)[:n])
    stride, dilation = ((settings.get(key, 1),) * n for key in ("stride", "dilation"))
    padding = {"same": [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)], "valid": (0,) * n}
    sides = settings.get("padding", 0)
    sides = padding[sides] if isinstance(sides, str) else (sides,) * n
    rows = torch.cat([im2col(image, kernel, stride, sides, dilation) for image in images])
    assert_saw(collect(layer, images)["weight"], rows)
    assert_saw(collect(layer, *images)["weight"], rows)  # images without a batch dimension


@pytest.mark.parametrize("kernel", [2, 4, (2, 3)])
@pytest.mark.parametrize("settings", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, about a copy
def test_unusual_padding(kernel, settings):
    """The outputs tell what was padded: their Gram matrix is W G W^T."""
    layer = nn.Conv2d(2, 3, kernel, bias=False, **settings)
    image = torch.randn(1, 2, 5, 6)
    inputs, weight = collect(layer, image)["weight"], layer.weight.detach().flatten(1)
    outputs = layer(image).detach()[0].flatten(1)
    torch.testing.assert_close(weight @ inputs.gram @ weight.T, outputs @ outputs.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
def test_multihead_attention(kind, batch_first):
    sizes = {"kdim": 3, "vdim": 2} if kind == "separate" else {}
    layer = nn.MultiheadAttention(4, 2, bias=False, batch_first=batch_first, **sizes)
    x = torch.randn(2, 5, 4)
    other = (torch.randn(2, 5, 3), torch.randn(2, 5, 2)) if kind == "separate" else (INPUTS[:2], INPUTS[:2])
    query, key, value = (x, x, x) if kind == "self" else (x, *other)
    outputs = []
    seen = collect(layer, (query, key, value), forward=lambda module, batch: outputs.append(module(*batch)[0]))
    torch.testing.assert_close(outputs[0], layer(query, key, value)[0].detach())
    if kind == "self":
        assert_saw(seen.pop("in_proj_weight"), x.flatten(0, 1))
    if kind == "separate":
        for letter, tokens in zip("qkv", (query, key, value), strict=True):
            assert_saw(seen.pop(f"{letter}_proj_weight"), tokens.flatten(0, 1))
    context, weight, out = seen.pop("out_proj.weight"), layer.out_proj.weight.detach(), outputs[0].flatten(0, 1)
    torch.testing.assert_close(weight @ context.gram @ weight.T, out.T @ out, rtol=1e-4, atol=1e-5)
    assert not seen


def test_a_transformer_layer_takes_no_path_around():
    """In evaluation mode torch has a fast path that calls none of the layers."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    matrices = {name for name, tensor in read_weights(layer).tensors.items() if tensor.ndim == 2}
    assert set(collect(layer, INPUTS)) == matrices


def test_tied_weights_see_the_inputs_of_all_uses():
    module = Wrapped(lambda m, x: (m["b"](m["a"](x)), m["b"](m["embed"](torch.arange(4)))),
                     a=nn.Linear(4, 4), b=nn.Linear(4, 4), embed=nn.Embedding(4, 4))  # fmt: skip
    module.layers["b"].weight = module.layers["embed"].weight = module.layers["a"].weight
    names = [f"layers.{name}.weight" for name in ("b", "a", "embed")]
    seen = Calibration(module, [INPUTS]).collect(names, gram=True)
    assert list(seen) == names
    first, table = INPUTS.reshape(-1, 4), module.layers["embed"].weight
    rows = torch.cat([first, module.layers["a"](first), table])
    for inputs in seen.values():
        assert_saw(inputs, rows)


def test_weights_that_one_matrix_cannot_describe_are_absent():
    both = nn.Linear(4, 4)
    module = Wrapped(
        lambda m, x: (
            m["table"](x.long().abs() % 3),
            m["norm"](x),
            m["grouped"](x.transpose(1, 2)),
            m["expert"](x[:0]),
            torch.addmm(both.bias, m["both"](x[0]), both.weight),
            m["linear"](x),
        ),
        table=nn.Embedding(3, 4), norm=nn.LayerNorm(4), grouped=nn.Conv1d(4, 4, 1, groups=2), idle=nn.Linear(4, 4),
        expert=nn.Linear(4, 4), both=both, linear=nn.Linear(4, 4),
    )  # fmt: skip
    assert list(collect(module, INPUTS, INPUTS)) == ["layers.linear.weight"]


def test_a_compiled_model_that_has_already_run():
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        compiled(INPUTS)
    seen = collect(compiled, INPUTS)
    assert_saw(seen["0.weight"], INPUTS.reshape(-1, 4))
    assert_saw(seen["2.weight"], module[:2](INPUTS).reshape(-1, 3))


def test_autocast_does_not_coarsen_the_sums():
    def forward(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            module(batch)

    assert_saw(collect(nn.Linear(4, 3), INPUTS, forward=forward)["weight"], INPUTS.reshape(-1, 4))


def test_neither_order_nor_size_of_batches_matters():
    tokens = torch.randn(300, 4)
    layer = nn.Linear(4, 3)
    whole = collect(layer, tokens)["weight"]
    pieces = collect(layer, *tokens.split([1, 0, 100, 7, 192]))["weight"]
    assert torch.equal(whole.sample, pieces.sample)
    for inputs in (whole, pieces, collect(layer, *reversed(tokens.split(90)))["weight"]):
        assert_saw(inputs, tokens)


@pytest.mark.parametrize("length", [128, 144, 197, 729, 1000])
def test_the_sample_is_spread_over_the_tokens_and_over_positions_in_a_sequence(length):
    batches = [torch.arange(i * length, (i + 1) * length).float()[:, None] for i in range(70)]
    found = Calibration(nn.Linear(1, 1), batches).collect(["weight"])["weight"].sample
    at = found.flatten().long().sort().values
    gaps = at.diff()
    assert len(at) == 64
    assert gaps.max() <= 3 * gaps.min()
    assert at[0] <= 3 * gaps.min()
    assert 70 * length - at[-1] <= 3 * gaps.min()
    assert len((at % length).unique()) >= 32
    assert torch.equal(found, Calibration(nn.Linear(1, 1), batches).collect(["weight"])["weight"].sample)


def test_modes_weights_and_gradients_are_left_alone_and_dropout_is_off():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3), nn.BatchNorm1d(5)).train()
    module[2].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert_saw(collect(module, INPUTS)["1.weight"], INPUTS.reshape(-1, 4))
    assert [part.training for part in module] == [True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_failing_forward_leaves_nothing_behind():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        collect(module, INPUTS)
    assert module.training
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_the_gram_matrix_is_there_if_asked_for():
    assert Calibration(nn.Linear(4, 3), [INPUTS]).collect(["weight"])["weight"].gram is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_by_name(value):
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        module[0].bias[1] = value
    with pytest.raises(InputError, match=r"the inputs of tensor '1.weight' are NaN or infinite. Check the batches"):
        collect(module, INPUTS)


def test_misuse_is_a_sentence():
    with pytest.raises(InputError, match=r"`batches` is empty\. Give at least one batch"):
        Calibration(nn.Linear(4, 3), [])
    with pytest.raises(InputError, match=r"has no tensor 'model.weight' \(2 names of the delta are missing\)"):
        Calibration(nn.Linear(4, 3), [INPUTS]).collect(["weight", "model.weight", "model.bias"])
    with pytest.raises(InputError, match=r"cannot be called on a batch of type tuple .* Pass forward="):
        collect(nn.Linear(4, 3), (INPUTS, INPUTS))
