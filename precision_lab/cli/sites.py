"""The command `sites`: what a policy makes of each product, lookup and operation of a model; nothing is executed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from precision_lab.cli.experiments import Import, Json, Out, Settings
from precision_lab.cli.output import Bar, console, show, show_json
from precision_lab.cli.subjects import Arm, Target, find_subject

if TYPE_CHECKING:
    from precision_lab.rewrite import Site, SiteTable


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("sites")(sites_command)


def sites_command(
    target: Target,
    arm: Arm = "",
    policy: Annotated[
        str, typer.Option("--policy", "-p", metavar="POLICY", help="In place of the run's own: a preset or a string.")
    ] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="List every operation on floating arrays, not only products and lookups.")
    ] = False,
    settings: Settings = None,
    out: Out = Path("runs"),
    imports: Import = None,
    json: Json = False,
) -> None:
    """List the sites of a model: each product and lookup, its shapes, and its formats under a policy.

    TARGET is an experiment, a run, or one of the project's models with sizes. Nothing is executed or written. The names
    are what rules of a policy match: "head/**:compute=float32".
    """
    subject = find_subject(target, out, arm=arm, settings=settings or (), imports=imports or ())
    with Bar(None, f"tracing {subject.name}"):
        from precision_lab.training.looking import sites_of

        table = sites_of(subject.config, policy or None, everything=everything)
    if json:
        show_json({"target": subject.name, "policy": table.policy, "sites": table.to_dicts()})
        return
    console().print(f"{subject.name}, policy {table.policy}", markup=False, highlight=False, soft_wrap=True)
    _show(table)
    console().print("\n".join(sentences(table)), markup=False, highlight=False, soft_wrap=True)


def _show(table: "SiteTable") -> None:
    """Prints one row per site."""
    from precision_lab.runner.terminal import text_table

    heads = ["site", "kind", "operands", "result", ">Mflop", "compute", "accum", "settings"]
    rows = [
        (
            site.name,
            kind(site),
            " ".join(site.operands),
            site.out,
            f"{site.flops / 1e6:.3g}" if site.is_product else "",
            site.compute.name if site.compute else "",
            str(site.accum) if site.accum else "",
            site.settings,
        )
        for site in table
    ]
    show(text_table(heads, rows), None, as_json=False)


def kind(site: "Site") -> str:
    """Returns what a site is: a product, a convolution, a lookup in a parameter, or the name of its operation."""
    names = {"dot_general": "product", "conv_general_dilated": "convolution"}
    return "lookup" if site.op == "gather" and site.has_parameter else names.get(site.op, site.op)


def sentences(table: "SiteTable") -> list[str]:
    """Returns in words how much of the work runs in which format, and what the policy leaves alone."""
    products = [site for site in table if site.is_product]
    total = sum(site.flops for site in products) or 1
    formats: dict[str, float] = {}
    for site in products:
        name = site.compute.name if site.compute else "as written"
        formats[name] = formats.get(name, 0) + site.flops / total
    shares = ", ".join(f"{100 * share:.3g} % in {name}" for name, share in formats.items())
    work = f"; of the work of the products {shares}" if products else ""
    lines = [f"{len(table)} sites, {len(products)} of them products{work}."]
    lines += [f"left alone: {site.name} ({site.reason})" for site in table.untouched if site.is_product]
    return lines
