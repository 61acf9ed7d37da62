"""The README's figures of a GPU are those of the record that it names."""

import json

import pytest

from benchmarks.readme_table import BEGIN, END, RECORD, ROOT, table, with_table


def test_readme_has_the_records_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = table(json.loads((ROOT / RECORD).read_text(encoding="utf-8")))
    assert with_table(readme, made) == readme, "run python -m benchmarks.readme_table"
    assert f"({RECORD})" in readme


def test_a_readme_without_a_place_is_refused():
    assert with_table(f"a\n{BEGIN}old\n{END}b\n", "new\n") == f"a\n{BEGIN}new\n{END}b\n"
    with pytest.raises(ValueError, match="no place for the table"):
        with_table(f"a\n{BEGIN}old\n", "new\n")
