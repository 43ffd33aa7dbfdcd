"""Recipes are scripts: what they import lies beside them, and its tests import it by the same name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
