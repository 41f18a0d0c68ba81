"""What is written by hand stays in step with what is not."""

from __future__ import annotations

from pathlib import Path

from endings_page import page

ROOT = Path(__file__).parents[2]


def test_the_page_of_endings_is_the_table_that_the_tests_go_by():
    written = (ROOT / "docs" / "endings.md").read_text("utf-8")

    assert written == page(), "python tests/support/endings_page.py > docs/endings.md"
