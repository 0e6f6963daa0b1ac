"""The command `compare`: one model under several policies, site by site."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from precision_lab.cli.experiments import Import, Json, Out, Settings
from precision_lab.cli.output import Bar, console, say, show_json
from precision_lab.cli.subjects import Arm, Seed, Subject, Target, find_subject
from precision_lab.policy import Policy

if TYPE_CHECKING:
    from precision_lab.runner.rundir import RunDir
    from precision_lab.telemetry import Comparison, Difference
    from precision_lab.training.looking import Compared

PICTURES = (".png", ".svg", ".pdf", ".html")
By = Literal["local", "cumulative"]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("compare")(compare_command)


def compare_command(
    target: Target,
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", metavar="POLICY", help="What to hold against the reference; repeatable."),
    ] = None,
    reference: Annotated[
        str, typer.Option("--reference", metavar="POLICY", help="What the errors are counted from.")
    ] = "float32",
    arm: Arm = "",
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=0, help="Which checkpoint of a run; 0: what it began with.")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", metavar="N", min=1, help="Held-out examples to run.")] = 64,
    by: Annotated[By, typer.Option("--by", help="The error to sort by, and to draw.")] = "local",
    top: Annotated[int | None, typer.Option("--top", metavar="N", min=1, help="Only the worst N sites.")] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="PATH", help=f"Draw a heat map: {', '.join(PICTURES)}.")
    ] = None,
    settings: Settings = None,
    seed: Seed = None,
    out: Out = Path("runs"),
    imports: Import = None,
    json: Json = False,
) -> None:
    """Compare policies on one model, site by site, worst first: SQNR in dB of each product, by itself and piled up.

    The parameters are those of the last checkpoint where TARGET is a run, else those that training begins with; the
    data are held-out examples. Without --policy it is the run's own that is held against the reference.
    A site with a good local and a bad cumulative error only suffers from others.
    """
    if save is not None and save.suffix not in PICTURES:
        raise ValueError(f"--save {save}: a picture ends in one of {', '.join(PICTURES)}.")
    subject = find_subject(target, out, arm=arm, seed=seed, settings=settings or (), imports=imports or ())
    chosen = [reference, *_held_against(reference, policies, subject)]
    with Bar(None, f"running {subject.name} under {len(chosen)} policies"):
        found = _compared(subject, chosen, step, examples, out)
    sites = worst_first(found.comparison, by)[:top]
    if json:
        show_json(_data(subject, found, sites))
    else:
        _show(subject, found, sites, by)
    if save is not None:
        _save(found.comparison, sites, by, save)
        say(f"wrote {save}")


def _held_against(reference: str, policies: list[str] | None, subject: Subject) -> list[str]:
    """Returns the policies to hold against the reference, each of which is another."""
    from precision_lab.runner.identity import policy_name

    chosen = policies or [policy_name(subject.config.policy)]
    if Policy.parse(reference) in map(Policy.parse, chosen):
        which = f"{reference} is" if policies else f"{subject.name} is in {reference},"
        raise ValueError(f"{which} the reference itself; say what to hold against it, such as --policy bfloat16_mixed.")
    given = dict.fromkeys(str(Policy.parse(one)) for one in chosen)
    if len(given) < len(chosen):
        raise ValueError(f"the same policy is given twice; they are {', '.join(given)}.")
    return chosen


def _compared(subject: Subject, policies: list[str], step: int | None, examples: int, out: Path) -> "Compared":
    """Runs the model under each policy."""
    from precision_lab.runner.parents import StartError, start_from
    from precision_lab.runner.rundir import run_dir
    from precision_lab.training.looking import compare_policies

    if step is not None and subject.run is None and step > 0:
        raise ValueError(f"--step {step}: {subject.name} has no checkpoints; give a run (precision-lab ls).")
    run = subject.run or run_dir(out, subject.config)
    trained = subject.run is not None and step != 0
    if subject.run is not None and trained and _goes_on(subject.run):  # Opening its checkpoints would tidy up there.
        raise ValueError(f"{subject.name} is running; wait until it is done, or give --step 0, what it began with.")
    try:
        start = {} if trained else start_from(run, subject.config)
    except StartError as error:
        raise ValueError(f"{subject.name}: {error}") from None
    folder = run.checkpoints if trained else None
    return compare_policies(subject.config, policies, folder, step=step, examples=examples, **start)


def _goes_on(run: "RunDir") -> bool:
    """Returns whether a run is being executed; one that another machine left behind a while ago is not."""
    return run.is_locked() or run.status()["state"] == "running"


def worst_first(comparison: "Comparison", by: By) -> list[str]:
    """Returns the sites by the lowest SQNR that any policy has there; what the model returns stands last."""
    worst: dict[str, float] = {}
    for row in comparison:
        found: Difference | None = getattr(row, by)
        if row.local is not None and found is not None:
            worst[row.site] = min(worst.get(row.site, math.inf), found.sqnr_db)
    return [*sorted(worst, key=worst.__getitem__), *(site for site in comparison.sites if site not in worst)]


def _data(subject: Subject, found: "Compared", sites: Sequence[str]) -> dict[str, Any]:
    """Returns everything as plain data, worst site first."""
    from precision_lab.runner.metrics import encode_number

    rank = {site: i for i, site in enumerate(sites)}
    rows = sorted(
        (row for row in found.comparison.to_dicts() if row["site"] in rank), key=lambda row: rank[row["site"]]
    )
    return {
        "target": subject.name,
        "reference": found.comparison.reference,
        "step": found.step,
        "examples": found.examples,
        "rows": [{k: encode_number(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
    }


def _show(subject: Subject, found: "Compared", sites: Sequence[str], by: By) -> None:
    """Prints what was compared, one row per site with two columns per policy, and the worst in words."""
    from precision_lab.runner.terminal import text_table

    table, where = found.comparison, console()
    policies = list(dict.fromkeys(row.policy for row in table))
    letters = {policy: chr(ord("A") + i) if len(policies) > 1 else "" for i, policy in enumerate(policies)}
    begun = "the parameters that it begins with" if found.step == 0 else f"its checkpoint of step {found.step}"
    lines = [f"{subject.name}, {begun}, {found.examples} held-out examples; SQNR in dB against {table.reference}"]
    lines += [f"{letter or 'policy'}  {policy}" for policy, letter in letters.items()]
    where.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    heads = [f">{f'{letters[policy]} {kind}'.strip()}" for policy in policies for kind in ("local", "cumulative")]
    rows = [[site, *(_cell(getattr(table.at(site, policy), kind)) for policy in policies
                     for kind in ("local", "cumulative"))] for site in sites]  # fmt: skip
    where.print(text_table(["site", *heads], rows))
    where.print("\n".join(_words(table, policies, by)), markup=False, highlight=False, soft_wrap=True)


def _cell(found: "Difference | None") -> str:
    """Returns an error as dB; "exact" where nothing differs, "lost" where something is not finite."""
    ratio = math.nan if found is None else found.sqnr_db
    return "" if found is None else {math.inf: "exact", -math.inf: "lost"}.get(ratio, f"{ratio:.1f}")


def _in_words(found: "Difference") -> str:
    """Returns an error as dB with its unit."""
    return f"{_cell(found)} dB" if math.isfinite(found.sqnr_db) else _cell(found)


def _words(table: "Comparison", policies: Sequence[str], by: By) -> list[str]:
    """Returns one sentence per policy about its worst site and what the model returns."""
    lines = []
    for policy in policies:
        rows = [row for row in table if row.policy == policy]
        products = [row for row in rows if row.local is not None]
        worst = min(products, key=lambda row: getattr(row, by).sqnr_db, default=None)
        ends = ", ".join(f"{row.site} {_in_words(row.cumulative)}" for row in rows if row.local is None)
        first = f"worst {by} {worst.site} at {_in_words(getattr(worst, by))}; " if worst else ""
        lines.append(f"{policy}: {first}{ends}.")
    return lines


def _save(table: "Comparison", sites: Sequence[str], by: By, path: Path) -> None:
    """Draws a heat map of sites, in program order, by policies."""
    from precision_lab.runner.insides import Inside
    from precision_lab.runner.number_plots import heat_picture

    insides: dict[str, Inside] = {}
    for row in table:
        found = getattr(row, by)
        if row.site in sites and row.local is not None:
            inside = insides.setdefault(row.policy.replace(",", ",\n"), Inside(0))
            inside.sites.append({"site": row.site, "sqnr_db": found.sqnr_db})
    picture = heat_picture(insides)
    if picture is None:
        raise ValueError(f"--save {path}: nothing to draw, since no site has a finite error.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        title = f"<title>{by} SQNR in dB against {table.reference}</title>"
        path.write_text(f'<!doctype html><meta charset="utf-8">{title}{picture.svg}\n', encoding="utf-8")
    else:
        picture.save(path)
