"""Choose between the real thing and its offline twin, and say why."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import HfHubHTTPError

import dtrain


def choose_preset(argv: Sequence[str], hub: Mapping[str, Any]) -> tuple[str, str]:
    """Return (preset, reason) for a command line.

    Args:
        argv: The arguments; only `--preset auto|hub|offline` and a `preset:` in a `--config` file are looked at,
            the rest belongs to the recipe's own parser, but for what stands in for a file of `hub`.
        hub: Values of that preset by dotted name; one such as `./beit3.spm` is a file that has to be there.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--preset", choices=("auto", "hub", "offline"))
    given = parser.parse_known_args(argv)[0].preset
    asked = given or next((config["preset"] for config in reversed(configs(argv)) if "preset" in config), "auto")
    if asked not in ("auto", "hub", "offline"):
        raise dtrain.InputError(f"there is no preset {asked!r}. Give auto, hub or offline.")
    if asked != "auto":
        return asked, "as asked"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return "offline", "no accelerator; ask for the real thing with --preset hub"
    files = [value for name, value in hub.items() if str(value).startswith("./") and not is_given(argv, name)]
    if missing := [file for file in files if not Path(file).exists()]:
        return "offline", f"there is no {missing[0]}; ask for the real thing with --preset hub"
    if not hub_answers():
        return "offline", "the Hugging Face Hub does not answer; ask for it with --preset hub"
    return "hub", "an accelerator and the Hugging Face Hub are there"


def on_line(argv: Sequence[str], argument: str) -> str | None:
    """Return what a command line itself gives for `argument`; None if nothing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{argument}")
    return vars(parser.parse_known_args(argv)[0])[argument]


def is_given(argv: Sequence[str], argument: str) -> bool:
    """Return whether a command line, or a `--config` file on it, has something of its own for `argument`."""
    group, _, name = argument.partition(".")
    written = [name in (config.get(group) or {}) or argument in config for config in configs(argv)]
    return on_line(argv, argument) is not None or any(written)


def named_class(argv: Sequence[str], argument: str) -> str | None:
    """Return the class that a command line, or else a `--config` file on it, names for `argument`; None if neither."""
    given = on_line(argv, argument)
    written = [config.get(argument) for config in configs(argv)]
    names = [value.get("class_path") if isinstance(value, dict) else value for value in written]
    return given or next((name for name in reversed(names) if name), None)


def configs(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the `--config` files of a command line hold.

    Raises:
        InputError: If one of them is no YAML with names and values.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", action="append", default=[])
    paths = [Path(path) for path in parser.parse_known_args(argv)[0].config]
    return [read_config(path) for path in paths if path.is_file()]  # the parser says which is missing


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise dtrain.InputError(f"{path} is no YAML ({' '.join(str(error).split())}). Mend it.") from error
    if not isinstance(config, dict):
        raise dtrain.InputError(f"{path} holds a {type(config).__name__}, expected names and values as `name: value`.")
    return config


def hub_answers(seconds: float = 5.0) -> bool:
    """Return whether the Hub answers a small question in time."""
    try:
        HfApi().dataset_info("uoft-cs/cifar10", timeout=seconds)
    except (OSError, HfHubHTTPError, RuntimeError):  # every way in which a network can be absent
        return False
    return True
