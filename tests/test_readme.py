"""The README's code runs, and prints what the README says."""

import contextlib
import io
import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


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
