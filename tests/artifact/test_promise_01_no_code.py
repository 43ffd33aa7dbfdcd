"""Promise 1: no code runs when a file is loaded, inspected or put on a base."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for room in ("artifact", "runtime", "stages") for path in sorted((ROOT / "dtrain" / room).glob("*.py"))]
FILES.append(ROOT / "dtrain" / "delta.py")
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "importlib",
    "runpy",
    "subprocess",
    "ctypes",
    "code",
    "codeop",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "getattr",
    "globals",
    "torch.load",
    "os.system",
    "os.popen",
    "np.load",
    "numpy.load",
}
#: Names that are written here, and never taken from a file.
ALLOWED = {"getattr(os, 'O_BINARY', 0)", "getattr(module, '_orig_mod', module)"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_source_can_run_nothing(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & MODULES, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node) not in ALLOWED:
            assert ast.unparse(node.func) not in CALLS, ast.unparse(node)


#: From its call on, ends the process where something is run or imported, or opened outside the folder of golden files.
HOOK = """
import sys
from pathlib import Path

GOLDEN = Path("tests/artifact/golden/v1")
FORBIDDEN = {"import", "exec", "compile", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
             "socket.connect", "socket.__new__", "ctypes.dlopen", "pickle.find_class", "marshal.loads", "code.__new__"}

def watch():
    def hook(event, arguments):
        if event in FORBIDDEN or (event == "open" and Path(str(arguments[0])).parent != GOLDEN):
            print("noticed", event, flush=True)
            raise SystemExit(3)
    sys.addaudithook(hook)
"""
#: Loads every golden file, and goes through every door that a loaded file has.
SCRIPT = """
import json, torch, dtrain
from tests.artifact.make_golden import tensors
torch.set_num_threads(1)
expected = json.loads((GOLDEN / "expected.json").read_text())
bases = {name: tensors(state) for name, state in json.loads((GOLDEN / "bases.json").read_text()).items()}
load = dtrain.load
watch()
for name, entry in expected.items():
    delta = load(GOLDEN / f"{name}.safetensors")
    delta.report().as_dict()
    delta.verify(bases[entry["base"]])
    delta.state_dict(bases[entry["base"]])
    print(name)
"""
AWAKE = {
    "import": "import wave",
    "compile": "compile('1', 'text', 'eval')",
    "exec": "eval(ready)",
    "open": "open('/etc/hosts')",
    "os.system": "os.system('true')",
}


def run(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOOK + script]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.multiproc
def test_nothing_runs_and_nothing_else_is_opened():
    done = run(SCRIPT)
    names = sorted(path.stem for path in (ROOT / "tests/artifact/golden/v1").glob("*.safetensors"))
    assert (done.returncode, sorted(done.stdout.split())) == (0, names), done.stdout + done.stderr


@pytest.mark.multiproc
@pytest.mark.parametrize(("event", "code"), AWAKE.items(), ids=AWAKE)
def test_the_hook_would_notice(event, code):
    """Else the test above would prove nothing."""
    done = run(f"import os\nready = compile('1', 'text', 'eval')\nwatch()\n{code}")
    assert (done.returncode, done.stdout) == (3, f"noticed {event}\n"), done.stderr
