"""A slice of `make fuzz`: broken input of every kind has one line that names it, and none is taken silently."""

from tests.fuzz.run import run_cases

CASES = 500


def test_broken_input_has_one_line_that_names_it():
    faults = run_cases(0, range(CASES))
    assert not faults, "\n".join(faults)
