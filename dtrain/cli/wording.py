"""One sentence for what the parser says in an indented paragraph of its own words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from itertools import pairwise

#: What `compress` does where no method is named: it needs no data, and at this rate the paper finds next to no loss.
DEFAULT_METHOD = "Dare"


def sentence(message: str, argv: Sequence[str], command: str) -> str:
    """Return what is wrong with a command line, and where its help is.

    Args:
        message: The parser's.
        argv: The command line.
        command: Its command.
    """
    from dtrain.fit import FITS
    from dtrain.methods import METHODS

    for option, classes in (("method", METHODS), ("fit", FITS)):
        known, name = [each.__name__ for each in classes], _named(argv, option)
        if name.isidentifier() and name not in known:
            close = difflib.get_close_matches(name.lower(), [each.lower() for each in known], 1)
            guess = "".join(f" Did you mean {each}?" for each in known if each.lower() in close)
            return f"there is no {option} {name!r}; the {option}s are {listed(known)}.{guess}"
    return _of_argument(message, argv, command) or _of_words(message, argv, command)


def _of_argument(message: str, argv: Sequence[str], command: str) -> str:
    """Say what is wrong with a value; nothing where it is something else."""
    keys = re.findall(r'Parser key "([\w.]+)":', message)
    option = keys[0] if keys and keys[0] in ("method", "fit") else ""
    help_of = f"dtrain {command} --{option}.help {_named(argv, option)}" if option else f"dtrain {command} --help"
    if found := re.search(r"Option '(.+?)' is not accepted", message):
        return f"{_named(argv, option)} has no argument {found[1]!r}. See: {help_of}"
    if option == "fit" and not _named(argv, option):
        return f"--fit NAME is missing, which the arguments of a fit go with. See: dtrain {command} --help"
    value = re.search(r"(?:Got|Given) value: (.*)$|literal for .*: '(.*)'|PositiveInt: (.*) does not", message)
    if not (keys and value) or keys[-1] == option:
        return ""
    # The innermost key is the argument; what lies around it repeats the method or fit.
    name = f"{option}.{keys[-1]}" if option else keys[-1]
    return f"--{name} cannot be {value[value.lastindex or 0]!r}. See: {help_of}"


def _of_words(message: str, argv: Sequence[str], command: str) -> str:
    if found := re.search(r"argument (\S+): expected (?:at least )?one argument", message):
        bare = [word for word, after in pairwise([*argv, "--"]) if word.startswith(found[1]) and after.startswith("--")]
        return f"{(*bare, found[1].removesuffix('.file'))[0]} wants a value. See: dtrain {command} --help"
    if found := re.search(r"arguments are required: (.*)$", message):
        return f"{found[1].replace(f'{command}.', '').upper()} is missing. See: dtrain {command} --help"
    flat = re.sub(r'Parser key "([\w.]+)":', r"--\1:", " ".join(message.split())).rstrip(".")
    return f"{flat}. See: dtrain {command} --help"


def _named(argv: Sequence[str], option: str) -> str:
    named = re.findall(rf"^--{option}(?:\.help)?[=\n](.+)$", "\n".join(argv), re.MULTILINE)
    return named[-1] if named else DEFAULT_METHOD if option == "method" else ""


def listed(names: Collection[str]) -> str:
    """Return names as a list in a sentence."""
    *most, last = names
    return f"{', '.join(most)} and {last}"
