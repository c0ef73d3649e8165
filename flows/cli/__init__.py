"""The command line. Exit codes: 0 done, 2 the input is wrong (one line says how to mend it), 1 our fault, or our
server's that died.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import NoReturn, Sequence

from mergeline.flows.cli.grammar import parse
from mergeline.flows.ending import (
    ENDED_BY_SIGINT,
    ENDED_BY_SIGTERM,
    SERVER_DIED,
    ServerDied,
    Terminated,
)
from mergeline.merging.errors import UserError
from mergeline.tasks.extras import missing_ones_named

# What a stream says, naming no file, that cannot take what is printed.
_UNPRINTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_IN_HASTE = (SERVER_DIED, ENDED_BY_SIGINT, ENDED_BY_SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what bad input raises becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding has not
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        with missing_ones_named():
            args.run(args)
        if sys.stdout:  # none where it was closed
            sys.stdout.flush()
    except UserError as error:
        print(f"mergeline: {error}", file=sys.stderr)
        return 2
    except ServerDied as error:
        print(f"mergeline: {error}", file=sys.stderr)
        return SERVER_DIED
    except KeyboardInterrupt as signalled:
        print("mergeline: stopped; what was finished is kept, run again to go on", file=sys.stderr)
        return ENDED_BY_SIGTERM if isinstance(signalled, Terminated) else ENDED_BY_SIGINT
    except BrokenPipeError:
        _drop_stdout()
    except OSError as error:
        if error.filename is not None or error.errno not in _UNPRINTED:
            raise
        _drop_stdout()
        print(f"mergeline: the output cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


def _drop_stdout() -> None:
    """Let what is still to be printed go nowhere, so that the end of the process does not fail, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command() -> NoReturn:
    """What `mergeline` runs: `main`, and the end of the process."""
    os.environ["PYTHONSAFEPATH"] = (
        "1"  # for processes that it starts: files of the current folder are no modules
    )
    code = main()
    if code in _IN_HASTE or "torch" in sys.modules and not {"mlflow", "prefect"} & sys.modules.keys():
        # Taking torch down takes half a second and 120 MB; nothing but text is left to be written here. After a signal
        # threads may still compute, and would be waited for; those who talk to a server that died try for long.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
