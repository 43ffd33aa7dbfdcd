"""Promise 7: the same inputs give the same bytes, whatever the process, its hash seed and its number of threads.

In any order of the tensors and for every method: `tests/methods/test_methods.py`. On one rank and on two:
`tests/callbacks/test_spread.py`.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

SCRIPT = """
import hashlib, sys, torch, dtrain
from dtrain.artifact import pack_file
from tests.methods.settings import compress_zoo
torch.set_num_threads(int(sys.argv[1]))
for method in (dtrain.Dare(keep=0.1), dtrain.DareX(keep=0.3, q="norm", values="sign"), dtrain.Lossless()):
    print(hashlib.sha256(b"".join(pack_file(compress_zoo(method)[2].content))).hexdigest())
"""


@pytest.mark.multiproc
def test_six_processes_write_the_same_bytes():
    def start(number):
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SCRIPT, str(1 + number % 3)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(start, range(6)))
    assert len(outputs[0].split()) == 3
    assert len(set(outputs)) == 1
