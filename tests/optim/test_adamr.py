"""AdamR against torch's Adam and AdamW, and against the rule of the paper written out slowly."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.errors import DtrainError, InputError
from dtrain.optim import AdamR
from dtrain.optim.decay import ClampCounter, decay_, mean_second_moment, second_moment_sum

SHAPES = [(7, 5), (5,), (3, 4, 2), ()]


def make_params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_grads(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def train(optimizer, params, steps, first=0, scale=1.0):
    for step in range(first, first + steps):
        set_grads(params, step, scale)
        optimizer.step()


def soft_threshold(delta, threshold):
    return delta.sign() * (delta.abs() - threshold).clamp(min=0)


class SlowAdamR:
    """METHODS, section 5, one formula per line, in float64."""

    def __init__(self, params, lr, strength, norm, normalizer, betas=(0.9, 0.999), eps=1e-8):
        self.weights = [param.detach().double().clone() for param in params]
        self.bases = [weight.clone() for weight in self.weights]
        self.m = [torch.zeros_like(weight) for weight in self.weights]
        self.v = [torch.zeros_like(weight) for weight in self.weights]
        self.seen = [0] * len(self.weights)
        self.lr, self.strength, self.norm, self.normalizer = lr, strength, norm, normalizer
        self.betas, self.eps = betas, eps

    def step(self, grads):
        (b1, b2), updated = self.betas, [i for i, grad in enumerate(grads) if grad is not None]
        for i in updated:
            grad = grads[i].double()
            self.seen[i] += 1
            self.m[i] = b1 * self.m[i] + (1 - b1) * grad
            self.v[i] = b2 * self.v[i] + (1 - b2) * grad**2
        v_hat = {i: self.v[i] / (1 - b2 ** self.seen[i]) for i in updated}
        mean = torch.cat([value.flatten() for value in v_hat.values()]).mean().item() or 1.0
        rate = self.strength * self.lr / (math.sqrt(mean) if self.normalizer == "stable" else 1.0)
        for i in updated:
            delta = self.weights[i] - self.bases[i]
            pulled = (1 - min(rate, 1)) * delta if self.norm == "l2" else soft_threshold(delta, rate)
            m_hat = self.m[i] / (1 - b1 ** self.seen[i])
            self.weights[i] = self.bases[i] + pulled - self.lr * m_hat / (v_hat[i].sqrt() + self.eps)


class NoDeviceSync(TorchDispatchMode):
    """Fails when a tensor's value is fetched to the host, except for the step counts that live there anyway."""

    def __init__(self, optimizer):
        super().__init__()
        self.allowed = {state["step"].data_ptr() for state in optimizer.state.values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            assert args[0].data_ptr() in self.allowed, "a value was fetched from the device"
        return func(*args, **(kwargs or {}))


class TestAgainstTorch:
    @pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_strength_zero_is_adam_bit_for_bit(self, dtype, options):
        ours, theirs = make_params(dtype), make_params(dtype)
        train(AdamR(ours, lr=0.01, strength=0.0, **options), ours, 6)
        train(torch.optim.Adam(theirs, lr=0.01, **options), theirs, 6)
        for mine, reference in zip(ours, theirs, strict=True):
            assert torch.equal(mine, reference)

    @pytest.mark.parametrize("foreach", [True, False])
    def test_without_normalizer_is_adamw_in_the_delta(self, foreach):
        ours = make_params(torch.float64)
        bases = [param.detach().clone() for param in ours]
        shifted = [nn.Parameter(torch.zeros_like(param)) for param in ours]
        train(AdamR(ours, lr=0.01, strength=0.3, normalizer="none", foreach=foreach), ours, 20)
        train(torch.optim.AdamW(shifted, lr=0.01, weight_decay=0.3, foreach=foreach), shifted, 20)
        for mine, base, delta in zip(ours, bases, shifted, strict=True):
            torch.testing.assert_close(mine - base, delta, rtol=1e-6, atol=1e-9)

    def test_strength_zero_keeps_no_base(self):
        params = make_params()
        optimizer = AdamR(params, strength=0.0)
        train(optimizer, params, 1)
        assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())

    def test_state_of_torch_adam_can_be_continued_without_strength(self):
        ours, theirs = make_params(), make_params()
        adam = torch.optim.Adam(theirs, lr=0.01)
        train(adam, theirs, 3)
        train(torch.optim.Adam(ours, lr=0.01), ours, 3)
        optimizer = AdamR(ours, strength=0.0)
        optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))  # torch would share the tensors
        train(optimizer, ours, 3, first=3)
        train(adam, theirs, 3, first=3)
        assert all(torch.equal(mine, reference) for mine, reference in zip(ours, theirs, strict=True))


class TestAgainstThePaper:
    @pytest.mark.parametrize("norm", ["l2", "l1"])
    @pytest.mark.parametrize("normalizer", ["stable", "none"])
    @pytest.mark.parametrize("foreach", [True, False])
    def test_agrees_with_the_slow_rule(self, norm, normalizer, foreach):
        params = make_params(torch.float64)
        slow = SlowAdamR(params, 0.01, 0.5, norm, normalizer)
        optimizer = AdamR(params, lr=0.01, strength=0.5, norm=norm, normalizer=normalizer, foreach=foreach)
        for step in range(15):
            set_grads(params, step)
            if step % 3 == 1:
                params[1].grad = None  # this one counts fewer steps than the others from here on
            slow.step([param.grad for param in params])
            optimizer.step()
        for param, expected in zip(params, slow.weights, strict=True):
            torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=1e-9)

    def test_float32_stays_close_to_the_slow_rule(self):
        params = make_params()
        slow = SlowAdamR(params, 0.01, 0.5, "l2", "stable")
        optimizer = AdamR(params, lr=0.01, strength=0.5)
        for step in range(15):
            set_grads(params, step)
            slow.step([param.grad for param in params])
            optimizer.step()
        for param, expected in zip(params, slow.weights, strict=True):
            torch.testing.assert_close(param.detach().double(), expected, rtol=1e-5, atol=1e-6)

    def test_zero_gradients_count_as_mean_one(self):
        param = nn.Parameter(torch.ones(3, 3))
        optimizer = AdamR([param], lr=0.1, strength=1.0)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        with torch.no_grad():
            param += 1
        optimizer.step()  # rate = strength * lr / 1
        torch.testing.assert_close(param.detach(), torch.full((3, 3), 1.9))

    @pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
    def test_l1_makes_exact_zeros(self, rate):
        base, noise = (torch.randn(50, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        param = base + 0.02 * noise
        inside = (param - base).abs() <= 0.01
        decay_([param], [base], rate, "l1")
        assert 0 < inside.sum() < inside.numel()
        assert torch.equal(param == base, inside)

    def test_l1_returns_unused_weights_to_the_base(self):
        param = nn.Parameter(torch.randn(30, 30, generator=torch.Generator().manual_seed(0)))
        base = param.detach().clone()
        optimizer = AdamR([param], lr=1e-3, betas=(0.0, 0.999), strength=0.1, norm="l1", normalizer="none")
        param.grad = torch.randn_like(param)
        optimizer.step()
        param.grad = torch.zeros_like(param)
        for _ in range(20):  # each step pulls by 1e-4, and the first one moved every weight by 1e-3
            optimizer.step()
        assert torch.equal(param, base)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_low_precision_is_rounded_once(self, dtype, norm):
        param, base = (torch.randn(64, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
        delta = param.float() - base.float()
        pulled = delta * (1 - 0.123) if norm == "l2" else soft_threshold(delta, 0.123)
        decay_([param], [base], torch.tensor(0.123), norm)
        torch.testing.assert_close(param, (base.float() + pulled).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


class TestClamp:
    @pytest.mark.parametrize("normalizer", ["stable", "none"])
    def test_huge_strength_restarts_from_the_base(self, normalizer):
        params, fresh = make_params(), make_params()
        optimizer = AdamR(params, lr=0.01, strength=1e6, normalizer=normalizer)
        train(optimizer, params, 4)
        state = optimizer.state[params[0]]
        m_hat = state["exp_avg"] / (1 - 0.9**4)
        v_hat = state["exp_avg_sq"] / (1 - 0.999**4)
        expected = fresh[0] - 0.01 * m_hat / (v_hat.sqrt() + 1e-8)
        torch.testing.assert_close(params[0], expected)
        assert optimizer.clamped_steps == 4

    def test_rate_of_one_and_more_lands_on_the_base_exactly(self):
        for rate in (1.0, 7.0, torch.tensor(1.0), torch.tensor(7.0)):
            param, base = torch.randn(9, 9), torch.randn(9, 9)
            decay_([param], [base], rate, "l2")
            assert torch.equal(param, base)

    def test_steps_below_one_are_not_counted(self):
        params = make_params()
        optimizer = AdamR(params, lr=0.01, strength=0.1)
        train(optimizer, params, 3)
        assert optimizer.clamped_steps == 0

    def test_a_step_counts_once_however_many_groups_clamp(self):
        params = make_params()
        groups = [{"params": params[:1]}, {"params": params[1:2], "normalizer": "none"}, {"params": params[2:]}]
        optimizer = AdamR(groups, lr=0.01, strength=1e6)
        train(optimizer, params, 3)
        assert optimizer.clamped_steps == 3

    def test_l1_never_overshoots_and_is_not_counted(self):
        params = make_params()
        optimizer = AdamR(params, lr=0.01, strength=1e6, norm="l1")
        train(optimizer, params, 3)
        assert optimizer.clamped_steps == 0

    def test_counter_goes_on_from_a_given_value(self):
        counter = ClampCounter(5)
        counter.add([torch.tensor(2.0), torch.tensor(0.1)])
        counter.add([0.5, torch.tensor(0.5)])
        counter.add([1.5])
        counter.add([])
        assert counter.value == 7


class TestGroups:
    def test_each_parameter_is_pulled_to_its_own_base_with_its_own_strength(self):
        first, second = (nn.Parameter(torch.full((4, 4), value)) for value in (1.0, -3.0))
        optimizer = AdamR(
            [{"params": [first]}, {"params": [second], "strength": 0.5}], lr=0.1, strength=2.0, normalizer="none"
        )
        for param in (first, second):
            param.grad = torch.zeros_like(param)
        optimizer.step()
        with torch.no_grad():
            for param in (first, second):
                param += 1
        optimizer.step()
        torch.testing.assert_close(first.detach(), torch.full((4, 4), 1.8))  # 1 + (1 - 2.0 * 0.1)
        torch.testing.assert_close(second.detach(), torch.full((4, 4), -2.05))  # -3 + (1 - 0.5 * 0.1)

    def test_one_mean_for_all_groups(self):
        together, apart = make_params(torch.float64), make_params(torch.float64)
        train(AdamR(together, lr=0.01, strength=0.5), together, 8)
        groups = [{"params": apart[:2]}, {"params": apart[2:]}]
        train(AdamR(groups, lr=0.01, strength=0.5), apart, 8)
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def test_parameters_without_gradient_are_left_alone(self):
        params = make_params()
        optimizer = AdamR(params, lr=0.01, strength=0.5)
        train(optimizer, params, 2)
        before = params[2].detach().clone()
        set_grads(params, 2)
        params[2].grad = None
        optimizer.step()
        assert torch.equal(params[2], before)
        assert optimizer.state[params[2]]["step"].item() == 2

    def test_a_group_added_later_starts_from_its_own_weights(self):
        params = make_params()
        optimizer = AdamR(params[:1], lr=0.01, strength=0.5)
        train(optimizer, params[:1], 2)
        later = params[1].detach().clone()
        optimizer.add_param_group({"params": params[1:2]})
        train(optimizer, params[:2], 2, first=2)
        assert torch.equal(optimizer.state[params[1]]["base"], later)

    def test_named_parameters(self):
        model = nn.Linear(3, 2)
        optimizer = AdamR(model.named_parameters(), strength=0.1)
        train(optimizer, list(model.parameters()), 1)
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]

    def test_step_without_any_gradient_does_nothing(self):
        params = make_params()
        optimizer = AdamR(params, strength=0.1)
        optimizer.step()
        assert not optimizer.state
        assert optimizer.clamped_steps == 0


class TestState:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("options", [{}, {"norm": "l1"}, {"fused": True}], ids=str)
    def test_resume_is_bit_exact(self, dtype, options):
        unbroken = make_params(dtype)
        train(AdamR(unbroken, lr=0.01, strength=0.5, **options), unbroken, 9)

        params = make_params(dtype)
        optimizer = AdamR(params, lr=0.01, strength=0.5, **options)
        train(optimizer, params, 4)
        file = io.BytesIO()
        torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)

        resumed = [nn.Parameter(param.detach().clone()) for param in saved["params"]]
        optimizer = AdamR(resumed, lr=0.7, strength=0.1, **options)
        optimizer.load_state_dict(saved["optimizer"])
        train(optimizer, resumed, 5, first=4)
        for param, expected, base in zip(resumed, unbroken, make_params(dtype), strict=True):
            assert torch.equal(param, expected)
            assert torch.equal(optimizer.state[param]["base"], base)

    def test_base_is_stored_once_and_on_its_own(self):
        params = make_params()
        start = [param.detach().clone() for param in params]
        optimizer = AdamR(params, lr=0.01, strength=0.5)
        train(optimizer, params, 1)
        bases = [optimizer.state[param]["base"] for param in params]
        pointers = [base.data_ptr() for base in bases]
        assert not {param.data_ptr() for param in params} & set(pointers)
        train(optimizer, params, 3, first=1)
        assert [optimizer.state[param]["base"].data_ptr() for param in params] == pointers
        assert all(torch.equal(base, expected) for base, expected in zip(bases, start, strict=True))
        assert not any(base.requires_grad for base in bases)
        options = {*optimizer.defaults, *optimizer.param_groups[0]}
        assert options == {
            *("params", "lr", "betas", "eps", "strength", "norm", "normalizer", "foreach", "fused"),
        }

    def test_deepcopy_and_pickle_keep_working(self):
        params = make_params()
        optimizer = AdamR(params, lr=0.01, strength=0.5)
        train(optimizer, params, 2)
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):  # noqa: S301 (made here)
            twin_params = twin.param_groups[0]["params"]
            train(twin, twin_params, 1, first=2)
            assert twin.clamped_steps == 0
            assert "base" in twin.state[twin_params[0]]

    def test_strength_raised_after_training_without_base(self):
        params = make_params()
        optimizer = AdamR(params, lr=0.01, strength=0.0)
        train(optimizer, params, 1)
        optimizer.param_groups[0]["strength"] = 0.1
        with pytest.raises(InputError, match=r"`strength` is 0\.1.*without a base.*Build a new AdamR"):
            train(optimizer, params, 1, first=1)

    def test_strength_may_rest_at_zero_once_the_base_is_stored(self):
        params = make_params()
        start = params[0].detach().clone()
        optimizer = AdamR(params, lr=0.01, strength=0.5)
        for step, strength in enumerate((0.5, 0.0, 0.5)):
            optimizer.param_groups[0]["strength"] = strength
            train(optimizer, params, 1, first=step)
        assert torch.equal(optimizer.state[params[0]]["base"], start)


class TestStep:
    @pytest.mark.parametrize("normalizer", ["stable", "none"])
    @pytest.mark.parametrize("norm", ["l2", "l1"])
    @pytest.mark.parametrize("foreach", [True, False])
    def test_fetches_nothing_from_the_device(self, normalizer, norm, foreach):
        params = make_params()
        optimizer = AdamR(params, lr=0.01, strength=0.5, norm=norm, normalizer=normalizer, foreach=foreach)
        train(optimizer, params, 1)
        set_grads(params, 1)
        with NoDeviceSync(optimizer):
            optimizer.step()

    def test_the_guard_above_sees_a_fetch(self):
        params = make_params()
        optimizer = AdamR(params, strength=0.5)
        train(optimizer, params, 1)
        with NoDeviceSync(optimizer), pytest.raises(AssertionError, match="fetched"):
            params[0].sum().item()

    def test_hooks_run_once_per_step(self):
        params, calls = make_params(), []
        optimizer = AdamR(params, strength=0.5)
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        train(optimizer, params, 2)
        assert calls == ["pre", "post"] * 2

    def test_closure_runs_with_gradients_and_its_loss_is_returned(self):
        param = nn.Parameter(torch.tensor([2.0]))
        optimizer = AdamR([param], lr=0.1, strength=0.1)

        def closure():
            optimizer.zero_grad()
            loss = (param**2).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 4.0
        assert param.item() < 2.0

    def test_lr_scheduler_drives_the_pull(self):
        params = make_params()
        optimizer = AdamR(params, lr=0.01, strength=0.5)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
        train(optimizer, params, 1)
        scheduler.step()
        before = [param.detach().clone() for param in params]
        train(optimizer, params, 1, first=1)
        assert all(torch.equal(param, kept) for param, kept in zip(params, before, strict=True))


class TestSecondMoment:
    def test_large_sums_lose_nothing(self):
        moment = torch.full((3000, 4000), 1.1)
        total = second_moment_sum([torch.zeros_like(moment)], [torch.tensor(0.0)], 0.999, [moment])
        assert total.item() == pytest.approx(1.21 * moment.numel(), rel=1e-4)

    def test_mean_of_nothing_is_one(self):
        assert mean_second_moment([torch.tensor(0.0)], 10).item() == 1.0

    def test_steps_on_the_device_of_a_fused_optimizer(self):
        # The meta device stands for an accelerator: no value can be read from it.
        moments, steps = [torch.ones(2, 3, device="meta")] * 2, [torch.ones((), device="meta")] * 2
        assert second_moment_sum(moments, steps, 0.9, moments).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, r"`strength` must be a finite number >= 0, got -0\.1"),
        ({"strength": math.nan}, "`strength` must be a finite number >= 0, got nan"),
        ({"strength": math.inf}, "`strength` must be a finite number >= 0, got inf"),
        ({"strength": "much"}, "`strength` must be a finite number >= 0, got 'much'"),
        ({"norm": "l0"}, "`norm` must be 'l2' or 'l1', got 'l0'"),
        ({"normalizer": "mean"}, "`normalizer` must be 'stable' or 'none', got 'mean'"),
        ({"lr": -1.0}, r"`lr` must be a number >= 0, got -1\.0"),
        ({"lr": torch.tensor(0.1)}, "`lr` must be a number >= 0, got tensor"),
        ({"eps": math.nan}, "`eps` must be a number >= 0, got nan"),
        ({"betas": (0.9, 1.0)}, r"`betas` must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, r"`betas` must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, r"`betas` must be two numbers in \[0, 1\)"),
        ({"foreach": True, "fused": True}, "`foreach` and `fused` are both True"),
    ],
)
class TestOptions:
    def test_refused_at_construction(self, options, message):
        with pytest.raises(InputError, match=message):
            AdamR(make_params(), **{"strength": 0.1, **options})

    def test_refused_in_a_group_which_is_then_not_added(self, options, message):
        params = make_params()
        optimizer = AdamR(params[:1], strength=0.1)
        with pytest.raises(InputError, match=message):
            optimizer.add_param_group({"params": params[1:], **options})
        assert len(optimizer.param_groups) == 1


class TestRefusedTensors:
    def test_complex(self):
        with pytest.raises(DtrainError, match="complex parameter"):
            AdamR([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], strength=0.1)

    def test_dtensor(self):
        class DTensor(nn.Parameter):
            """Named like torch's: the check goes by name to spare an import."""

        with pytest.raises(DtrainError, match="DTensor"):
            AdamR([DTensor(torch.zeros(2))], strength=0.1)

    def test_sparse_gradient(self):
        embedding = nn.Embedding(4, 2, sparse=True)
        optimizer = AdamR(embedding.parameters(), strength=0.1)
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(DtrainError, match="sparse gradient"):
            optimizer.step()

    def test_strength_has_no_default(self):
        with pytest.raises(TypeError, match="strength"):
            AdamR(make_params())
