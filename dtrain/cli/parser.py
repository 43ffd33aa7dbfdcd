"""From command-line words to a command and its arguments; torch is imported only where a method is asked for."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

from jsonargparse import ArgumentParser

from dtrain.errors import DtrainError

#: The commands and what they do, in the order in which `--help` lists them.
SUMMARIES = {
    "compress": "Compress what fine-tuning changed into one small file.",
    "apply": "Write the fine-tuned checkpoint that a base and a delta make.",
    "inspect": "Show what a delta file holds and what every part of it costs.",
    "verify": "Check every byte of a delta file, and that a model is its base.",
    "advise": "Measure what fine-tuning changed and say which method suits it, and why.",
    "methods": "List the compression methods.",
}

#: What `compress` does where no method is named: it needs no data, and at this rate the paper finds next to no loss.
DEFAULT_METHOD = "Dare"

_EXIT_CODES = """\
exit codes:
  0    done
  1    the work or the check failed
  2    the command line is wrong
  130  interrupted
Unless the code is 0, one sentence on standard error says why, standard output
is empty and no file was written.
"""

_PATTERNS = """\
Patterns are shell-style, match whole tensor names, and want quotes:
--drop 'pooler.*' '*.bias'. The first that applies decides: dropped, stored
whole, bit for bit (integers), by the method (matrices that are included and
not excluded), or, all the rest, as a delta in half precision."""

_MODEL = "a .safetensors file, a Hugging Face folder or a .ckpt"

#: As BASE: a model that is zero everywhere, unless there is a file or folder of that name.
ZEROS = "zeros"


class UsageError(DtrainError):
    """A command line that cannot be meant as it stands."""


class Request(NamedTuple):
    """What the user asked for: a command, its arguments, and whether the answer is for a program."""

    command: str
    arguments: dict[str, Any]
    json: bool


def parse(argv: Sequence[str]) -> Request:
    """Return what `argv` asks for.

    Raises:
        UsageError: If it cannot be understood.
        SystemExit: With code 0, after `--help` or `--version`.
    """
    command = next((word for word in argv if not word.startswith("-")), "")
    if command not in SUMMARIES and not {"-h", "--help", "--version"} & set(argv):
        found = f"there is no command {command!r}" if command else "a command is missing"
        raise UsageError(f"{found}; the commands are {_listed(SUMMARIES)}. Try: dtrain --help")
    parser = _parser(command)
    try:
        options = parser.parse_args(_with_method(argv, command))
        arguments: dict[str, Any] = vars(cast("object", parser.instantiate(options)[command]))
    except argparse.ArgumentError as error:
        raise UsageError(_sentence(str(error), argv, command)) from error
    except DtrainError as error:  # the method refuses an argument
        raise UsageError(str(error)) from error
    as_json = bool(arguments.pop("json"))
    return Request(command, arguments, as_json)


def _with_method(argv: Sequence[str], command: str) -> list[str]:
    """Name the default method where none is named.

    As a default of the argument, its own arguments would pass to whatever other method is named.
    """
    named = any(word.partition("=")[0] in ("--method", "--method.help") for word in argv)
    if command != "compress" or named:
        return [*argv]
    after = argv.index(command) + 1
    return [*argv[:after], "--method", DEFAULT_METHOD, *argv[after:]]


def _parser(command: str) -> ArgumentParser:
    """Return the parser; only the arguments of `command` are there, so that no other command's imports are paid for."""
    import dtrain

    parser = ArgumentParser(
        prog="dtrain",
        usage="dtrain COMMAND ... [--json]",
        description="Fine-tuned models as one small, honest file.",
        epilog="Every command has its own help: dtrain COMMAND --help\n\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=f"dtrain {dtrain.__version__}")
    commands = parser.add_subcommands(title="commands", metavar="COMMAND", description=None)
    for name, summary in SUMMARIES.items():
        child = ArgumentParser(usage=_USAGE[name], description=summary)
        if name == command:
            _ARGUMENTS[name](child)
            child.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        commands.add_subcommand(name, child, help=summary)
    return parser


_USAGE = {
    "compress": "dtrain compress BASE FINETUNED OUT [--method NAME]\n"
    "                       [--method.ARGUMENT VALUE ...] [--include P ...]\n"
    "                       [--exclude P ...] [--whole P ...] [--drop P ...] [--json]",
    "apply": "dtrain apply BASE DELTA OUT [--json]",
    "inspect": "dtrain inspect DELTA [--tensors] [--json]",
    "verify": "dtrain verify BASE DELTA [--json]",
    "advise": "dtrain advise BASE FINETUNED [--include P ...] [--exclude P ...]\n"
    "                     [--whole P ...] [--drop P ...] [--json]",
    "methods": "dtrain methods [--markdown] [--json]",
}


def _compress(parser: ArgumentParser) -> None:
    from dtrain.methods import METHODS, Method

    parser.add_argument(
        "base",
        metavar="BASE",
        help=f"the model before fine-tuning: {_MODEL}; or {ZEROS}, to compress the factors of an adapter",
    )
    parser.add_argument(
        "finetuned",
        metavar="FINETUNED",
        help="the model after it, likewise; or the folder of a PEFT LoRA adapter, to compress what it adds to BASE",
    )
    parser.add_argument("out", metavar="OUT", help="the delta file to write, usually *.safetensors")
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        type=Method,
        metavar="NAME",
        help=f"{_listed([method.__name__ for method in METHODS])}; `dtrain methods` says what they are. "
        f"Default: {DEFAULT_METHOD} with its own defaults, which keeps 10 %% of the delta and needs no data.",
    )
    _rules(parser)


def _rules(parser: ArgumentParser) -> None:
    rules = parser.add_argument_group("which tensors", description=_PATTERNS)
    for name, text in {
        "include": "tensors the method may compress (default: all)",
        "exclude": "tensors the method must leave alone; their delta is kept in half precision",
        "whole": "fresh tensors, stored as they are (default: the usual names of task heads; none with no pattern)",
        "drop": "tensors that stay at the base: their delta is thrown away",
    }.items():
        rules.add_argument(f"--{name}", nargs="*", metavar="P", help=text)


def _apply(parser: ArgumentParser) -> None:
    _verify(parser)
    text = f"the .safetensors file to write, which may be BASE; where BASE is {ZEROS}, the folder for PEFT"
    parser.add_argument("out", metavar="OUT", help=text)


def _inspect(parser: ArgumentParser) -> None:
    parser.add_argument("delta", metavar="DELTA", help="a file written by `dtrain compress`")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def _verify(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help=f"the model the delta was made from: {_MODEL}; or {ZEROS}")
    parser.add_argument("delta", metavar="DELTA", help="a file written by `dtrain compress`")


def _advise(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help=f"the model before fine-tuning: {_MODEL}")
    parser.add_argument("finetuned", metavar="FINETUNED", help="the model after it, likewise, or a PEFT LoRA adapter")
    _rules(parser)


def _methods(parser: ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print the table as the README has it")


_ARGUMENTS = {
    "compress": _compress,
    "apply": _apply,
    "inspect": _inspect,
    "verify": _verify,
    "advise": _advise,
    "methods": _methods,
}


def _sentence(message: str, argv: Sequence[str], command: str) -> str:
    """Say in one sentence what the parser says in an indented paragraph of its own words."""
    from dtrain.methods import METHODS

    known = [method.__name__ for method in METHODS]
    name = _named_method(argv)
    if name.isidentifier() and name not in known:
        close = difflib.get_close_matches(name.lower(), [method.lower() for method in known], 1)
        guess = "".join(f" Did you mean {method}?" for method in known if method.lower() in close)
        return f"there is no method {name!r}; the methods are {_listed(known)}.{guess}"
    if found := re.search(r"Option '(.+?)' is not accepted", message):
        return f"{name} has no argument {found[1]!r}. See: dtrain {command} --method.help {name}"
    # The innermost key is the argument; what lies around it repeats the method.
    if found := re.search(r'.*Parser key "(\w+)":.*(?:Got|Given) value: (.*)$', message, re.DOTALL):
        return f"--method.{found[1]} cannot be {found[2]!r}. See: dtrain {command} --method.help {name}"
    if found := re.search(r"argument (\S+): expected one argument", message):
        bare = [word for word, after in pairwise([*argv, "--"]) if word.startswith(found[1]) and after.startswith("--")]
        return f"{(*bare, found[1])[0]} wants a value. See: dtrain {command} --help"
    if found := re.search(r"arguments are required: (.*)$", message):
        return f"{found[1].replace(f'{command}.', '').upper()} is missing. See: dtrain {command} --help"
    flat = re.sub(r'Parser key "(\w+)":', r"--\1:", " ".join(message.split())).rstrip(".")
    return f"{flat}. See: dtrain {command} --help"


def _named_method(argv: Sequence[str]) -> str:
    named = re.findall(r"^--method(?:\.help)?[=\n](.+)$", "\n".join(argv), re.MULTILINE)
    return named[-1] if named else DEFAULT_METHOD


def _listed(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"
