"""Durations in words."""

import pytest

from preprocess.core.durations import format_duration


@pytest.mark.parametrize("seconds, text", [(59.4, "59 s"), (60, "1 min"), (3599, "1 h 00 min"), (6720, "1 h 52 min")])
def test_seconds_are_formatted_as_hours_and_minutes(seconds, text):
    assert format_duration(seconds) == text
