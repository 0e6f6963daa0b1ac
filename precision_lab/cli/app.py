"""The application: its commands, its exit codes, and errors as one line."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from precision_lab.cli import bench, browse, compare, doctor, experiments, numbers, records, sites
from precision_lab.cli.output import error_console

OK, BAD_INPUT, SOME_FAILED, DIVERGED, PREEMPTED, INTERRUPTED = 0, 2, 3, 4, 75, 130

app = typer.Typer(
    name="precision-lab",
    help="What happens to this model if these tensors have these number formats?",
    epilog="Exit codes: 0 ok, 2 bad input, 3 some runs failed, 4 some diverged, 75 preempted, "
    "130 interrupted; after the last two the same command continues. "
    "PRECISION_LAB_TRACEBACK=1 shows where an error comes from.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
experiments.register(app)
browse.register(app)
records.register(app)
sites.register(app)
compare.register(app)
doctor.register(app)
numbers.register(app)
bench.register(app)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits; bad input is one line on stderr and exit code 2."""
    try:
        app(list(args) if args is not None else None, prog_name="precision-lab")
    except (ValueError, OSError) as error:
        if os.environ.get("PRECISION_LAB_TRACEBACK", "0") not in ("", "0"):
            raise
        complain(error)
    except SystemExit as ended:
        if args is None and ended.code in (PREEMPTED, INTERRUPTED):
            _leave(ended.code)
        raise
    sys.exit(BAD_INPUT)


def _leave(code: int) -> NoReturn:
    """Exits at once: what a signal cut short goes on in threads of XLA's, on which Python's own way out may crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def complain(error: Exception) -> None:
    """Prints an error as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    one_line = " ".join(text.split()) or type(error).__name__
    error_console().print(f"precision-lab: {one_line}", markup=False, highlight=False, soft_wrap=True)
