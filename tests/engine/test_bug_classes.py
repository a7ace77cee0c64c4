"""docs/bug-classes.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
TABLE = TESTS.parent / "docs" / "bug-classes.md"


def test_every_class_is_there_and_every_test_named_exists():
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", TABLE.read_text(), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 37))
    num_names = 0
    for number, _, tests in rows:
        file = None
        for path, name in re.findall(r"`([\w/]*(?:\.py)?)(?:::(\w+))?`", tests):
            file = TESTS / path if path else file
            assert file.is_file(), (number, path)
            if name:
                assert f"def {name}(" in file.read_text(), (number, name)
                num_names += 1
        assert file or tests.startswith(("as ", "does not apply yet")), number
    assert num_names > 35
