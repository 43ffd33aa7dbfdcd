"""What a fit looks at."""

import math

import pytest
import torch
from torch import nn

from dtrain import HiddenChange, InputError, Metric, Objective
from dtrain.fit import HiddenCapture

INPUTS = torch.randn(6, 4)


class Net(nn.Module):
    """A body, a norm that is kept in evaluation mode, and a head that runs last but is registered first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 2)
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.head(self.drop(self.norm(self.body(x * scale))))


class Headless(nn.Module):
    def __init__(self, output=lambda x: x):
        super().__init__()
        self.conv, self._output = nn.Conv1d(1, 2, 3), output

    def forward(self, x):
        return self._output(self.conv(x.unsqueeze(1)))


def nudge(module, by=0.1):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


@pytest.mark.parametrize("module", [Net(), Headless()], ids=["head", "no linear layer"])
def test_hidden_change_is_zero_at_the_finetuned_weights(module):
    objective = HiddenChange(module, [INPUTS, INPUTS[:2]])
    objective.remember()
    assert objective.loss() == 0.0
    nudge(module)
    assert objective.loss() > 0
    nudge(module, -0.1)
    assert objective.loss() < 1e-6


def test_hidden_change_is_the_mean_over_all_elements_of_the_heads_input():
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    objective = HiddenChange(module, [INPUTS, INPUTS[:1]])
    objective.remember()
    nudge(module[1])  # the head's own weights do not matter
    assert objective.loss() == 0.0
    with torch.no_grad():
        module[0].bias.add_(torch.tensor([1.0, -2.0, 0.0, 0.0, 0.0]))
    assert objective.loss() == pytest.approx(3 / 5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hidden_change_in_any_float_type(dtype):
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).to(dtype)
    objective = HiddenChange(module, [INPUTS.to(dtype)])
    objective.remember()
    nudge(module)
    assert math.isfinite(objective.loss())


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (INPUTS, None),
        ((INPUTS, 2.0), None),
        ([INPUTS, torch.tensor(2.0)], None),
        ({"x": INPUTS, "scale": 2.0}, None),
        ({"inputs": INPUTS, "labels": None}, lambda module, batch: module(batch["inputs"])),
    ],
    ids=["tensor", "tuple", "list", "mapping", "forward"],
)
def test_batches_of_any_form(batch, forward):
    objective = HiddenChange(Net(), [batch], forward)
    objective.remember()
    nudge(objective.module)
    assert objective.loss() > 0


def test_batches_may_come_from_an_iterator():
    objective = HiddenChange(Net(), iter([INPUTS, INPUTS]))
    objective.remember()
    assert objective.loss() == objective.loss() == 0.0


def test_modes_buffers_and_gradients_are_left_alone():
    """A frozen norm inside a training model is common: Lightning's BaseFinetuning makes one."""
    module = Net().train()
    module.norm.eval()
    modes = {name: part.training for name, part in module.named_modules()}
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    objective = HiddenChange(module, [INPUTS])
    objective.remember()
    objective.loss()
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert all(torch.equal(value, buffers[name]) for name, value in module.named_buffers())
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_failing_forward_leaves_no_hooks_and_no_mode_behind():
    module = Net().train()
    with pytest.raises(RuntimeError):
        HiddenChange(module, [torch.randn(6, 3)]).remember()
    assert module.training
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_the_linear_layer_that_runs_last_is_captured():
    module = Net().eval()
    with HiddenCapture(module) as capture:
        module(INPUTS)
    assert torch.equal(capture.last, module.norm(module.body(INPUTS)))


def test_a_linear_layer_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(input=x)

    objective = HiddenChange(Keyword(), [INPUTS])
    objective.remember()
    assert objective.loss() == 0.0


def test_misuse_is_a_sentence():
    with pytest.raises(InputError, match="`batches` is empty"):
        HiddenChange(Net(), [])
    with pytest.raises(InputError, match=r"nothing to compare with. Call remember\(\)"):
        HiddenChange(Net(), [INPUTS]).loss()
    with pytest.raises(InputError, match=r"returns tuple and runs no linear layer. Pass forward="):
        HiddenChange(Headless(lambda x: (x, x)), [INPUTS]).remember()
    with pytest.raises(InputError, match="`mode` must be 'max' or 'min', got 'best'"):
        Metric(Net(), lambda module: 0.0, mode="best")


@pytest.mark.parametrize(("mode", "sign"), [("max", -1), ("min", 1)])
@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25), 0])
def test_a_metric_is_made_small(mode, sign, value):
    seen = []
    metric = Metric(module := Net(), lambda found: seen.append(found) or value, mode)
    metric.remember()
    assert metric.loss() == sign * float(value)
    assert seen == [module]


@pytest.mark.parametrize("objective", [Metric(Net(), lambda module: 0.0), HiddenChange(Net(), [INPUTS])])
def test_both_are_objectives(objective):
    assert isinstance(objective, Objective)
    assert objective.label


def test_a_compiled_module_shows_its_hidden_state():
    """Compiled code runs no hooks once it has been traced without them."""
    module = torch.compile(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), backend="eager").eval()
    batch = torch.randn(3, 4)
    with torch.no_grad():
        module(batch)
    objective = HiddenChange(module, [batch])
    objective.remember()
    assert objective._target[0].shape == (3, 5)
