"""Notebooks: each runs from top to bottom, defines nothing, and is the same as its script."""

import ast
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@by_script
def test_a_notebook_and_its_script_have_the_same_cells(script):
    cells, of_script = (jupytext.read(path).cells for path in (script.with_suffix(".ipynb"), script))

    assert [(cell.cell_type, cell.source) for cell in cells] == [(cell.cell_type, cell.source) for cell in of_script]


@by_script
def test_a_notebook_defines_nothing(script):
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)

    assert not [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, defined)]


@by_script
def test_a_notebook_runs(script, monkeypatch):
    root = str(FOLDER.parent)
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")

    notebook = jupytext.read(script)
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": root}}).execute()

    assert not [
        out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs if out.output_type == "error"
    ]
