"""The command line: `dtrain compress`, `share`, `apply`, `inspect`, `verify`, `advise`, `methods`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from dtrain.cli.parser import UsageError, parse
from dtrain.errors import DtrainError

__all__ = ["main"]

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `dtrain`; those of the process where None.

    Returns:
        The exit code: 0 done, 1 the work or the check failed, 2 the command line is wrong, 130 interrupted.
    """
    # Idle threads sleep rather than spin: on busy cores the work is several times faster. Only before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except SystemExit:  # after --help or --version
        return DONE
    except UsageError as error:
        return _complain(error, USAGE)
    except DtrainError as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted; no half-written file is left.", INTERRUPTED)
    return DONE


def _run(argv: Sequence[str]) -> None:
    request = parse(argv)
    from dtrain.cli.commands import COMMANDS  # torch comes with it: not before the command line is understood

    outcome = COMMANDS[request.command](**request.arguments)
    if request.json:
        sys.stdout.write(json.dumps(outcome.data, allow_nan=False) + "\n")
    else:
        outcome.show()


def _complain(reason: object, code: int) -> int:
    sys.stderr.write(f"dtrain: {' '.join(str(reason).splitlines())}\n")
    return code
