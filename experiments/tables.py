"""Writes the tables of README.md and experiments/README.md from the package: `python experiments/tables.py`.

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`; a test fails while what stands there is not what this
would write.
"""

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("quant", "policy", "rewrite", "nn", "ptq", "optim")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def presets() -> str:
    """Returns the policies that have a name."""
    from precision_lab.policy import PRESETS

    return table(("preset", "what it is"), [(f"`{name}`", preset.summary) for name, preset in PRESETS.items()])


def formats() -> str:
    """Returns the formats by kind, with what narrow ones reach."""
    from precision_lab.formats import BLOCK_FORMATS, CODEBOOKS, FORMATS

    floats = [f"`{name}`{_reach(fmt)}" for name, fmt in FORMATS.items() if fmt.kind == "float"]
    integers = [f"`{name}`" for name, fmt in FORMATS.items() if fmt.kind != "float"]
    codebooks, blocks = ([f"`{name}`" for name in names] for names in (CODEBOOKS, BLOCK_FORMATS))
    kinds = [
        ("floats", floats, "formats/catalogue.py", "formats/test_catalogue.py"),
        ("integers", integers, "formats/catalogue.py", "formats/test_catalogue.py"),
        ("codebooks", codebooks, "formats/codebooks.py", "formats/test_codebooks.py"),
        ("blocks with shared scales", blocks, "formats/blocks.py", "formats/test_blocks.py"),
    ]
    rows = [(kind, ", ".join(names), _file(f"precision_lab/{file}"), _test(test)) for kind, names, file, test in kinds]
    return table(("kind", "formats (smallest to largest magnitude)", "file", "test"), rows)


def _reach(fmt: Any) -> str:
    """Returns the smallest and the largest magnitude of a narrow format, in brackets."""
    return f" ({fmt.min_subnormal:.3g} to {fmt.max:.6g})" if fmt.bits <= 8 else ""


def _test(path: str) -> str:
    """Returns a link to a test file, or to the folder of tests where there is no such file."""
    return _file(f"tests/{path}" if (ROOT / "tests" / path).is_file() else f"tests/{path.partition('/')[0]}")


def _file(path: str) -> str:
    """Returns a link to a file of the project."""
    return f"[{Path(path).name}]({path})"


def methods() -> str:
    """Returns the files that carry out a paper: what each is, the papers, its test."""
    rows = []
    for path in sorted(path for name in PACKAGES for path in (ROOT / "precision_lab" / name).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        papers = sorted(set(_ARXIV.findall(text)))
        if papers and path.stem not in ("presets", "__init__"):
            what = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0].rstrip(".")
            links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
            rows.append((_file(path.relative_to(ROOT).as_posix()), what, links, _test_of(path)))
    return table(("file", "what it is", "arXiv", "test"), rows)


def _test_of(path: Path) -> str:
    """Returns a link to the test of a module: the one of its name, else the first that imports it."""
    folder = ROOT / "tests" / path.parent.name
    own = folder / f"test_{path.stem}.py"
    name = f"precision_lab.{path.parent.name}.{path.stem}"
    others = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [own] if own.is_file() else [one for one in others if name in one.read_text(encoding="utf-8")]
    return _file(found[0].relative_to(ROOT).as_posix()) if found else _file(f"tests/{path.parent.name}")


def experiments() -> str:
    """Returns the experiments: what each asks, whom it follows, and what came out."""
    rows = [_experiment(path, "experiments/") for path in _configs()]
    return table(("experiment", "question", "paper", "verdict"), rows)


def experiment_list() -> str:
    """Returns the experiments as the page that lies beside them links to them, with what a run of each takes."""
    rows = [(*_experiment(path, ""), _cost(path)) for path in _configs()]
    return table(("experiment", "question", "paper", "verdict", "cost"), rows)


def _configs() -> list[Path]:
    """Returns the config of every experiment that has a page."""
    return sorted(
        path for path in (ROOT / "experiments").glob("*/config.yaml") if (path.parent / "README.md").is_file()
    )


def _experiment(path: Path, prefix: str) -> tuple[str, str, str, str]:
    """Returns the row of one experiment; the question and the verdict are those of its page."""
    paper = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("paper") or {}
    page = (path.parent / "README.md").read_text(encoding="utf-8")
    question = page.splitlines()[0].lstrip("# ")
    verdict = re.search(r"^\*\*(.*claims.*)\*\*;", page, flags=re.MULTILINE)
    arxiv = paper.get("arxiv", "")
    title = str(paper.get("title", ""))
    link = f"{title}, [{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else title
    name = path.parent.name
    return f"[{name}]({prefix}{name}/README.md)", question, link, verdict[1] if verdict else "not run yet"


def _cost(path: Path) -> str:
    """Returns what the page of an experiment says that it costs."""
    page = (path.parent / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^\*\*Cost\.\*\* (.*?)\.$", page, re.MULTILINE)
    return found[1] if found else ""


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"formats": formats, "presets": presets, "methods": methods, "experiments": experiments},
    "experiments/README.md": {"experiments": experiment_list},
}


def written(page: str) -> str:
    """Returns a page with its tables as they should be.

    Raises:
      ValueError: the page has no place for one of them.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in TABLES[page].items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{page} has no lines {begin.strip()} and {end}.")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in TABLES:
        (ROOT / page).write_text(written(page), encoding="utf-8")
        print(f"wrote {page}")
