"""The commands about numbers: `formats`, `bits` and `memory`. None of them needs JAX, a model or data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from precision_lab import formats
from precision_lab.cli.model_memory import Described, activation_bytes, count_parameters, parse_model
from precision_lab.formats import memory as accounting
from precision_lab.formats.inspect import Inspection, inspect
from precision_lab.formats.options import OVERFLOWS, SUBNORMALS
from precision_lab.formats.pictures import exponent_window, number_line
from precision_lab.formats.scalar import SPECIALS, Format
from precision_lab.policy import PRESETS, Policy

_WEIGHT_FORMATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4")
# One value has no random bits.
_ROUNDINGS = [rounding for rounding in formats.ROUNDINGS if rounding != "stochastic"]
# Formats of at most this many bits are of no use without scales.
_NEEDS_SCALES_BITS = 8

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    app.command("formats")(formats_command)
    # Else "-0.1" would be taken for an option; a short option of `bits` would be found in "-inf".
    app.command("bits", context_settings={"ignore_unknown_options": True})(bits_command)
    app.command("memory")(memory_command)


def formats_command(
    name: Annotated[str | None, typer.Argument(help="A format, such as float8_e4m3fn, bf16 or e5m3.")] = None,
    as_json: Json = False,
) -> None:
    """Show the table of number formats, or all facts about one of them."""
    if name is None:
        rows = [facts(fmt) for fmt in formats.FORMATS.values()]
        composed = [composed_facts(fmt) for fmt in formats.REGISTERED.values()]
        pages = [_formats_table(), *([_composed_table(composed)] if composed else [])]
        _print(pages, rows + composed, as_json)
    else:
        fmt = formats.format(name)
        if isinstance(fmt, Format):
            _print(_facts_page(fmt), facts(fmt), as_json)
        else:
            _print(_composed_page(fmt), composed_facts(fmt), as_json)


def bits_command(
    value: Annotated[str, typer.Argument(help="A number: 0.1, 1/3, -3e-5, 0x1.8p-3, inf, nan. Taken exactly.")],
    fmt: Annotated[str, typer.Option("--format", help="The format to store it in.")] = "float32",
    rounding: Annotated[str, typer.Option(help=f"One of {', '.join(_ROUNDINGS)}.")] = "nearest_even",
    overflow: Annotated[str | None, typer.Option(help=f"One of {', '.join(OVERFLOWS)}.")] = None,
    subnormals: Annotated[str, typer.Option(help=f"One of {', '.join(SUBNORMALS)}.")] = "keep",
    as_json: Json = False,
) -> None:
    """Show how a value is stored in a format: fields, exact value, error, neighbours."""
    found = inspect(value, fmt, rounding=rounding, overflow=overflow, subnormals=subnormals)
    _print(_bits_page(value, found), inspection_facts(found), as_json)


def memory_command(
    params: Annotated[
        str | None, typer.Option("--params", "-n", help="Number of parameters: 70e9, 70B, 350M; or give --model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model of the project and sizes: transformer, transformer:width=256,depth=4.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples in a batch, for the activations of --model.", min=1)] = 32,
    fmt: Annotated[list[str] | None, typer.Option("--format", help="Weight formats to list; repeatable.")] = None,
    group: Annotated[
        int, typer.Option(help="Weights that share one scale, for formats of at most 8 bits without scales.")
    ] = 32,
    scale_format: Annotated[str, typer.Option(help="Format of the scales.")] = "float32",
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Policies to list for training; repeatable.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(accounting.OPTIMIZER_SLOTS)}.")] = "adam",
    master: Annotated[str | None, typer.Option(help="Format of master weights, if the optimizer keeps them.")] = None,
    moments: Annotated[
        str | None, typer.Option(help="Format of the optimizer's state; by default that of what it updates.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what parameters take in each format, and what training them takes; activations for --model only."""
    if (params is None) == (model is None):
        raise ValueError("give the number of parameters, --params 70e9, or --model transformer; one of them.")
    described = None if model is None else parse_model(model)
    count = accounting.parse_count(str(params)) if described is None else count_parameters(described)
    stored = [_storage_facts(count, each, group, scale_format) for each in fmt or _WEIGHT_FORMATS]
    trained = [
        _training_facts(count, each, optimizer, master, moments, _activations(described, each, batch))
        for each in policy or PRESETS
    ]
    what = "activations not included"
    if described is not None:
        what = f"activations of {batch} examples of {described.data} as differentiation keeps them"
    pages = [
        _sizes(f"{count:,} parameters, stored", stored),
        _sizes(f"... and trained with {optimizer}, {what}", trained),
    ]
    _print(pages, {"parameters": count, "weights": stored, "training": trained}, as_json)


def facts(fmt: Format) -> dict[str, Any]:
    """Returns everything about `fmt` as JSON types."""
    return {
        "name": fmt.name,
        "kind": fmt.kind,
        "bits": fmt.bits,
        "storage_bits": fmt.storage_bits,
        "exponent_bits": fmt.exponent_bits,
        "mantissa_bits": fmt.mantissa_bits,
        "bias": fmt.bias,
        "max": fmt.max,
        "min": fmt.min,
        "min_normal": fmt.min_normal,
        "min_subnormal": fmt.min_subnormal,
        "eps": fmt.eps,
        "digits": round(fmt.digits, 2),
        "specials": fmt.specials,
        "has_inf": fmt.has_inf,
        "has_nan": fmt.has_nan,
        "has_negative_zero": fmt.has_negative_zero,
        "has_zero": fmt.has_zero,
        "signed": fmt.signed,
        "overflow": fmt.native_overflow,
        "dtype": fmt.dtype.name if fmt.dtype is not None else None,
        "source": fmt.source,
    }


def composed_facts(fmt: Any) -> dict[str, Any]:
    """Returns what there is to know about a codebook or block format, as JSON types."""
    told = {field.name: getattr(fmt, field.name) for field in dataclasses.fields(fmt)}
    told = {"name": fmt.name, "kind": fmt.kind, "bits": fmt.bits, "storage_bits": fmt.storage_bits, **told}
    return {key: _plain(fact) for key, fact in told.items()}


def _plain(fact: Any) -> Any:
    """Returns a fact as a JSON type."""
    if isinstance(fact, (tuple, list)):
        return [_plain(each) for each in fact]
    return fact if fact is None or isinstance(fact, (bool, int, float, str)) else str(fact)


def inspection_facts(found: Inspection) -> dict[str, Any]:
    """Returns an inspection as JSON types; infinities and NaN are strings."""
    given, error = found.given, found.error
    return {
        "format": found.format.name,
        "given": str(given),
        "value": _json_number(found.value),
        "category": found.category,
        "code": f"{found.code:#0{2 + -(-found.format.bits // 4)}x}",
        "sign": found.sign,
        "exponent": found.exponent,
        "mantissa": found.mantissa,
        "scale_exponent": found.scale_exponent,
        "error": None if error is None else str(error),
        "relative_error": _json_number(found.relative_error),
        "error_in_ulp": _json_number(found.error_in_ulp),
        "ulp": found.ulp,
        "below": _json_number(found.below),
        "above": _json_number(found.above),
    }


def _json_number(number: float | None) -> float | str | None:
    """Returns `number`, or its name where JSON has no number for it."""
    return number if number is None or math.isfinite(number) else str(number)


def _formats_table() -> Table:
    """Returns the catalogue as a table."""
    table = Table(
        title="Number formats", caption="Details: precision-lab formats NAME. Also eXmY, intN, uintN and fixedN.F."
    )
    for heading in (
        "format",
        "bits",
        "E/M",
        "max",
        "min normal",
        "min subnormal",
        "eps",
        "digits",
        "specials",
        "dtype",
    ):
        table.add_column(heading, justify="left" if heading in ("format", "specials", "dtype") else "right")
    for fmt in formats.FORMATS.values():
        numbers = [f"{number:.6g}" for number in (fmt.max, fmt.min_normal, fmt.min_subnormal, fmt.eps)]
        widths = f"{fmt.exponent_bits}/{fmt.mantissa_bits}"
        dtype = fmt.dtype.name if fmt.dtype is not None else "-"
        table.add_row(fmt.name, str(fmt.bits), widths, *numbers, f"{fmt.digits:.2f}", fmt.specials, dtype)
    return table


def _composed_table(rows: list[dict[str, Any]]) -> Table:
    """Returns codebooks and block formats as a table."""
    return _table(
        "Codebooks and blocks", [{key: row[key] for key in ("name", "kind", "bits", "source")} for row in rows]
    )


def _composed_page(fmt: Any) -> list[Any]:
    """Returns all facts about a codebook or block format, with a picture of its values if they are few."""
    table = _fields(fmt.name)
    for key, fact in composed_facts(fmt).items():
        if key != "name":
            table.add_row(key.replace("_", " "), "-" if fact is None else str(fact))
    drawn = fmt if hasattr(fmt, "grid") else getattr(fmt, "element", None)
    return [table, *(_values_page(drawn) if drawn is not None else [])]


def _values_page(fmt: Any) -> list[Text]:
    """Returns the number line of a format that is narrow enough for one."""
    if fmt.bits > _NEEDS_SCALES_BITS:
        return []
    return [Text("\nvalues, to scale (. one in a cell, : two, | more)"), Text(number_line(fmt))]


def _facts_page(fmt: Format) -> list[Any]:
    """Returns all facts about one format, with its pictures."""
    table = _fields(fmt.name)
    for key, fact in facts(fmt).items():
        if key not in ("name", "has_inf", "has_nan", "has_negative_zero", "has_zero", "signed"):
            table.add_row(key.replace("_", " "), "-" if fact is None else str(fact))
    table.add_row("", SPECIALS[fmt.specials])
    pages: list[Any] = [table]
    if fmt.kind == "float":
        pages += [Text("\nexponents, as powers of two (- subnormal, = normal)"), Text(exponent_window(fmt))]
    return pages + _values_page(fmt)


def _bits_page(given: str, found: Inspection) -> list[Any]:
    """Returns an inspection for reading."""
    fields = Text.assemble((found.sign, "bold red"), " ", (found.exponent, "bold green"), " ", (found.mantissa, "cyan"))
    table = _fields(f"{given} in {found.format.name}")
    code = inspection_facts(found)["code"]
    rows: Iterable[tuple[str, Any]] = (
        ("bits" if found.format.kind == "int" else "sign exponent mantissa", fields),
        ("code", code),
        ("category", found.category),
        ("value", repr(found.value)),
        ("exactly", _exact(found)),
        ("error", _error(found)),
        ("ulp", "-" if found.ulp is None else repr(found.ulp)),
        ("below", "-" if found.below is None else repr(found.below)),
        ("above", "-" if found.above is None else repr(found.above)),
    )
    for label, text in rows:
        table.add_row(label, text)
    return [table]


def _exact(found: Inspection) -> str:
    """Returns a finite value as an integer times a power of two."""
    if not math.isfinite(found.value):
        return "-"
    value = Fraction(found.value)
    exponent = 1 - value.denominator.bit_length()
    return f"{value.numerator} * 2^{exponent}" if exponent else str(value.numerator)


def _error(found: Inspection) -> str:
    """Returns what rounding changed, in words."""
    if found.error is None:
        return "-"
    if found.error == 0:
        return "0 (exact)"
    ulps = found.error_in_ulp or 0.0
    where = "" if abs(ulps) <= 1 else ", beyond the largest value"
    return f"{ulps:+.4g} ulp, relative {found.relative_error or 0.0:.3g}{where}"


def _storage_facts(count: int, fmt: str, group: int, scale_format: str) -> dict[str, Any]:
    """Returns one row about stored weights."""
    plain = accounting.storage(count, fmt)
    own = plain.format if isinstance(plain.format, formats.BlockFormat) else None
    scaled = own is None and plain.format.bits <= _NEEDS_SCALES_BITS
    true = accounting.storage(count, fmt, group=group if scaled else None, scale_format=scale_format)
    if own is not None:
        scales = f"{own.scale} per {'x'.join(map(str, own.block))}"
    else:
        scales = f"{formats.format(scale_format).name} per {group}" if scaled else "-"
    return {
        "format": plain.format.name,
        "bits_per_parameter": plain.format.storage_bits if own is None else own.element.bits,
        "values_gb": _gb(plain.value_bytes),
        "scales": scales,
        "true_bits_per_parameter": true.bits_per_value,
        "total_gb": _gb(true.total_bytes),
    }


def _activations(model: Described | None, policy: str, batch: int) -> int | None:
    """Returns the bytes of a model's activations under a policy; None without a model."""
    return None if model is None else activation_bytes(model, policy, batch=batch)


def _training_facts(
    count: int, policy: str, optimizer: str, master: str | None, moments: str | None, activations: int | None
) -> dict[str, Any]:
    """Returns one row about training under a policy."""
    parsed = Policy.preset(policy) if policy in PRESETS else Policy.parse(policy)
    use = accounting.training_memory(
        count, params=parsed.params, compute=parsed.compute, master=master, moments=moments, optimizer=optimizer
    )
    return {
        "policy": policy,
        "params_gb": _gb(use.parameters),
        "compute_copy_gb": _gb(use.compute_copy),
        "master_gb": _gb(use.master),
        "gradients_gb": _gb(use.gradients),
        "optimizer_gb": _gb(use.optimizer),
        **({} if activations is None else {"activations_gb": _gb(activations)}),
        "total_gb": _gb(use.total_bytes + (activations or 0)),
        "bytes_per_parameter": use.total_bytes / count,
    }


def _sizes(title: str, rows: list[dict[str, Any]]) -> Table:
    """Returns rows of sizes as a table, in MB where all are below 1 GB."""
    if max(row["total_gb"] for row in rows) >= 1:
        return _table(f"{title} (GB = 10^9 bytes)", rows)
    small = [{key.replace("_gb", "_mb"): 1e3 * row[key] if "_gb" in key else row[key] for key in row} for row in rows]
    return _table(f"{title} (MB = 10^6 bytes)", small)


def _gb(size_bytes: int) -> float:
    """Returns bytes in units of 10**9 bytes."""
    return size_bytes / 1e9


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Returns rows of equal keys as a table headed by the keys."""
    table = Table(title=title, title_justify="left")
    for key, cell in rows[0].items():
        heading = key.replace("_gb", " GB").replace("_mb", " MB").replace("_", " ")
        table.add_column(heading, justify="left" if isinstance(cell, str) else "right")
    for row in rows:
        table.add_row(*(f"{cell:,.6g}" if isinstance(cell, (int, float)) else cell for cell in row.values()))
    return table


def _fields(title: str) -> Table:
    """Returns an empty two-column table for labels and what they say."""
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _print(page: Any, data: Any, as_json: bool) -> None:
    """Prints a page for reading, or the data behind it as JSON."""
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for part in page if isinstance(page, list) else [page]:
        console.print(part)
