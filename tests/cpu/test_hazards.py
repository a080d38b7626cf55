"""The table of tests/README.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent


def named() -> list[tuple[str, str, str]]:
    """``(file, test, parameter)`` of every name in the table; parts that it does not name are empty."""
    text = (TESTS / "README.md").read_text()
    return re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)(?:::(\w+)(?:\[([^\]`]+)\])?)?`", text)


def test_every_test_named_in_the_hazard_table_exists():
    found = named()
    assert len(found) > 50
    assert sum(bool(parameter) for _, _, parameter in found) > 2
    for file, test, parameter in found:
        path = TESTS.parent / file if file.startswith("tests/") else TESTS / "cpu" / file
        assert path.exists(), file
        text = path.read_text()
        assert not test or re.search(rf"^ *def {test}\(", text, re.MULTILINE), f"{file}::{test}"
        assert parameter in text, f"{file}::{test}[{parameter}]"


def test_nothing_is_named_without_its_file():
    rows = [line for line in (TESTS / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert not [name for line in rows for name in re.findall(r"`(test_\w+)`", line)]
