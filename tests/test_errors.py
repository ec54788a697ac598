"""What our errors are made with."""

import pytest

from mpocompress.errors import DataError, LayoutError, check_count


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_a_count_is_an_integer_that_is_large_enough(value):
    with pytest.raises(LayoutError, match=f"sites {value!r}: it is an integer, 1 or more"):
        check_count("sites", value, 1, LayoutError)


@pytest.mark.parametrize("value", [0, 7, 10**30])
def test_counts_pass(value):
    check_count("sweeps", value, 0, DataError)
