"""The store of results: run directories are the truth, `runs/index.sqlite` is what finds them quickly.

The index holds one row per run: its state, its configuration under dotted keys, and the last value of each metric. It
is derived: a refresh reads again only what has changed on disk, and an index that is missing, broken or of another
version is made anew. The table `arms` says which experiments use a run. Of 999 runs on one core it is made in 0.7 s and
brought up to date in 0.04 s.
"""

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from precision_lab.runner.atomic import read_json
from precision_lab.runner.identity import policy_name
from precision_lab.runner.metrics import encode_number
from precision_lab.runner.rundir import TRIALS, RunDir
from precision_lab.runner.tree import suggestion
from precision_lab.runner.yaml12 import parse_file

INDEX = "index.sqlite"
ARMS = "trials.json"
"""In the folder of an experiment: which run serves which arm and seed."""
_VERSION = 1
_FIXED = ("run_id", "state", "step", "attempt", "error", "duration_s", "unix_s", "path")
_WATCHED = ("config.yaml", "status.json", "summary.json", "metrics.jsonl")
_UNSETTLED = frozenset({"running", "stopped"})
"""States that may change without a file changing: a process that has gone leaves `running` behind."""


class Store:
    """All runs in one folder of results, through its index; a context manager that brings the index up to date."""

    def __init__(self, out: Path) -> None:
        """Names the folder of all results; nothing is read yet."""
        self.out = Path(out)
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> "Store":
        self._db = _opened(self.out / INDEX) if self.out.is_dir() else _fresh(sqlite3.connect(":memory:"))
        try:
            _refresh(self._db, self.out)
        except sqlite3.OperationalError:  # Held by another process for long, or on a file system that may only be read.
            self._db.close()
            self._db = _fresh(sqlite3.connect(":memory:"))
            _refresh(self._db, self.out)
        return self

    def __exit__(self, *_: object) -> None:
        if self._db is not None:
            self._db.close()

    @property
    def columns(self) -> list[str]:
        """The columns of `runs`: state and the like, dotted keys of configurations, metrics as `split/metric`."""
        return _columns(self._connection)

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise RuntimeError("the store is not open; use it as a context manager.")
        return self._db

    def rows(self, where: str = "") -> list[dict[str, Any]]:
        """Returns the runs that a condition in SQL holds for, by name; of each what is known, None left out.

        Args:
          where: such as `state = 'done' and optim.lr < 1e-2 and eval/loss < 0.5`; names need no quotes.

        Raises:
          ValueError: the condition is no SQL, or speaks of a column that there is not.
        """
        condition = quoted_names(where, self.columns) if where.strip() else "1"
        with self._reading() as db:
            try:
                found = db.execute(f"select * from runs where {condition}\n order by run_id")
                names = [one[0] for one in found.description if one[0] != "signature"]
                keep = [i for i, one in enumerate(found.description) if one[0] != "signature"]
                rows = [[row[i] for i in keep] for row in found]
            except (sqlite3.Error, sqlite3.Warning) as error:
                raise ValueError(f"--where {where}: {_explained(str(error), self.columns)}") from None
        return [{k: v for k, v in zip(names, row, strict=True) if v is not None} for row in rows]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Gives the connection in a state in which a condition can change nothing."""
        db = self._connection
        db.execute("pragma query_only = on")
        try:
            yield db
        finally:
            db.execute("pragma query_only = off")

    def arms(self) -> list[dict[str, Any]]:
        """Returns which run serves which experiment (its folder), arm and seed."""
        found = self._connection.execute("select experiment, arm, seed, run_id from arms order by rowid")
        return [dict(zip(("experiment", "arm", "seed", "run_id"), row, strict=True)) for row in found]


def mentioned(where: str, columns: Iterable[str]) -> list[str]:
    """Returns the columns that a condition speaks of."""
    return [name for name in columns if f'"{name}"' in quoted_names(where, columns)]


def quoted_names(text: str, names: Iterable[str]) -> str:
    """Returns SQL in which known names such as optim.lr, also as r.optim.lr, are quoted; texts stay as they are."""
    spelt = {name.casefold(): name for name in sorted(names, key=len, reverse=True)}
    known = "|".join(map(re.escape, spelt.values()))
    pattern = re.compile(rf"(?<![\w./])(\w+\.)??({known})(?![\w./])", re.IGNORECASE) if spelt else None
    parts = re.split(r"('(?:[^']|'')*'|\"[^\"]*\")", text)
    return "".join(
        part if i % 2 or pattern is None else pattern.sub(_quoted_name(spelt), part) for i, part in enumerate(parts)
    )


def _quoted_name(spelt: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    """Returns what replaces a name, after the alias of a table perhaps, by that name in quotes."""
    return lambda found: f"{found[1] or ''}{_quoted(spelt[found[2].casefold()])}"


def _explained(message: str, columns: list[str]) -> str:
    """Returns what is wrong with a condition, and the nearest right name."""
    unknown = re.search(r"no such column: (\S+)", message)
    if unknown is None:
        return f"{message}; expected a condition such as \"state = 'done' and eval/loss < 0.5\"."
    near = suggestion(unknown[1].strip('"'), columns) if len(columns) < 12 else _nearest(unknown[1].strip('"'), columns)
    return f"no column {unknown[1]!r}{near}"


def _nearest(word: str, columns: list[str]) -> str:
    """Returns a suggestion for a near miss, else where all names can be seen."""
    text = suggestion(word, columns)
    return text if "did you mean" in text else "; precision-lab ls --json shows all columns."


def _opened(path: Path) -> sqlite3.Connection:
    """Returns a connection to the index, made anew where it is broken or of another version."""
    for attempt in range(2):
        db = None
        try:
            db = sqlite3.connect(path, timeout=10)
            version = db.execute("pragma user_version").fetchone()[0]
            tables = db.execute("select count(*) from sqlite_master").fetchone()[0]
            if version == _VERSION:
                return db
            if tables == 0:
                return _fresh(db)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                break
        if db is not None:
            db.close()
        if attempt == 0:
            path.unlink(missing_ok=True)
    return _fresh(sqlite3.connect(":memory:"))


def _fresh(db: sqlite3.Connection) -> sqlite3.Connection:
    """Returns a connection to an index without rows."""
    with db:
        db.execute(
            "create table runs (run_id primary key, state, step, attempt, error, duration_s, unix_s, path, signature)"
        )
        db.execute("create table arms (experiment, arm, seed, run_id)")
        db.execute("create table experiments (experiment primary key, signature)")
        db.execute(f"pragma user_version = {_VERSION}")
    return db


def _columns(db: sqlite3.Connection) -> list[str]:
    """Returns the names of the columns of `runs`, in the order they came."""
    return [row[1] for row in db.execute("pragma table_info(runs)") if row[1] != "signature"]


def _refresh(db: sqlite3.Connection, out: Path) -> None:
    """Brings the index up to date with the run directories."""
    with db:
        known = {name: (mark, state) for name, mark, state in db.execute("select run_id, signature, state from runs")}
        folders = {path.parent.name: path.parent for path in (out / TRIALS).glob("*/config.yaml")}
        db.executemany("delete from runs where run_id = ?", [(name,) for name in known if name not in folders])
        columns = {*_columns(db), "signature"}
        for name, folder in folders.items():
            mark = _signature(folder, _WATCHED)
            if known.get(name, ("", ""))[0] != mark or known[name][1] in _UNSETTLED:
                _store(db, {**entry(RunDir(folder)), "signature": mark}, columns)
        _refresh_arms(db, out)


def _refresh_arms(db: sqlite3.Connection, out: Path) -> None:
    """Brings the list of arms up to date with the folders of experiments."""
    known = dict(db.execute("select experiment, signature from experiments"))
    folders = {path.parent.name: path.parent for path in out.glob(f"*/{ARMS}")}
    for name in [name for name in known if name not in folders]:
        db.execute("delete from experiments where experiment = ?", (name,))
        db.execute("delete from arms where experiment = ?", (name,))
    for name, folder in sorted(folders.items()):
        mark = _signature(folder, (ARMS,))
        if known.get(name) == mark:
            continue
        db.execute("delete from arms where experiment = ?", (name,))
        rows = [(name, row["arm"], row["seed"], row["run_id"]) for row in read_json(folder / ARMS)["trials"]]
        db.executemany("insert into arms values (?, ?, ?, ?)", rows)
        db.execute("insert or replace into experiments values (?, ?)", (name, mark))


def _signature(folder: Path, names: Iterable[str]) -> str:
    """Returns text that changes when one of a folder's files is written."""
    parts = []
    for name in names:
        try:
            found = (folder / name).stat()
        except OSError:
            parts.append("-")
            continue
        parts.append(f"{found.st_mtime_ns}:{found.st_size}")
    return " ".join(parts)


def _store(db: sqlite3.Connection, row: Mapping[str, Any], columns: set[str]) -> None:
    """Puts a row into the index, with new columns where it has new keys.

    SQL tells no capitals from small letters: a name that differs only in these from a column there is shares it, and
    of two such names in one row, the latter has the column.
    """
    spelt = {name.casefold(): name for name in columns}
    for name in row:
        if spelt.setdefault(name.casefold(), name) not in columns:
            db.execute(f"alter table runs add column {_quoted(name)}")
            columns.add(name)
    row = {spelt[name.casefold()]: value for name, value in row.items()}
    names = ", ".join(map(_quoted, row))
    db.execute("delete from runs where run_id = ?", (row["run_id"],))
    db.execute(f"insert into runs ({names}) values ({', '.join('?' * len(row))})", list(row.values()))


def _quoted(name: str) -> str:
    """Returns a name as SQL quotes it."""
    return '"' + name.replace('"', '""') + '"'


def entry(run: RunDir) -> dict[str, Any]:
    """Returns what the index holds of a run, by column; a file that cannot be read is named in `error`."""
    row: dict[str, Any] = {"run_id": run.id, "path": str(run.path)}
    try:
        status, summary = run.status(), run.summary()
        row |= {name: status.get(name) for name in ("state", "attempt", "error", "unix_s")}
        row |= {key: _cell(value) for key, value in _config(run).items() if key not in _FIXED}
        series = {} if summary.get("metrics") else run.series()
        reached = max((one.steps[-1] for one in series.values()), default=status.get("step"))
        row |= {"step": summary.get("step", reached), "duration_s": summary.get("duration_s")}
        last = summary.get("metrics") or {name: one.values[-1] for name, one in series.items()}
        row |= {name: _number(value) for name, value in sorted(last.items())}
    except (OSError, ValueError) as error:
        row |= {"state": "unreadable", "error": " ".join(str(error).split())}
    return row


def _config(run: RunDir) -> dict[str, Any]:
    """Returns a run's configuration with dotted keys, as written and not validated; the policy by its name."""
    from precision_lab.runner.summary import flat

    found = flat(parse_file(run.path / "config.yaml")[0])
    return {**found, "policy": policy_name(str(found.get("policy", "")))}


def _cell(value: Any) -> Any:
    """Returns a value of a configuration as a column holds it."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _number(value: Any) -> Any:
    """Returns a metric as a column holds it: SQLite knows infinities, and would make a NaN nothing at all."""
    encoded = encode_number(value)
    return encoded if encoded == "nan" else value
