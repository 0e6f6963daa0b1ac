"""The README's code runs, and prints what the README says."""

import contextlib
import io
import itertools
import pathlib
import re

import pytest

from experiments import tables
from precision_lab.policy import PRESETS, parsing

README = pathlib.Path(__file__).parents[1] / "README.md"


def table(header):
    """Returns the rows of the README's table with this header, each as its cells."""
    below = README.read_text().partition(f"\n{header}\n")[2].splitlines()
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), below))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


def test_the_table_of_presets_is_that_of_the_package():
    expected = {f"`{name}`": preset.summary for name, preset in PRESETS.items()}

    assert dict(table("| preset | what it is |")) == expected


@pytest.mark.parametrize("page", tables.TABLES)
def test_generated_tables_are_up_to_date(page):
    current = (README.parent / page).read_text()

    assert current == tables.written(page), "run: python experiments/tables.py"


def test_every_paper_that_a_method_names_is_in_the_table_of_methods():
    rows = table("| file | what it is | arXiv | test |")

    for package in ("ptq", "optim"):
        for path in (README.parent / "precision_lab" / package).glob("*.py"):
            papers = set(re.findall(r"arXiv:(\d{4}\.\d{5})", path.read_text()))
            row = next((row for row in rows if f"/{path.name})" in row[0] and f"/{package}/" in row[0]), None)
            assert papers == (set(re.findall(r"abs/(\d{4}\.\d{5})", row[2])) if row else set()), path


def test_the_table_of_keys_has_every_key_of_a_policy_and_no_other():
    named = [key for row in table("| key | says | values |") for key in re.findall(r"`(\w+)`", row[0])]

    assert sorted(named) == sorted({*parsing.KEYS, *parsing.RULE_KEYS})


def test_the_code_of_the_readme_prints_what_stands_below_it():
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", text, flags=re.DOTALL)
    scope = {}

    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, scope)
        assert printed.getvalue() == expected

    assert len(blocks) >= 2
    assert any(expected for _, expected in blocks)


def test_every_experiment_is_in_the_readme_and_every_link_leads_somewhere():
    text = README.read_text()

    for folder in (README.parent / "experiments").glob("*/config.yaml"):
        assert f"(experiments/{folder.parent.name}/README.md)" in text
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target
