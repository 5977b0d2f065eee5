"""The errors of mutants.py can be put where they belong: each text is there once, and its tests' files are too."""

from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).parent.parent


def test_every_text_is_there_once():
    counts = {mutant.name: (ROOT / mutant.file).read_text().count(mutant.old) for mutant in MUTANTS}
    assert len(counts) == len(MUTANTS), "two have one name"
    assert {name: count for name, count in counts.items() if count != 1} == {}


def test_every_file_of_tests_is_there():
    files = {f"test_{name}.py" for mutant in MUTANTS for name in mutant.tests.partition(":")[0].split()}
    assert files <= {path.name for path in (ROOT / "tests").iterdir()}
