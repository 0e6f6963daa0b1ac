"""The command `doctor`: what is wrong, or would go wrong, with the number types of a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precision_lab.cli.experiments import Json, Out
from precision_lab.cli.naming import find_run, parse_name, runs_called
from precision_lab.cli.output import Bar, console, show, show_json

if TYPE_CHECKING:
    from precision_lab.telemetry import Diagnosis


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("doctor")(doctor_command)


def doctor_command(
    path: Annotated[
        str, typer.Argument(help="A run or EXPERIMENT::ARM::SEED, a folder of Orbax's, or .npz, .npy, .safetensors.")
    ],
    fmt: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", metavar="NAME", help="Formats to hold it against; repeatable."),
    ] = None,
    against: Annotated[
        str, typer.Option("--against", metavar="PATH", help="An earlier state: which arrays were cast since?")
    ] = "",
    only: Annotated[
        str, typer.Option("--only", metavar="GLOB", help='Only these arrays, as in rules: "params/**".')
    ] = "",
    out: Out = Path("runs"),
    json: Json = False,
) -> None:
    """Look for trouble with number types in a checkpoint: overflow, underflow, misread bits, silent casts.

    Findings in words come first, then one row per array: "exact" says that a format holds every value, "rounds" that
    it holds their range. Of a folder of checkpoints the latest is taken. --format is float16 and bfloat16 by default.
    """
    from precision_lab import formats

    fmts = [formats.format(name).name for name in fmt or ("float16", "bfloat16")]
    place, other = _place(path, out), _place(against, out) if against else None
    with Bar(None, f"reading {place}") as bar:
        from precision_lab import doctor

        state, *earlier = _states([place] if other is None else [place, other], only)
        found = doctor(state, fmts, against=earlier[0] if earlier else None, tell=bar.tell)
    if json:
        show_json(_data(place, other, found))
        return
    for line in found.sentences():
        console().print(line, markup=False, highlight=False, soft_wrap=True)
    _show(found)


def _place(path: str, out: Path) -> Path:
    """Returns the file or folder that a path, or the name of a run, means."""
    if Path(path).exists():
        return Path(path)
    if not parse_name(path).arm and not runs_called(path, out):
        raise ValueError(f"no file or folder {path!r}, and no run of that name in {out}.")
    return find_run(path, out).checkpoints


def _states(places: list[Path], only: str) -> list[dict[str, Any]]:
    """Returns the arrays of each place by path, all or those whose paths match a glob.

    Raises:
      ValueError: none matches.
    """
    from precision_lab.policy.patterns import glob_matches
    from precision_lab.telemetry.doctor import arrays_by_path
    from precision_lab.training.state_files import read_state

    states = []
    for place, arrays in zip(places, arrays_by_path(*map(read_state, places)), strict=True):
        found = {path: x for path, x in arrays.items() if not only or glob_matches(only, path)}
        if arrays and not found:
            first = next(iter(arrays))
            raise ValueError(f"--only {only} matches no array of {place}; the first of {len(arrays)} is {first}.")
        states.append(found)
    return states


def _show(found: "Diagnosis") -> None:
    """Prints the table."""
    from precision_lab.runner.terminal import text_table

    heads = [f">{name}" if name in ("bytes", "amax") else name for name in found.heads()]
    show(text_table(heads, found.cells()), None, as_json=False)


def _data(place: Path, other: Path | None, found: "Diagnosis") -> dict[str, Any]:
    """Returns everything as plain data."""
    from precision_lab.runner.metrics import encode_number

    rows = [{k: encode_number(v) if isinstance(v, float) else v for k, v in row.items()} for row in found.to_dicts()]
    findings = [{"kind": one.kind, "paths": list(one.paths), "text": one.text} for one in found.findings]
    against = None if other is None else str(other)
    return {
        "path": str(place),
        "against": against,
        "formats": list(found.formats),
        "findings": findings,
        "arrays": rows,
    }
