"""The search of DeltaDQ's group: against a loop over groups, layers and elements, for every way to name projections."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import dtrain
from dtrain import BitDelta, Calibration, DeltaDQ, EoRA, InputError, Wanda
from dtrain.difference import pair
from dtrain.fit import calibrate
from dtrain.rules import Rules
from dtrain.weights import read_weights
from tests.methods.settings import dense, inputs, module_of, same_bits

TOKENS, WIDTH = 40, 24  # fewer tokens than a sample holds: all of them are seen
METHOD = DeltaDQ(alpha=3, group="search", bits=8, parts=1)
GROUPS = [3, 6, 12, 24]


def model(*shapes, bias=True):
    """Return a base and its fine-tune, with one weight (and bias) of every name and shape."""
    base = {}
    for name, shape in shapes:
        base[name] = torch.randn(shape) / WIDTH**0.5
        if bias:
            base[f"{name.removesuffix('weight')}bias"] = torch.randn(shape[-1 if "c_attn" in name else 0])
    return base, {name: value + 0.2 * torch.randn(value.shape) for name, value in base.items()}


def tokens(name):
    """What a projection sees: the key of cross-attention sees something else than its query."""
    return inputs(1 if "cross" in name and name.endswith(("k.weight", "key.weight")) else 0, TOKENS, WIDTH)


def look(module, _):
    for name, weight in module.named_parameters():
        if weight.ndim == 2:
            x = tokens(name)
            torch.addmm(torch.zeros(weight.shape[1]), x, weight) if "c_attn" in name else F.linear(x, weight)


def projected(state, name):
    weight = state[name].double()
    bias = state.get(f"{name.removesuffix('weight')}bias", torch.zeros(())).double()
    return tokens(name).double() @ (weight if "c_attn" in name else weight.t()) + bias


def attention_error(base, tuned, pairs, group):
    """The change of Q K^T, squared, relative, over all pairs of tokens and the layers given."""
    method, rough = replace(METHOD, group=group), dict(tuned)
    for name, delta in ((n, tuned[n] - base[n]) for both in pairs for n in both):
        rough[name] = base[name] + dense(method.encode(name, delta), delta.shape, name).float()
    total = 0.0
    for query, key in pairs:
        wide = [slice(0, WIDTH), slice(WIDTH, 2 * WIDTH)] if query == key else [slice(None)] * 2
        exact, found = (
            projected(state, query)[:, wide[0]] @ projected(state, key)[:, wide[1]].t() for state in (tuned, rough)
        )
        total += float((exact - found).square().sum() / exact.square().sum())
    return total


def chosen(base, tuned, method=METHOD):
    delta = dtrain.compress(base, tuned, method, calibration=Calibration(module_of(tuned), [0], look))
    return delta.content.metadata["method"]


SQUARE, FUSED = (WIDTH, WIDTH), (3 * WIDTH, WIDTH)
NAMES = {
    "bert": [("layer.0.query.weight", SQUARE), ("layer.0.key.weight", SQUARE)],
    "llama": [("h.0.q_proj.weight", SQUARE), ("h.0.k_proj.weight", SQUARE)],
    "distilbert": [("h.0.q_lin.weight", SQUARE), ("h.0.k_lin.weight", SQUARE)],
    "diffusers": [("h.0.to_q.weight", SQUARE), ("h.0.to_k.weight", SQUARE)],
    "t5": [("h.0.SelfAttention.q.weight", SQUARE), ("h.0.SelfAttention.k.weight", SQUARE)],
    "cross": [("h.0.cross.q.weight", SQUARE), ("h.0.cross.k.weight", SQUARE)],
    "narrow": [("query.weight", (7, WIDTH)), ("key.weight", (7, WIDTH))],
    "timm": [("blocks.0.attn.qkv.weight", FUSED)],
    "modernbert": [("h.0.Wqkv.weight", FUSED)],
    "gpt2": [("h.0.c_attn.weight", (WIDTH, 3 * WIDTH))],
    "torch": [("attn.in_proj_weight", FUSED)],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shapes", NAMES.values(), ids=NAMES)
def test_the_group_is_the_one_of_least_attention_error(shapes, bias):
    base, tuned = model(*shapes, bias=bias)
    pairs = [(shapes[0][0], shapes[-1][0])]
    errors = {group: attention_error(base, tuned, pairs, group) for group in GROUPS}
    assert len(set(errors.values())) == len(GROUPS)
    assert chosen(base, tuned)["group"] == min(errors, key=errors.get)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_two_layers_stand_for_all(seed):
    """Layer 10 comes after layer 2, and what is no query or key does not count."""
    torch.manual_seed(seed)
    names = [[f"h.{i}.{part}.weight" for part in ("query", "key", "value")] for i in (10, 2, 0)]
    base, tuned = model(*((name, SQUARE) for layer in names for name in layer))
    pairs = [(layer[0], layer[1]) for layer in names[1:]]
    errors = {group: attention_error(base, tuned, pairs, group) for group in GROUPS}
    assert chosen(base, tuned)["group"] == min(errors, key=errors.get)


def test_the_search_does_not_always_say_the_same():
    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found.add(chosen(*model(*NAMES["bert"]))["group"])
    assert len(found) > 1


def test_groups_go_up_to_a_row():
    base, tuned = model(*NAMES["bert"])
    assert chosen(base, tuned, replace(METHOD, alpha=20))["group"] == 20
    assert chosen(base, tuned, replace(METHOD, alpha=100))["group"] == 100
    assert chosen(base, tuned, replace(METHOD, alpha=1))["group"] == 1  # nothing is dropped: the first of equals


def test_a_host_is_searched_for_as_well():
    base, tuned = model(*NAMES["bert"])
    alone = chosen(base, tuned)
    for weighted in (True, False):
        described = chosen(base, tuned, EoRA(METHOD, 1, weighted=weighted))
        assert described["host"] == alone
    assert chosen(base, tuned, EoRA(replace(METHOD, group=12), 1))["host"]["group"] == 12


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([("fc1.weight", SQUARE), ("k_proj.weight", SQUARE)], "no query and key projections were found by their names"),
        ([("h.0.query_key_value.weight", FUSED)], "no query and key projections were found"),
        (
            [("q_proj.weight", SQUARE), ("k_proj.weight", (6, WIDTH))],
            "'k_proj.weight' have 24 and 6 outputs",
        ),
        ([("qkv.weight", (2 * WIDTH, WIDTH))], "'qkv.weight' and 'qkv.weight' have 48 and 48 outputs.*share keys"),
    ],
)
def test_projections_that_cannot_be_told_are_a_sentence(shapes, message):
    base, tuned = model(*shapes)
    with pytest.raises(InputError, match=f"{message}.*Give DeltaDQ a number or group='alpha'"):
        chosen(base, tuned)


@pytest.mark.parametrize("method", [Wanda(), EoRA(BitDelta()), METHOD], ids=lambda method: type(method).__name__)
def test_inputs_are_those_of_the_finetuned_model(method):
    """The module may hold anything: it is lent the fine-tuned weights, and gets back what it held."""
    base, tuned = model(("query.weight", SQUARE), ("key.weight", SQUARE))
    other = {name: torch.randn(value.shape) for name, value in base.items()}
    module = module_of(other)

    def forward(module, x):
        F.linear(F.linear(x, module.query.weight, module.query.bias), module.key.weight, module.key.bias)

    x = inputs(3, TOKENS, WIDTH)
    changes = pair(read_weights(base), read_weights(tuned), Rules())
    settled, seen = calibrate(method, changes, Calibration(module, [x], forward))
    hidden = F.linear(x, tuned["query.weight"], tuned["query.bias"])
    assert torch.allclose(seen["key.weight"].norms, hidden.square().sum(0).sqrt(), rtol=1e-5)
    assert (seen["key.weight"].gram is None) == (method.needs == "inputs")
    assert settled.needs == ("nothing" if method is METHOD else method.needs)
    assert same_bits(module.state_dict(), other)
