"""Names of columns."""

from __future__ import annotations

from data.report_language.sections import SECTIONS
from data.tables.columns import ALIASES, find_columns


def test_aliases_are_unique_and_found_in_any_spelling():
    names = [name.lower() for aliases in ALIASES.values() for name in aliases]
    assert len(names) == len(set(names))
    for role, aliases in ALIASES.items():
        for alias in aliases:
            assert find_columns([f" {alias.upper().replace('_', ' ')}（必填） "])[0].keys() == {role}


def test_every_section_of_a_report_may_have_a_column():
    assert ALIASES.keys() >= set(SECTIONS)
