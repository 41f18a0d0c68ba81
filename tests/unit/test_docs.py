"""What is written by hand stays in step with what is not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import conflicts_page
import endings_page

ROOT = Path(__file__).parents[2]
PYTHON = re.compile("```python\n(.*?)```", re.DOTALL)


def examples(name):
    """The Python of each section of a page: title → text."""
    sections = (ROOT / "docs" / name).read_text("utf-8").split("\n## ")
    found = {each.partition("\n")[0]: "".join(PYTHON.findall(each)) for each in sections}
    return {title: text for title, text in found.items() if text}


PAGES = {name: examples(name) for name in ("migrating.md", "mixing.md", "phases.md", "waiting.md")}
SECTIONS = [(name, section) for name, sections in PAGES.items() for section in sections]


@pytest.mark.parametrize("of", [conflicts_page, endings_page], ids=["conflicts", "endings"])
def test_the_page_of_a_table_is_the_table_that_the_tests_go_by(of):
    name = of.__name__.removesuffix("_page")
    written = (ROOT / "docs" / f"{name}.md").read_text("utf-8")

    assert written == of.page(), f"python tests/support/{of.__name__}.py > docs/{name}.md"


def test_every_module_is_in_the_layout_that_newcomers_read():
    layout = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("```")[1]
    named = {line.split()[0].rstrip("/") for line in layout.strip().splitlines()}
    package = ROOT / "celery_singleton_lock"
    modules = {each.stem for each in package.iterdir() if (each / "__init__.py").exists()}
    modules |= {each.stem for each in package.glob("*.py")} - {"__init__"}

    assert named == modules


@pytest.mark.parametrize(("name", "section"), SECTIONS)
def test_the_examples_of_a_page_run_and_make_tasks_of_an_app_without_a_warning(name, section):
    example = PAGES[name][section] + "\nfrom celery import current_app\ncurrent_app.finalize()"

    subprocess.run([sys.executable, "-W", "error", "-c", example], check=True)
