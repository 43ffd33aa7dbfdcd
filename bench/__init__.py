"""Evidence: what the project claims, measured. Each module runs as `python -m bench.NAME`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # the benches read data and models as the recipes do
