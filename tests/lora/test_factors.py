"""Factors are a delta to zero, and come back as a folder that PEFT loads."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dtrain
from dtrain import ArtifactError, BaseMismatchError, Dare, DareX, InputError, Lossless, Rules
from dtrain.artifact import Content, Record, Role
from dtrain.cli import main
from tests.lora.adapters import CONFIG, PREFIX, Net, base, factors, product, trained, write
from tests.methods.settings import module_of, same_bits

TRAINED = {PREFIX + "enc.up.base_layer.bias": torch.linspace(0, 1, 6), PREFIX + "pool.weight": torch.eye(4)}


def compress(method, state=None, **options):
    return dtrain.compress(
        None, dtrain.lora_factors((factors() if state is None else state, CONFIG)), method, **options
    )


# --- a delta to zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_lossless_gives_every_bit_back(dtype, tmp_path):
    state = {name: value.to(dtype) for name, value in (factors() | TRAINED).items()}
    delta = compress(Lossless(), state)
    delta.save(tmp_path / "x.safetensors")
    for one in (delta, dtrain.load(tmp_path / "x.safetensors")):
        assert same_bits(one.state_dict(None), dict(sorted(state.items())))


def test_keeping_all_rounds_the_factors_to_half_precision():
    state = factors() | TRAINED
    after = compress(Dare(keep=1.0), state, rules=Rules(fresh="exact")).state_dict(None)
    for name, value in state.items():
        assert torch.equal(after[name], value if name in TRAINED else value.half().float()), name


@pytest.mark.parametrize("method", [Dare(keep=0.01), DareX(keep=0.1, q=0.5)], ids=repr)
def test_what_is_no_factor_is_never_dropped(method):
    """A fresh matrix is no small change to zero."""
    delta = compress(method, factors() | TRAINED, rules=Rules(fresh="exact"))
    assert set(delta.report().whole) == TRAINED.keys()
    after = delta.state_dict(None)
    assert all(torch.equal(after[name], value) for name, value in TRAINED.items())


def test_a_factor_that_training_left_at_zero_costs_nothing():
    state = factors()
    state[PREFIX + "enc.up.lora_B.weight"].zero_()
    delta = compress(Dare(keep=0.5), state)
    roles = {record.name: record.role for record in delta.content.records}
    assert roles[PREFIX + "enc.up.lora_B.weight"] is Role.SAME
    assert not delta.state_dict(None)[PREFIX + "enc.up.lora_B.weight"].any()
    with pytest.raises(InputError, match="adapter equals its base zeros"):
        compress(Dare(), {name: torch.zeros_like(value) for name, value in state.items()})


def test_none_is_zero_for_any_state_dict():
    state = {"a": torch.randn(5, 4), "b": torch.randn(3), "n": torch.arange(4)}
    assert same_bits(dtrain.compress(None, state, Lossless()).state_dict(None), state)
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    told, untold = (dtrain.compress(one, state, Dare(keep=0.5)).content for one in (zeros, None))
    assert told.fingerprint == untold.fingerprint
    assert [record.digest for record in told.records] == [record.digest for record in untold.records]


def test_every_base_is_checked():
    delta, state = compress(Dare(keep=0.5)), factors()
    delta.verify(None)
    delta.verify({name: torch.zeros_like(value) for name, value in state.items()})
    doors = (delta.verify, delta.state_dict, lambda state: delta.apply_(module_of(state)))
    for door in doors:
        with pytest.raises(BaseMismatchError, match=r"lacks 'base_model.model.*adapter's factors to zero: give None"):
            door(base())
    with pytest.raises(BaseMismatchError, match="has other values"):
        delta.verify(state)
    before = base()
    usual = dtrain.compress(before, {name: value + 1 for name, value in before.items()}, Dare())
    for door in (usual.verify, usual.state_dict):
        with pytest.raises(
            BaseMismatchError, match="zeros is not the base the delta was made from: it has other values"
        ):
            door(None)


def test_a_file_cannot_make_anyone_allocate_what_it_does_not_hold():
    record = Record("x", Role.SAME, torch.float32, (1 << 40,), bytes(4))
    delta = dtrain.Delta(Content((record,), bytes(32)), "bomb.safetensors")
    with pytest.raises(ArtifactError, match=r"bomb.safetensors: size: zeros of its shapes would take 4,398,"):
        delta.verify(None)


def test_same_seed_same_bytes(tmp_path):
    state = factors()
    for name in "ab":
        compress(Dare(keep=0.3), state).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- what two masks do to the product


@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_two_masks_square_the_variance_of_the_product(keep):
    """Var (BA)_ij = (1/keep^2 - 1) sum_k (b_ik a_kj)^2, against (1/keep - 1) of one mask on B."""
    rank, size, draws = 2, 150, 60
    a, b = torch.randn(rank, size), torch.randn(size, rank)
    state = {PREFIX + "m.lora_A.weight": a, PREFIX + "m.lora_B.weight": b}
    scale, terms = CONFIG["lora_alpha"] / CONFIG["r"], (b**2) @ (a**2)
    for rules, variance in ((Rules(), 1 / keep**2 - 1), (Rules(include=["*lora_B*"]), 1 / keep - 1)):
        errors = []
        for seed in range(draws):
            after = compress(Dare(keep=keep, seed=seed), state, rules=rules).state_dict(None)
            errors.append((product(after, "m") - product(state, "m")) / scale)
        mean_square = torch.stack(errors).square().mean(0)
        # Unbiased, and the variance is the formula's: 60 draws of 300 mask bits a factor leave 3 % of noise.
        assert torch.stack(errors).mean().abs() < 0.05 * (variance * terms).mean().sqrt()
        assert mean_square.mean() / (variance * terms).mean() == pytest.approx(1, abs=0.12)


# --- back into PEFT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["up", "square"], "r": 3, "rank_pattern": {"up": 2}, "use_rslora": True},
        {"target_modules": ["tokens", "up", "image"], "modules_to_save": ["classifier"], "bias": "lora_only"},
        {"target_modules": ["square", "line"], "modules_to_save": ["classifier"], "bias": "all", "lora_bias": True},
    ],
    ids=["patterns", "embedding, head and biases", "all biases"],
)
def test_peft_loads_the_folder_back(options, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = Net(), torch.randint(11, (5, 7))
    adapted = trained(model, tmp_path / "adapter", **options)
    tensors = dtrain.lora_factors(tmp_path / "adapter")
    for method in (Lossless(), Dare(keep=0.5)):
        delta = dtrain.compress(None, tensors, method)
        delta.save(tmp_path / "delta.safetensors")
        folder = tmp_path / type(method).__name__
        delta = dtrain.load(tmp_path / "delta.safetensors")
        size = dtrain.save_adapter(delta, folder)
        assert size == sum(path.stat().st_size for path in folder.iterdir())
        assert same_bits(dict(sorted(load_file(folder / "adapter_model.safetensors").items())), delta.state_dict(None))
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        if isinstance(method, Lossless):
            assert torch.equal(loaded(ids), adapted(ids))
        peft.set_peft_model_state_dict(adapted, delta.state_dict(None))
        assert torch.equal(loaded(ids), adapted(ids))
        assert loaded(ids).ne(model(ids)).any()
        assert dtrain.lora_factors(folder).notes == tensors.notes


def test_the_files_of_the_folder(tmp_path):
    config = CONFIG | {"base_model_name_or_path": str(tmp_path / "base"), "revision": None, "lora_dropout": 0.1}
    delta = dtrain.compress(None, dtrain.lora_factors((factors(), config)), Lossless())
    delta.save(tmp_path / "delta.safetensors")
    dtrain.save_adapter(delta, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta.safetensors", "out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == CONFIG | {"lora_dropout": 0.1}
    assert str(tmp_path).encode() not in (tmp_path / "delta.safetensors").read_bytes()


def test_an_empty_folder_is_filled_and_no_other(tmp_path, monkeypatch):
    delta = compress(Lossless())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    dtrain.save_adapter(delta, ".")
    assert len(list((tmp_path / "empty").iterdir())) == 2
    (tmp_path / "file").write_text("x")
    for path in ("empty", "file"):
        with pytest.raises(InputError, match=f"{path} is there already and not an empty folder"):
            dtrain.save_adapter(delta, tmp_path / path)
    with pytest.raises(InputError, match=r"out cannot be written \(No such file or directory\)"):
        dtrain.save_adapter(delta, tmp_path / "none" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_only_a_delta_of_an_adapter_is_one():
    before = base()
    delta = dtrain.compress(before, {name: value + 1 for name, value in before.items()}, Dare())
    with pytest.raises(
        InputError, match=r"delta has no configuration of an adapter. Make the delta with dtrain.compress"
    ):
        dtrain.save_adapter(delta, "out")
    forged = replace(delta.content, metadata={"adapter": CONFIG})
    with pytest.raises(BaseMismatchError, match="zeros is not the base"):
        dtrain.save_adapter(dtrain.Delta(forged), "out")
    assert not Path("out").exists()


# --- the command line


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run one command line beside a base and an adapter; return (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    save_file(base(), "base.safetensors")
    write(Path("adapter"))

    def call(*argv):
        code = main([*argv])
        return code, *capsys.readouterr()

    return call


def test_an_adapter_as_finetuned_means_its_product(run):
    code, out, err = run("compress", "base.safetensors", "adapter", "d.safetensors")
    assert (code, err) == (0, "")
    assert "adapter is an adapter: compressed is what it adds to the base, scaling * B A" in out
    merged = dtrain.lora_product("base.safetensors", "adapter")
    dtrain.compress("base.safetensors", merged, Dare()).save("expected.safetensors")
    assert Path("d.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    assert run("apply", "base.safetensors", "d.safetensors", "merged.safetensors")[0] == 0
    assert (
        json.loads(run("compress", "base.safetensors", "adapter", "d.safetensors", "--json")[1])["adapter"] == "product"
    )


def test_zeros_as_base_means_the_factors(run):
    code, out, err = run("compress", "zeros", "adapter", "d.safetensors", "--method", "Lossless")
    assert (code, err) == (0, "")
    assert "compressed are the factors of adapter; for PEFT: dtrain apply zeros d.safetensors FOLDER" in out
    assert run("verify", "zeros", "d.safetensors")[0] == 0
    code, out, err = run("apply", "zeros", "d.safetensors", "back/")
    assert (code, err) == (0, "")
    assert "wrote back/: an adapter for PEFT, 4 tensors" in out
    assert same_bits(load_file("back/adapter_model.safetensors"), load_file("adapter/adapter_model.safetensors"))
    assert json.loads(run("compress", "zeros", "adapter", "d.safetensors", "--json")[1])["adapter"] == "factors"
    assert '"peft_type": "LORA"' in run("inspect", "d.safetensors")[1]


def test_a_model_called_zeros_is_a_model(run):
    Path("zeros").mkdir()
    Path("base.safetensors").rename("zeros/model.safetensors")
    assert json.loads(run("compress", "zeros", "adapter", "d.safetensors", "--json")[1])["adapter"] == "product"
    assert run("verify", "zeros", "d.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["compress", "zeros", "base.safetensors", "d"], 2, "BASE zeros goes with the folder of a PEFT adapter, which"),
        (["compress", "adapter", "base.safetensors", "d"], 1, "adapter is a PEFT adapter, and no model by itself"),
        (["compress", "zeros", "adapter", "adapter/adapter_config.json"], 2, "is a file of FINETUNED adapter"),
        (["apply", "zeros", "d.safetensors", "out.safetensors"], 2, "OUT must be a folder where BASE is zeros"),
        (["apply", "zeros", "d.safetensors", "adapter"], 1, "adapter is there already and not an empty folder"),
        (["apply", "base.safetensors", "d.safetensors", "m.safetensors"], 1, "or `zeros` on the command line"),
        (["verify", "zeros", "usual.safetensors"], 1, "zeros is not the base"),
        (["apply", "zeros", "usual.safetensors", "out"], 1, "has no configuration of an adapter"),
    ],
)
def test_refusals(run, argv, code, message):
    run("compress", "zeros", "adapter", "d.safetensors")
    run("compress", "base.safetensors", "adapter", "usual.safetensors")
    found, out, err = run(*argv)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == [
        "adapter",
        "base.safetensors",
        "d.safetensors",
        "usual.safetensors",
    ]
