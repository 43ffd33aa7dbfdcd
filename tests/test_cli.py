import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import dtrain
from dtrain.artifact import read_file
from dtrain.cli import commands, main
from dtrain.methods import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def pair(tmp_path, monkeypatch):
    """Two models in the working folder: matrices, vectors, an integer buffer, a frozen table and a fresh head."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    base = {f"layers.{i}.{kind}.weight": torch.randn(32, 48) * 0.02 for i in range(2) for kind in ("up", "down")}
    base |= {"norm.bias": torch.randn(32), "table.weight": torch.randn(9, 32), "ids": torch.arange(5)}
    base |= {"half.weight": torch.randn(16, 16).bfloat16(), "wide.weight": torch.randn(8, 8, dtype=torch.float64)}
    tuned = {name: shift(tensor) for name, tensor in base.items()}
    tuned |= {"table.weight": base["table.weight"], "head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}
    save_file(base, "base.safetensors")
    save_file(tuned, "tuned.safetensors")
    return base, tuned


def shift(tensor):
    return (tensor + 2e-3 * torch.randn(tensor.shape)).to(tensor.dtype) if tensor.is_floating_point() else tensor


@pytest.fixture
def run(capsys):
    """Run one command line and return (exit code, standard output, standard error)."""

    def call(*argv):
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def delta(run):
    """The name of a delta file between the two models."""
    assert run("compress", "base.safetensors", "tuned.safetensors", "delta.safetensors")[0] == 0
    return "delta.safetensors"


def files():
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path().rglob("*"))


def same(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def check_refusal(result, code, *words):
    """One sentence on standard error and nothing on standard output."""
    found, out, err = result
    assert (found, out) == (code, ""), err
    assert err.startswith("dtrain: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


# --- what the commands do


def test_round_trip(run, delta, pair):
    assert run("verify", "base.safetensors", delta)[0] == 0
    assert run("apply", "base.safetensors", delta, "merged.safetensors")[0] == 0
    merged = load_file("merged.safetensors")
    same(merged, dtrain.load(delta).state_dict("base.safetensors"))
    assert merged.keys() == pair[1].keys()
    for name in ("table.weight", "ids", "head.weight", "head.bias"):
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
            ("--method", "Eora", "--method.host", "SeededSign", "--method.host.seed", "3", "--method.weighted=false"),
            dtrain.Eora(host=dtrain.SeededSign(seed=3), weighted=False),
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


# --- the checkpoint that `apply` writes


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


# --- what programs read


def test_json_is_one_object_and_nothing_else(run):
    def data(*argv):
        code, out, err = run(*argv, "--json")
        assert (code, err) == (0, "")
        assert out.endswith("}\n")
        assert out.count("\n") == 1
        return json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON

    made = data("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", "--method", "Lossless")
    content = read_file("d.safetensors")
    fingerprint = content.fingerprint.hex()
    assert made["file_bytes"] == Path("d.safetensors").stat().st_size
    assert made["nominal_bits"] is None
    assert made["ratio"] == made["checkpoint_bytes"] / made["file_bytes"]
    shown = data("inspect", "d.safetensors", "--tensors")
    assert shown["metadata"] == content.metadata
    assert [row["name"] for row in shown["records"]] == [record.name for record in content.records]
    assert sum(row["payload_bytes"] for row in shown["records"]) == sum(row["payload_bytes"] for row in made["rows"])
    checked = data("verify", "base.safetensors", "d.safetensors")
    assert checked["ok"] is True
    merged = data("apply", "base.safetensors", "d.safetensors", "merged.safetensors")
    assert merged["bytes"] == Path("merged.safetensors").stat().st_size
    assert {answer["fingerprint"] for answer in (made, shown, checked, merged)} == {fingerprint}
    listed = data("methods")["methods"]
    assert [row["name"] for row in listed] == [method.__name__ for method in METHODS]
    assert next(row for row in listed if row["name"] == "Lossless")["nominal_bits"] is None


def test_inspect_for_people(run, delta):
    code, out, err = run("inspect", delta)
    assert (code, err) == (0, "")
    assert "smaller than the checkpoint" in out
    assert read_file(delta).fingerprint.hex() in out
    assert "layers.0.up.weight" not in out
    code, out, _ = run("inspect", delta, "--tensors")
    line = next(line for line in out.splitlines() if "layers.0.up.weight" in line)
    assert line.split()[:6] == ["layers.0.up.weight", "add", "float32", "32", "x", "48"]


def test_inspect_shows_rules_and_names_with_brackets(run, pair):
    base, tuned = pair
    save_file({**base, "[bold]x[/bold]": torch.zeros(2, 2)}, "base.safetensors")
    save_file({**tuned, "[bold]x[/bold]": torch.ones(2, 2)}, "tuned.safetensors")
    run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", "--drop", "half.*")
    out = run("inspect", "d.safetensors", "--tensors")[1]
    assert '"drop": ["half.*"]' in out
    assert "[bold]x[/bold]" in out


def test_verify_says_ok_in_one_line(run, delta):
    code, out, err = run("verify", "base.safetensors", delta)
    assert (code, err) == (0, "")
    assert out.startswith("ok: ")
    assert out.count("\n") == 1
    assert read_file(delta).fingerprint.hex() in out


def test_methods_for_people(run):
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    for method in METHODS:
        assert method.__name__ in out
    assert "2311.03099" in out
    found = json.loads(run("methods", "--json")[1])["methods"]
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["DeltaDQ"]["nominal_bits"] == 0.125
    assert 0.3 < by_name["DeltaDQ"]["true_bits"] < 0.4
    assert by_name["Wanda"]["needs"] == "training inputs"
    assert run("methods", "--markdown")[1].startswith("| method | what it does |")


# --- help


@pytest.mark.parametrize("command", ["compress", "apply", "inspect", "verify", "advise", "methods"])
def test_every_command_has_help(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: dtrain {command}")
    assert "--json" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for words in ("compress", "exit codes:", "130"):
        assert words in out
    out = run("compress", "--help")[1]
    assert "needs no data" in " ".join(out.split())
    assert run("--version")[1] == f"dtrain {dtrain.__version__}\n"


def test_help_of_a_method_is_its_docstring(run):
    code, out, _ = run("compress", "--method.help", "DareX")
    assert code == 0
    assert "--method.keep KEEP" in out
    assert "Share of the delta's elements that is kept" in out


# --- refusals


LISTED = ", ".join(method.__name__ for method in METHODS[:-1]) + " and Lossless"
USAGE = {
    "nothing": ([], "compress, apply, inspect, verify, advise and methods"),
    "unknown command": (["compres"], "'compres'", "compress, apply, inspect, verify, advise and methods"),
    "missing OUT": (["compress", "a", "b"], "OUT is missing"),
    "one too many": (["verify", "a", "b", "c"], "unrecognized arguments: c"),
    "unknown option": (["inspect", "d", "--tensorz"], "--tensorz"),
    "unknown method": (["compress", "a", "b", "c", "--method", "Foo"], "'Foo'", LISTED),
    "mistyped method": (["compress", "a", "b", "c", "--method=darex"], "Did you mean DareX?"),
    "help of none": (["compress", "--method.help", "Foo"], "'Foo'", LISTED),
    "no method": (["compress", "a", "b", "c", "--method", "dtrain.Rules"], "--method: ", "subclass of Method"),
    "method without value": (["compress", "a", "b", "c", "--method"], "--method wants a value"),
    "argument without value": (["compress", "a", "b", "c", "--method.keep"], "--method.keep wants a value"),
    "unknown argument": (["compress", "a", "b", "c", "--method.foo", "1"], "Dare has no argument 'foo'"),
    "keep is no number": (["compress", "a", "b", "c", "--method.keep", "x"], "--method.keep cannot be 'x'"),
    "mask is no mask": (["compress", "a", "b", "c", "--method.mask", "x"], "--method.mask cannot be 'x'"),
    "q is no q": (["compress", "a", "b", "c", "--method=DareX", "--method.q=x"], "--method.q cannot be 'x'"),
    "keep=0": (["compress", "a", "b", "c", "--method.keep", "0"], "`keep` must be in [2**-24, 1], got 0.0"),
    "keep=2": (["compress", "a", "b", "c", "--method.keep", "2"], "`keep` must be in [2**-24, 1], got 2.0"),
    "needs data": (
        ["compress", "a", "b", "c", "--method", "DareX"],
        "training inputs",
        "--method.q keep",
        "dtrain.compress(",
    ),
    "needs inputs": (
        ["compress", "a", "b", "c", "--method", "Wanda"],
        "looks at the inputs",
        "Magnitude",
        "calibration=",
    ),
    "needs inputs, or not": (["compress", "a", "b", "c", "--method", "Eora"], "--method.weighted false"),
    "OUT is BASE": (["compress", "base.safetensors", "tuned.safetensors", "./base.safetensors"], "OUT and BASE"),
    "OUT is FINETUNED": (["compress", "base.safetensors", "tuned.safetensors", "tuned.safetensors"], "FINETUNED"),
    "OUT is DELTA": (["apply", "base.safetensors", "tuned.safetensors", "tuned.safetensors"], "OUT and DELTA"),
    "OUT is no .safetensors": (["apply", "a", "b", "merged.bin"], "merged.bin", "Use merged.safetensors"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_wrong_command_line_is_code_2(run, case):
    argv, *words = USAGE[case]
    before = files()
    check_refusal(run(*argv), 2, *words)
    assert files() == before


@pytest.mark.parametrize(
    "argv", [["compress", "folder", "tuned.safetensors"], ["apply", "folder", "delta.safetensors"]]
)
def test_a_file_in_the_folder_of_the_base_is_never_replaced(run, delta, argv):
    Path("folder").mkdir()
    Path("base.safetensors").rename("folder/model.safetensors")
    before = files()
    check_refusal(run(*argv, "folder/model.safetensors"), 2, "is a file of BASE folder")
    assert files() == before


def damage_nan(base, tuned):
    tuned["layers.0.up.weight"][3, 4] = torch.nan
    save_file(tuned, "tuned.safetensors")


def damage_names(base, tuned):
    save_file({f"x{name}y": tensor for name, tensor in tuned.items()}, "tuned.safetensors")


def damage_base(base, tuned):
    base["norm.bias"][0] += 1
    save_file(base, "base.safetensors")


def damage_truncate(base, tuned):
    if Path("delta.safetensors").exists():
        os.truncate("delta.safetensors", Path("delta.safetensors").stat().st_size - 9)


def damage_version(base, tuned):
    raw = Path("delta.safetensors").read_bytes()
    Path("delta.safetensors").write_bytes(raw.replace(rb"\"format\":1", rb"\"format\":9"))


def damage_nothing(base, tuned):
    pass


COMPRESS, APPLY = ["compress", "base.safetensors", "tuned.safetensors"], ["apply", "base.safetensors"]
FAILURES = {
    "missing base": (damage_nothing, ["compress", "no.safetensors", "tuned.safetensors", "out"], "does not exist"),
    "base to apply to is missing": (
        damage_nothing,
        ["apply", "no", "delta.safetensors", "o.safetensors"],
        "no does not",
    ),
    "NaN": (damage_nan, [*COMPRESS, "out"], "'layers.0.up.weight' holds NaN", "Lossless()"),
    "base equals fine-tuned": (damage_nothing, ["compress", "base.safetensors", "base.safetensors", "out"], "equals"),
    "nothing pairs": (damage_names, [*COMPRESS, "out"], "no tensor of tuned.safetensors fits one of base.safetensors"),
    "no folder": (damage_nothing, [*COMPRESS, "no/out"], "there is no folder no"),
    "OUT is a folder": (damage_nothing, [*COMPRESS, "."], "cannot be written"),
    "no folder to merge into": (damage_nothing, [*APPLY, "delta.safetensors", "no/o.safetensors"], "no folder no"),
    "wrong base": (damage_base, [*APPLY, "delta.safetensors", "o.safetensors"], "is not the base", "'norm.bias'"),
    "verify, wrong base": (damage_base, ["verify", "base.safetensors", "delta.safetensors"], "is not the base"),
    "truncated": (damage_truncate, [*APPLY, "delta.safetensors", "o.safetensors"], "delta.safetensors: size:"),
    "inspect, truncated": (damage_truncate, ["inspect", "delta.safetensors"], "delta.safetensors: size:"),
    "newer format": (damage_version, ["verify", "base.safetensors", "delta.safetensors"], "found 9", "pip install -U"),
    "no delta": (damage_nothing, ["inspect", "base.safetensors"], "not a delta file"),
    "missing delta": (damage_nothing, ["inspect", "no.safetensors"], "no.safetensors: cannot be read"),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_sentence_and_leaves_nothing_behind(run, delta, pair, case, as_json):
    damage, argv, *words = FAILURES[case]
    damage(*pair)
    before = files()
    check_refusal(run(*argv, *(["--json"] if as_json else [])), 1, *words)
    assert files() == before


def test_an_interrupt_is_code_130(run, delta, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = files()
    monkeypatch.setattr(commands, "load", interrupt)
    check_refusal(run("apply", "base.safetensors", delta, "merged.safetensors"), 130, "interrupted")
    assert files() == before


def test_an_interrupt_in_the_middle_of_writing_leaves_nothing_behind(run, delta, monkeypatch):
    from dtrain.cli import checkpoint

    before, patch = files(), checkpoint.patch

    def interrupt(record, base, origin):
        if record.name == "layers.1.up.weight":
            raise KeyboardInterrupt
        return patch(record, base, origin)

    monkeypatch.setattr(checkpoint, "patch", interrupt)
    check_refusal(run("apply", "base.safetensors", delta, "merged.safetensors"), 130, "interrupted")
    assert files() == before


# --- the process


def test_the_module_runs(delta, run):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", "dtrain", "verify", "base.safetensors", delta]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("verify", "base.safetensors", delta)[1]


def test_the_parser_needs_no_torch():
    """Help and usage errors should not wait for torch, as far as the command line can help it."""
    code = "import sys; sys.modules['dtrain'] = type(sys)('dtrain'); sys.modules['dtrain'].__path__ = [sys.argv[1]]\n"
    code += "sys.modules['dtrain'].__version__ = '0'\n"
    code += (
        "import dtrain.cli; dtrain.cli.main(['verify', '--help']); sys.exit(bool({'torch', 'rich'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code, str(ROOT / "dtrain")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, capture_output=True, env=environment, check=False).returncode == 0
