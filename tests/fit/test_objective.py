"""What a fit looks at."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dtrain import HiddenChange, InputError, LogitChange, Metric, Objective
from dtrain.fit import Differentiable, HiddenCapture

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
    assert objective._target[0][0].shape == (3, 5)


LOGITS, TARGET = torch.randn(6, 5), torch.randn(6, 5)


def logit_loss(found, target, **arguments):
    """Return the loss of a model whose logits are `found` where the fine-tuned model's are `target`."""
    module = nn.ParameterDict({"logits": nn.Parameter(target.clone())})
    objective = LogitChange(module, [INPUTS], lambda module, batch: module["logits"], **arguments)
    objective.remember()
    with torch.no_grad():
        module["logits"].copy_(found)
    return objective.loss()


def test_logit_changes_are_those_of_their_formulas():
    pairs = [list(zip(*rows, strict=True)) for rows in zip(LOGITS.tolist(), TARGET.tolist(), strict=True)]
    n = LOGITS.numel()
    assert logit_loss(LOGITS, TARGET) == pytest.approx(sum((x - t) ** 2 for row in pairs for x, t in row) / n, rel=1e-5)
    best = [sorted(row, key=lambda pair: -pair[1])[:2] for row in pairs]
    top = sum((x - t) ** 2 for row in best for x, t in row) / 12
    assert logit_loss(LOGITS, TARGET, measure="top", top=2) == pytest.approx(top, rel=1e-5)
    divergence = 0.0
    for row in pairs:
        found, target = (sum(math.exp(pair[i]) for pair in row) for i in (0, 1))
        divergence += sum(math.exp(t) / target * ((t - math.log(target)) - (x - math.log(found))) for x, t in row)
    assert logit_loss(LOGITS, TARGET, measure="kl") == pytest.approx(divergence / n, rel=1e-4)
    assert logit_loss(TARGET, TARGET, measure="kl") == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: {"logits": x}, lambda x: (x, None), lambda x: SimpleNamespace(logits=x)],
    ids=["tensor", "mapping", "tuple", "object"],
)
def test_logits_are_found_in_what_a_model_returns(wrap):
    objective = LogitChange(Net(), [INPUTS], lambda module, batch: wrap(module(batch)))
    objective.remember()
    nudge(objective.module)
    assert objective.loss() > 0


@pytest.mark.parametrize("kind", [LogitChange, HiddenChange])
def test_padding_does_not_count(kind):
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    tokens, mask = torch.randn(3, 6, 4), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    losses = []
    for padding in (0.0, 50.0):
        x = torch.where(mask[..., None].bool(), tokens, padding)
        objective = kind(module, [{"x": x, "attention_mask": mask}], lambda module, batch: module(batch["x"]))
        objective.remember()
        nudge(module)
        losses.append(objective.loss())
        nudge(module, -0.1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", [LogitChange, HiddenChange])
def test_the_loss_is_the_mean_of_its_batches_and_has_their_gradients(kind):
    module = Net()
    objective = kind(module, [INPUTS, INPUTS[:2]])
    assert isinstance(objective, Differentiable)
    objective.remember()
    nudge(module)
    parts = [float(objective.batch_loss(i)) for i in range(objective.batches)]
    assert objective.loss() == pytest.approx((6 * parts[0] + 2 * parts[1]) / 8, rel=1e-5)
    leaf = module.body.weight.detach().clone().requires_grad_()
    objective.batch_loss(0, {"body.weight": leaf}).backward()
    (loss := objective.batch_loss(0, {"body.weight": leaf})).backward()
    assert float(loss.detach()) == pytest.approx(parts[0], rel=1e-5)
    assert float(leaf.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_module_that_is_registered_twice_gets_its_weights_back():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    module = Twice()
    weight, before = module.first.weight, module(INPUTS)
    leaf = torch.zeros(4, 4, requires_grad=True)
    objective = LogitChange(module, [INPUTS])
    objective.remember()
    objective.batch_loss(0, {"first.weight": leaf}).backward()
    assert module.first.weight is weight
    assert torch.equal(module(INPUTS), before)
    assert float(leaf.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"measure": "l1"}, "`measure` must be 'mse', 'top' or 'kl'"), ({"top": 0}, "`top` must be at least 1")],
    ids=str,
)
def test_logit_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        LogitChange(Net(), [INPUTS], **arguments)


def test_what_has_no_logits_is_a_sentence():
    with pytest.raises(InputError, match=r"returns NoneType, in which no logits were found. Pass forward="):
        LogitChange(Net(), [INPUTS], lambda module, batch: None).remember()
    with pytest.raises(InputError, match="measure='kl' compares classes, and the model has one output"):
        logit_loss(LOGITS[:, :1], TARGET[:, :1], measure="kl")
