"""What the commands do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import dtrain
from tests.cli.tools import check_refusal, files, same, shift


def test_round_trip(run, delta, pair):
    assert run("verify", "base.safetensors", delta)[0] == 0
    assert run("apply", "base.safetensors", delta, "merged.safetensors")[0] == 0
    merged = load_file("merged.safetensors")
    same(merged, dtrain.load(delta).state_dict("base.safetensors"))
    assert merged.keys() == pair[1].keys()
    for name in ("table.weight", "ids", "head.bias"):
        assert torch.equal(merged[name], pair[1][name])


def test_the_cli_writes_the_very_file_that_compress_writes(run, delta):
    made = dtrain.compress("base.safetensors", "tuned.safetensors", dtrain.Dare())
    made.save("again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path(delta).read_bytes()


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ((), dtrain.Dare()),
        (("--method.keep", "0.5"), dtrain.Dare(keep=0.5)),
        (("--method", "Dare", "--method.values=sign"), dtrain.Dare(values="sign")),
        (
            ("--method", "DareX", "--method.keep", "0.3", "--method.q", "norm", "--method.seed", "7"),
            dtrain.DareX(keep=0.3, q="norm", seed=7),
        ),
        (("--method=DareX", "--method.q=0.4"), dtrain.DareX(q=0.4)),
        (("--method", "Lossless"), dtrain.Lossless()),
        (("--method", "SeededSign"), dtrain.SeededSign()),  # with its own keep, not that of the default method
        (("--method.keep", "0.3"), dtrain.Dare(keep=0.3)),
        (
            ("--method", "DeltaDCT", "--method.bits", "[4,2,0]", "--method.shares", "[0.25,0.25,0.5]"),
            dtrain.DeltaDCT(bits=(4, 2, 0), shares=(0.25, 0.25, 0.5)),
        ),
        (
            ("--method", "EoRA", "--method.host", "SeededSign", "--method.host.seed", "3", "--method.weighted=false"),
            dtrain.EoRA(host=dtrain.SeededSign(seed=3), weighted=False),
        ),
        (
            ("--method", "DeltaDQ", "--method.group", "16", "--method.scope", "row"),
            dtrain.DeltaDQ(group=16, scope="row"),
        ),
    ],
    ids=repr,
)
def test_compress_takes_the_method_and_its_arguments(run, words, method):
    assert run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", *words)[0] == 0
    assert dtrain.load("d.safetensors").content.metadata["method"] == method.describe()


def test_lossless_gives_the_fine_tuned_checkpoint_back(run, pair):
    run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", "--method", "Lossless")
    run("apply", "base.safetensors", "d.safetensors", "merged.safetensors")
    same(load_file("merged.safetensors"), pair[1])


def test_compress_prints_the_report(run):
    code, out, err = run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors")
    assert (code, err) == (0, "")
    for words in (
        "Dare(keep=0.1",
        "compressed by the method",
        "smaller than the checkpoint",
        "stored whole: head.bias",
    ):
        assert words in out
    assert out.endswith("wrote d.safetensors\n")


def test_rules(run):
    words = [
        "--include",
        "layers.*",
        "norm.*",
        "--exclude",
        "*.up.*",
        "--whole",
        "norm.*",
        "--drop",
        "half.*",
        "wide.*",
    ]
    run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", *words)
    rules = dtrain.Rules(
        include=["layers.*", "norm.*"], exclude=["*.up.*"], whole=["norm.*"], drop=["half.*", "wide.*"]
    )
    expected = dtrain.compress("base.safetensors", "tuned.safetensors", dtrain.Dare(), rules=rules)
    expected.save("expected.safetensors")
    assert Path("d.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    roles = {record.name: record.role.name for record in expected.content.records}
    assert roles["norm.bias"] == "WHOLE"
    assert roles["half.weight"] == roles["wide.weight"] == "DROP"


def test_codes_and_embeddings(run, pair):
    base, tuned = pair
    save_file(base | {"word_embeddings.weight": torch.ones(4, 4)}, "base.safetensors")
    save_file(tuned | {"word_embeddings.weight": torch.zeros(4, 4)}, "tuned.safetensors")
    words = ["--embeddings", "--vectors", "float16", "--fresh", "exact"]
    code, out, _ = run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", *words)
    rules = dtrain.Rules(embeddings=[], vectors="float16", fresh="exact")
    expected = dtrain.compress("base.safetensors", "tuned.safetensors", dtrain.Dare(), rules=rules)
    expected.save("expected.safetensors")
    assert Path("d.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    assert "left at the base" not in out
    assert torch.equal(expected.state_dict("base.safetensors")["head.weight"], tuned["head.weight"])
    code, out, _ = run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors")
    assert code == 0
    assert "left at the base (see the rules `drop` and `embeddings`): word_embeddings.weight\n" in out
    words = ["--vectors", "none"]
    refusal = run("compress", "base.safetensors", "tuned.safetensors", "e.safetensors", *words)
    check_refusal(refusal, 2, "--vectors", "'none'", "uniform4")


def test_whole_without_a_pattern_stores_no_pretrained_head_whole(run, pair):
    base, tuned = pair
    save_file(base | {"score.weight": torch.ones(4, 4)}, "base.safetensors")
    save_file(tuned | {"score.weight": torch.zeros(4, 4)}, "tuned.safetensors")
    run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors")
    assert "score.weight" in dtrain.load("d.safetensors").report().whole
    run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", "--whole")
    assert "score.weight" not in dtrain.load("d.safetensors").report().whole


def test_checkpoints_and_sharded_folders_are_models_too(run, delta, pair):
    base, tuned = pair
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in tuned.items()}}, "tuned.ckpt")
    folder = Path("folder")
    folder.mkdir()
    shards = {"model-1.safetensors": sorted(base)[:4], "model-2.safetensors": sorted(base)[4:]}
    for shard, names in shards.items():
        save_file({name: base[name] for name in names}, folder / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("compress", "folder", "tuned.ckpt", "other.safetensors")[0] == 0
    assert Path("other.safetensors").read_bytes() == Path(delta).read_bytes()
    assert run("verify", "folder", delta)[0] == 0
    assert run("apply", "folder", delta, "merged.safetensors")[0] == 0
    same(load_file("merged.safetensors"), dtrain.load(delta).state_dict("base.safetensors"))


def test_merged_is_what_safetensors_itself_would_write(run):
    base = {"b": torch.randn(600, 700), "a": torch.randn(3), "é": torch.randn(5, 5), "empty": torch.empty(0, 4)}
    save_file(base, "base.safetensors")
    save_file({name: shift(tensor) for name, tensor in base.items()}, "tuned.safetensors")
    run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors")
    assert run("apply", "base.safetensors", "d.safetensors", "merged.safetensors")[0] == 0
    state = dtrain.load("d.safetensors").state_dict("base.safetensors")
    assert Path("merged.safetensors").read_bytes() == save(state, metadata={"format": "pt"})


def test_merged_says_that_it_is_of_torch_and_is_aligned(run, delta):
    run("apply", "base.safetensors", delta, "merged.safetensors")
    with safe_open("merged.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118 - it is no dict
            tensor = file.get_tensor(name)
            assert tensor.data_ptr() % tensor.element_size() == 0


def test_the_base_may_be_replaced(run, delta):
    expected = dtrain.load(delta).state_dict("base.safetensors")
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    assert run("apply", "base.safetensors", delta, "base.safetensors")[0] == 0
    same(load_file("base.safetensors"), expected)


def test_tied_tensors_are_written_once(run):
    shared = torch.randn(6, 6)
    torch.save({"embed": shared, "out": shared, "w": torch.randn(6, 6)}, "base.ckpt")
    tuned = shift(shared)
    torch.save({"embed": tuned, "out": tuned, "w": torch.randn(6, 6)}, "tuned.ckpt")
    run("compress", "base.ckpt", "tuned.ckpt", "d.safetensors")
    assert run("apply", "base.ckpt", "d.safetensors", "merged.safetensors")[0] == 0
    merged = load_file("merged.safetensors")
    assert merged.keys() == {"embed", "w"}
    assert torch.equal(merged["embed"], dtrain.load("d.safetensors").state_dict("base.ckpt")["out"])


def test_a_dtype_may_change(run, pair):
    save_file({name: t.bfloat16() if t.is_floating_point() else t for name, t in pair[1].items()}, "tuned.safetensors")
    run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", "--drop", "layers.0.*")
    assert run("apply", "base.safetensors", "d.safetensors", "merged.safetensors")[0] == 0
    same(load_file("merged.safetensors"), dtrain.load("d.safetensors").state_dict("base.safetensors"))


def test_complex128_cannot_be_written_as_safetensors(run):
    torch.save({"z": torch.zeros(2, dtype=torch.complex128)}, "base.ckpt")
    torch.save({"z": torch.ones(2, dtype=torch.complex128)}, "tuned.ckpt")
    run("compress", "base.ckpt", "tuned.ckpt", "d.safetensors")
    before = files()
    check_refusal(run("apply", "base.ckpt", "d.safetensors", "merged.safetensors"), 1, "'z'", "Delta.state_dict()")
    assert files() == before
