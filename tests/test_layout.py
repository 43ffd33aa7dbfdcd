"""The house: who may import whom, what may not be there at all, and what a wheel contains."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = [
    path
    for path in sorted((ROOT / "dtrain").rglob("*.py"))
    if not path.relative_to(ROOT).is_relative_to("dtrain/callbacks")
]
CALLBACKS = sorted((ROOT / "callbacks").rglob("*.py"))
FORBIDDEN = {  # room: rooms and modules of dtrain that it may not import
    "stages": {"*", "!errors", "!stages"},
    "artifact": {"*", "!errors", "!stages", "!artifact"},
    "methods": {"*", "!errors", "!stages", "!methods"},
    "runtime": {"methods", "fit", "optim", "cli", "compression", "delta", "report"},
    "fit": {"advice", "cli", "lora", "optim", "compression", "delta", "report"},
    "lora": {"advice", "cli", "compression", "fit", "methods", "optim", "report"},
    "advice": {"artifact", "cli", "compression", "fit", "lora", "optim", "runtime"},
    "optim": {"artifact", "cli", "compression", "delta", "fit", "methods", "report", "runtime", "stages"},
}


def imports(path):
    """Return every module that a file imports, wherever in it, names of `from` imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name(path):
    return str(path.relative_to(ROOT))


def rooms(path):
    return {module.split(".")[1] for module in imports(path) if module.startswith("dtrain.")}


@pytest.mark.parametrize("path", ENGINE, ids=name)
def test_imports_point_one_way(path):
    forbidden = FORBIDDEN.get(path.relative_to(ROOT).parts[1], set())
    if "*" in forbidden:
        assert rooms(path) <= {room[1:] for room in forbidden if room[0] == "!"}
    else:
        assert not rooms(path) & forbidden


@pytest.mark.parametrize("path", ENGINE, ids=name)
def test_the_engine_knows_no_lightning(path):
    found = imports(path)
    assert not {
        module for module in found if module.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")
    }
    above = {"lightning", "pytorch_lightning", "lightning_fabric", "callbacks", "recipes", "bench", "tests"}
    assert not above & {module.split(".")[0] for module in found}
    assert "callbacks" not in rooms(path)


@pytest.mark.parametrize("path", CALLBACKS, ids=name)
def test_callbacks_know_no_recipe(path):
    assert not {"recipes", "bench", "tests", "callbacks"} & {module.split(".")[0] for module in imports(path)}


READERS = [path for path in ENGINE if path.relative_to(ROOT).parts[1] in ("artifact", "runtime", "stages")]


@pytest.mark.parametrize("path", READERS, ids=name)
def test_what_reads_files_runs_no_code(path):
    modules = {"pickle", "marshal", "shelve", "importlib", "runpy", "subprocess", "ctypes", "dill", "cloudpickle"}
    assert not {module for module in imports(path) if module.split(".")[0] in modules}
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "os.system"}


def test_checkpoints_are_read_with_weights_only():
    loads = [
        node
        for path in [*ENGINE, *CALLBACKS]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert loads
    assert all("weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords] for node in loads)


def test_the_callbacks_are_a_relative_link():
    link = ROOT / "dtrain" / "callbacks"
    assert link.is_symlink()
    assert link.readlink() == Path("../callbacks")


def test_every_room_says_what_it_offers():
    for path in ENGINE:
        if path.name == "__init__.py":
            assert "__all__" in path.read_text(), path


def test_no_print_and_no_assert():
    """House rule: errors are sentences, results are returned."""
    for path in [*ENGINE, *CALLBACKS]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        assert not any(isinstance(node, ast.Assert) for node in nodes), path
        assert not any(isinstance(node, ast.Call) and ast.unparse(node.func) == "print" for node in nodes), path


@pytest.mark.multiproc
def test_the_wheel_has_the_callbacks_in_their_place(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for folder in ("dtrain", "callbacks"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("[A-Zp]*"):  # pyproject.toml, README.md, LICENSE
        if file.is_file():
            shutil.copy(file, tree)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command = [*build, "--outdir", str(tmp_path / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    (wheel,) = (tmp_path / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"dtrain/{name(path)}" for path in CALLBACKS} <= names
    assert {name(path) for path in ENGINE} <= names
    assert {"dtrain/artifact/FORMAT.md", "dtrain/py.typed"} <= names
    assert {entry.split("/")[0] for entry in names if ".dist-info/" not in entry} == {"dtrain"}


LEAN = """
import sys, dtrain, torch
assert not torch.cuda.is_initialized()
heavy = {"lightning", "pytorch_lightning", "transformers", "timm", "torchvision", "matplotlib", "sklearn"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.multiproc
def test_importing_dtrain_is_lean():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", LEAN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
