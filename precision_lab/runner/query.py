"""SQL over the records of all runs, by duckdb in memory; nothing on disk is locked or changed.

    metrics   one row per run, step and split: run_id, step, split, attempt, and a column for each metric (`loss`)
    runs      one row per run: state, configuration under dotted keys (`"optim.lr"`), last metrics (`"eval/loss"`)
    arms      which run serves which experiment, arm and seed

Numbers that are not finite are NaN and infinities, as duckdb has them; a torn last line counts for nothing.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precision_lab.runner.metrics import read_rows
from precision_lab.runner.rundir import TRIALS
from precision_lab.runner.store import Store, quoted_names

if TYPE_CHECKING:
    import duckdb

_LABELS = ("run_id", "step", "split", "attempt")
_FORMATS = {".csv": "(format csv, header)", ".parquet": "(format parquet)"}


def query(out: Path, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Returns the names of the columns and the rows that a query gives.

    Args:
      out: folder of all results.
      sql: one statement about `metrics`, `runs` and `arms`; dotted keys and metrics need no quotes.

    Raises:
      ValueError: no such folder, or duckdb refuses the query; one line.
    """
    with _connected(out) as (db, names):
        found = _executed(db, quoted_names(sql, names))
        return [one[0] for one in found.description or ()], found.fetchall()


def save(out: Path, sql: str, path: Path) -> None:
    """Writes what a query gives to a .csv or .parquet file.

    Raises:
      ValueError: another kind of file, or a query that duckdb refuses.
    """
    if path.suffix not in _FORMATS:
        raise ValueError(f"a query is saved as .csv or .parquet, got {str(path)!r}.")
    with _connected(out) as (db, names):
        target = str(path).replace("'", "''")
        _executed(db, f"copy ({quoted_names(sql.strip().rstrip(';'), names)}) to '{target}' {_FORMATS[path.suffix]}")


def _executed(db: "duckdb.DuckDBPyConnection", sql: str) -> "duckdb.DuckDBPyConnection":
    """Returns the result of a query; what duckdb says about a mistake becomes one line."""
    import duckdb

    try:
        statements = db.extract_statements(sql)
        if len(statements) != 1 or duckdb.ExpectedResultType.QUERY_RESULT not in statements[0].expected_result_type:
            raise ValueError(f"query: expected one statement that gives rows, such as SELECT, got {sql!r}.")
        return db.execute(sql)
    except duckdb.Error as error:
        raise ValueError(f"query: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _connected(out: Path) -> Iterator[tuple["duckdb.DuckDBPyConnection", list[str]]]:
    """Gives a connection with the three tables, and the names that may need quotes."""
    import duckdb

    if not Path(out).is_dir():
        raise ValueError(f"no results in {out}; precision-lab run TARGET makes some.")
    with Store(Path(out)) as store:
        runs, arms, columns = store.rows(), store.arms(), store.columns
    with tempfile.TemporaryDirectory() as scratch, duckdb.connect(":memory:") as db:
        db.execute("set autoinstall_known_extensions = false; set autoload_known_extensions = false")
        _table(db, "runs", columns, runs, Path(scratch))
        _table(db, "arms", ["experiment", "arm", "seed", "run_id"], arms, Path(scratch))
        _metrics(db, Path(out), [name.partition("/")[2] for name in columns if "/" in name])
        yield db, [name for name in columns if not name.isidentifier()]


def _table(
    db: "duckdb.DuckDBPyConnection", name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], scratch: Path
) -> None:
    """Makes a table of plain rows, which go through a file because that is how duckdb reads quickly."""
    kinds = {column: _kind([row[column] for row in rows if column in row]) for column in columns}
    listed = ", ".join(f'try_cast("{column}" as {kind}) as "{column}"' for column, kind in kinds.items())
    if not rows:
        empty = ", ".join(f'null::{kind} as "{column}"' for column, kind in kinds.items())
        db.execute(f"create table {name} as select {empty} limit 0")
        return
    path = scratch / f"{name}.jsonl"
    path.write_text("".join(json.dumps({k: str(v) for k, v in row.items()}) + "\n" for row in rows), encoding="utf-8")
    typed = ", ".join(f"'{column}': 'VARCHAR'" for column in columns)
    db.execute(f"create table {name} as select {listed} from read_json('{path}', columns={{{typed}}}, format='nd')")


def _kind(values: Sequence[Any]) -> str:
    """Returns duckdb's type for the values of a column; a metric's "nan" counts as a number."""
    kinds = {float if value == "nan" else type(value) for value in values}
    if kinds <= {int}:
        return "BIGINT"
    return "DOUBLE" if kinds <= {int, float} else "VARCHAR"


def _metrics(db: "duckdb.DuckDBPyConnection", out: Path, metrics: Sequence[str]) -> None:
    """Makes the view of all records; of rows for one step and split the last attempt's counts."""
    names = [name for name in dict.fromkeys(metrics) if name not in _LABELS]
    if not any((out / TRIALS).glob("*/metrics.jsonl")):
        empty = "".join(f', null::double as "{name}"' for name in names)
        db.execute(f"create view metrics as select '' as run_id, 0 as step, '' as split, 1 as attempt{empty} limit 0")
        return
    # Read as text: JSON has no NaN, and a metric that is once the text "nan" would make the whole column text.
    typed = "".join(f", '{name}': 'VARCHAR'" for name in names)
    numbers = "".join(f', try_cast("{name}" as double) as "{name}"' for name in names)
    files = str(out / TRIALS / "*" / "metrics.jsonl").replace("'", "''")
    db.execute(
        f"create view metrics as select parse_path(filename)[-2] as run_id, step, split, attempt{numbers} from "
        f"read_json('{files}', columns={{'step': 'BIGINT', 'split': 'VARCHAR', 'attempt': 'BIGINT'{typed}}}, "
        "format='nd', ignore_errors=true, filename=true) where step is not null and split is not null "
        "qualify row_number() over (partition by filename, step, split order by attempt desc) = 1"
    )


def export(run: Path, to: str, path: Path) -> Path:
    """Writes the record of one run as `csv`, `parquet` or `npz`, and returns where.

    CSV and Parquet have one row per step and split; npz has for each metric its values, `eval/loss`, and its steps,
    `eval/loss:step`.

    Raises:
      ValueError: the run has logged nothing, or another format.
    """
    from precision_lab.runner.metrics import series

    rows = read_rows(run / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run.name} has logged nothing.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if to == "npz":
        import numpy as np

        found = series(rows)
        steps = {f"{name}:step": np.asarray(one.steps, np.int64) for name, one in found.items()}
        np.savez(path, **{name: np.asarray(one.values, np.float64) for name, one in found.items()}, **steps)  # type: ignore[arg-type]
        return path
    if to not in ("csv", "parquet"):
        raise ValueError(f"a run is exported to csv, parquet or npz, got {to!r}.")
    names = sorted({key for row in rows for key in row} - set(_LABELS))
    listed = ", ".join(f'"{name}"' for name in ("run_id", "step", "split", "attempt", *names))
    with _of_one(run, names) as db:
        target = str(path).replace("'", "''")
        db.execute(f"copy (select {listed} from metrics order by step, split) to '{target}' {_FORMATS[f'.{to}']}")
    return path


@contextlib.contextmanager
def _of_one(run: Path, names: Sequence[str]) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Gives a connection whose `metrics` are those of one run."""
    import duckdb

    with tempfile.TemporaryDirectory() as scratch, duckdb.connect(":memory:") as db:
        link = Path(scratch) / TRIALS / run.name
        link.mkdir(parents=True)
        (link / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
        _metrics(db, Path(scratch), names)
        yield db
