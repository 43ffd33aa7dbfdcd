"""From command-line words to a command and its arguments; torch is imported only where a method is asked for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from dtrain.cli.wording import DEFAULT_METHOD, listed, sentence
from dtrain.errors import DtrainError

#: The commands and what they do, in the order in which `--help` lists them.
SUMMARIES = {
    "compress": "Compress what fine-tuning changed into one small file.",
    "share": "Compress what several fine-tunes of one base have in common.",
    "apply": "Write the fine-tuned checkpoint that a base and a delta make.",
    "inspect": "Show what a delta file holds and what every part of it costs.",
    "verify": "Check every byte of a delta file, and that a model is its base.",
    "advise": "Measure what fine-tuning changed and say which method suits it, and why.",
    "methods": "List the compression methods.",
}

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
without the base, bit for bit (integers), left at the base (embeddings), by
the method (matrices that are included and not excluded), as a delta of a few
bits (norms and biases), or, all the rest, as a delta in half precision."""

_TEXTS = """\
For methods that are fitted to inputs or look at them. FINETUNED is then the
Hugging Face folder of a text model, with its tokenizer; it is run from local
files, without any code that comes with it. Give texts of the training set."""

_REFERS = "the file of `dtrain share` that DELTA refers to (default: the one in its folder that has the right hash)"

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
        raise UsageError(f"{found}; the commands are {listed(SUMMARIES)}. Try: dtrain --help")
    parser = _parser(command)
    try:
        options = parser.parse_args(_with_method(_with_file(argv), command))
        arguments: dict[str, Any] = vars(cast("object", parser.instantiate(options)[command]))
    except argparse.ArgumentError as error:
        raise UsageError(sentence(str(error), argv, command)) from error
    except DtrainError as error:  # the method refuses an argument
        raise UsageError(str(error)) from error
    as_json = bool(arguments.pop("json"))
    return Request(command, arguments, as_json)


def _with_file(argv: Sequence[str]) -> list[str]:
    """Spell `--calibration FILE` as the parser knows it: for it, a name that has others under it takes no value."""
    return [re.sub(r"^--calibration(?=$|=)", "--calibration.file", word) for word in argv]


def _with_method(argv: Sequence[str], command: str) -> list[str]:
    """Name the default method where none is named.

    As a default of the argument, its own arguments would pass to whatever other method is named.
    """
    named = any(word.partition("=")[0] in ("--method", "--method.help") for word in argv)
    if command not in ("compress", "share") or named:
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
    "                       [--method.ARGUMENT VALUE ...] [--fit NAME]\n"
    "                       [--fit.ARGUMENT VALUE ...] [--calibration FILE]\n"
    "                       [--calibration.ARGUMENT VALUE ...] [--objective NAME]\n"
    "                       [--shared FILE] [--include P ...] [--exclude P ...]\n"
    "                       [--whole P ...] [--drop P ...] [--embeddings P ...]\n"
    "                       [--vectors CODE] [--fresh CODE] [--json]",
    "share": "dtrain share BASE FINETUNED FINETUNED ... OUT [--merge mean|elect]\n"
    "                    [--method NAME] [--method.ARGUMENT VALUE ...]\n"
    "                    [--include P ...] [--exclude P ...] [--whole P ...]\n"
    "                    [--drop P ...] [--json]",
    "apply": "dtrain apply BASE DELTA OUT [--shared FILE] [--json]",
    "inspect": "dtrain inspect DELTA [--tensors] [--shared FILE] [--json]",
    "verify": "dtrain verify BASE DELTA [--shared FILE] [--json]",
    "advise": "dtrain advise BASE FINETUNED [--include P ...] [--exclude P ...]\n"
    "                     [--whole P ...] [--drop P ...] [--embeddings P ...]\n"
    "                     [--vectors CODE] [--fresh CODE] [--json]",
    "methods": "dtrain methods [--markdown] [--json]",
}


def _compress(parser: ArgumentParser) -> None:
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
    _method(parser)
    _fit(parser)
    _shared(parser, "where the method is Dbms with --method.source shared: the file of `dtrain share`")
    _rules(parser)


def _share(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help=f"the model before fine-tuning: {_MODEL}")
    text = "two models after it or more, likewise, or the folders of PEFT LoRA adapters"
    parser.add_argument("finetuned", metavar="FINETUNED", nargs="+", help=text)
    parser.add_argument(
        "out", metavar="OUT", help="the shared file to write: *.safetensors, in the folder of the deltas"
    )
    parser.add_argument(
        "--merge",
        type=Literal["mean", "elect"],
        default="mean",
        help="the mean of their changes, or for each weight the sign of the sum and the greatest change of this sign",
    )
    _method(parser)
    _rules(parser)


def _method(parser: ArgumentParser) -> None:
    from dtrain.methods import METHODS, Method

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        type=Method,
        metavar="NAME",
        help=f"{listed([method.__name__ for method in METHODS])}; `dtrain methods` says what they are. "
        f"Default: {DEFAULT_METHOD} with its own defaults, which keeps 10 %% of the delta and needs no data.",
    )


def _fit(parser: ArgumentParser) -> None:
    from dtrain.fit import FITS, Fit

    parser.add_argument_group("fit").add_argument(
        "--fit",
        type=Fit,
        metavar="NAME",
        help=f"how scales are found after encoding: {listed([fit.__name__ for fit in FITS])}. Default: the method's "
        "own way, which is none for most.",
    )
    data = parser.add_argument_group("training inputs", description=_TEXTS)
    data.add_argument(
        "--calibration.file", metavar="FILE", help="--calibration FILE for short: .parquet, .jsonl or .txt with texts"
    )
    data.add_argument(
        "--calibration.column",
        nargs="+",
        metavar="C",
        help="the column they are in, or the two of pairs (default: the pairs of GLUE by their names, the only one "
        "with text, or one named text or sentence)",
    )
    samples = "texts that are looked at, always the same ones, spread evenly over the file (default: 128)"
    data.add_argument("--calibration.samples", type=PositiveInt, default=128, metavar="N", help=samples)
    batch = "texts at a time; longer ones are cut after 512 tokens (default: 32)"
    data.add_argument("--calibration.batch", type=PositiveInt, default=32, metavar="N", help=batch)
    device = "where the model runs: cpu, cuda, ... (default: cpu)"
    data.add_argument("--calibration.device", default="cpu", metavar="D", help=device)
    data.add_argument(
        "--objective",
        type=Literal["hidden", "mse", "top", "kl"],
        help="what a fit keeps as the fine-tuned model has it: the last hidden state (default for encoders), all "
        "logits, the five greatest of them (default for models that write text), or the distribution they stand for",
    )


def _rules(parser: ArgumentParser) -> None:
    from dtrain.rules import FreshCode, VectorCode

    rules = parser.add_argument_group("which tensors", description=_PATTERNS)
    for name, text in {
        "include": "tensors the method may compress (default: all)",
        "exclude": "tensors the method must leave alone; the delta of a matrix is kept in half precision",
        "whole": "fresh tensors, stored without the base (default: the usual names of task heads; none with no "
        "pattern)",
        "drop": "tensors that stay at the base: their delta is thrown away",
        "embeddings": "token embeddings, which stay at the base as well where they fit it (default: the "
        "word_embeddings of encoders; with no pattern the method compresses them)",
    }.items():
        rules.add_argument(f"--{name}", nargs="*", metavar="P", help=text)
    for name, code, text in (
        ("vectors", VectorCode, "how the deltas of norms and biases are stored"),
        ("fresh", FreshCode, "how fresh matrices are stored"),
    ):
        default, *others = get_args(code)
        text = f"{text}: {default} (default), {listed(others)}"
        rules.add_argument(f"--{name}", choices=[default, *others], metavar="CODE", help=text)


def _apply(parser: ArgumentParser) -> None:
    _verify(parser)
    text = f"the .safetensors file to write, which may be BASE; where BASE is {ZEROS}, the folder for PEFT"
    parser.add_argument("out", metavar="OUT", help=text)


def _inspect(parser: ArgumentParser) -> None:
    parser.add_argument("delta", metavar="DELTA", help="a file written by `dtrain compress`")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    _shared(parser)


def _verify(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help=f"the model the delta was made from: {_MODEL}; or {ZEROS}")
    parser.add_argument("delta", metavar="DELTA", help="a file written by `dtrain compress`")
    _shared(parser)


def _shared(parser: ArgumentParser, text: str = _REFERS) -> None:
    parser.add_argument("--shared", metavar="FILE", help=text)


def _advise(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help=f"the model before fine-tuning: {_MODEL}")
    parser.add_argument("finetuned", metavar="FINETUNED", help="the model after it, likewise, or a PEFT LoRA adapter")
    _rules(parser)


def _methods(parser: ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print the table as the README has it")


_ARGUMENTS = {
    "compress": _compress,
    "share": _share,
    "apply": _apply,
    "inspect": _inspect,
    "verify": _verify,
    "advise": _advise,
    "methods": _methods,
}
