"""Notebooks: each is stored as it ran from top to bottom, defines nothing but the reader's own model, and is the same
as its script. What it prints is the same everywhere; numbers that depend on the machine are in its pictures.

After a change of a script, from the root:

    python -m tests.notebooks.test_notebooks notebooks/01_formats.py
"""

import ast
import os
import sys
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
# One of them shows quickly that notebooks run and print what is stored; the others take ten to forty seconds each.
ONE, OTHERS = SCRIPTS[:1], [pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:]]


def executed(script):
    """Returns the notebook of a script as it runs from top to bottom, with the package as it stands here."""
    root = str(FOLDER.parent)
    os.environ.update(PYTHONPATH=root, MPLBACKEND="module://matplotlib_inline.backend_inline")
    notebook = jupytext.read(script)
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": root}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    return notebook


def outputs(notebook):
    """Returns all outputs of a notebook in order."""
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def printed(notebook):
    """Returns what a notebook prints to stdout."""
    return "".join(out.text for out in outputs(notebook) if out.get("name") == "stdout")


def pictures(notebook):
    """Returns how many pictures a notebook shows: matplotlib's own, and those of reports."""
    shown = [out.get("data", {}) for out in outputs(notebook)]
    return sum("image/png" in data or "<svg" in "".join(data.get("text/html", "")) for data in shown)


@by_script
def test_a_notebook_and_its_script_have_the_same_cells(script):
    cells, of_script = (jupytext.read(path).cells for path in (script.with_suffix(".ipynb"), script))

    assert [(cell.cell_type, cell.source) for cell in cells] == [(cell.cell_type, cell.source) for cell in of_script]


@by_script
def test_a_notebook_defines_nothing_but_a_model_of_its_readers_own(script):
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    statements = ast.parse(script.read_text()).body

    classes = [statement for statement in statements if isinstance(statement, ast.ClassDef)]
    models = [one for one in classes if "nnx.Module" in map(ast.unparse, one.bases)]

    assert len(models) <= 1
    others = [node for one in statements if one not in models for node in ast.walk(one)]
    assert not [node for node in others if isinstance(node, defined)]


@pytest.mark.parametrize("script", [*ONE, *OTHERS], ids=[path.stem for path in SCRIPTS])
def test_a_notebook_runs(script, monkeypatch):
    for name in ("PYTHONPATH", "MPLBACKEND"):
        monkeypatch.setenv(name, "")  # restored afterwards

    notebook = executed(script)

    stored = jupytext.read(script.with_suffix(".ipynb"))
    assert not [out for out in outputs(notebook) if out.output_type == "error"]
    assert printed(stored) == printed(notebook) != ""
    assert pictures(stored) == pictures(notebook) > 0


@by_script
def test_a_stored_notebook_is_small_and_keeps_no_clock(script):
    path = script.with_suffix(".ipynb")

    assert path.stat().st_size < 500_000
    assert not any("execution" in cell.metadata for cell in jupytext.read(path).cells)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        jupytext.write(executed(Path(name)), Path(name).with_suffix(".ipynb"))
