"""README says what the code says."""

from pathlib import Path

from dtrain import METHODS
from dtrain.methods.catalogue import catalogue, markdown

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_methods_are_those_of_the_command():
    """Made by `dtrain methods --markdown`."""
    assert markdown(catalogue(METHODS)) in README
