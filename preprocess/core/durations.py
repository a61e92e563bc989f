"""Durations in words, for every room that prints one."""


def format_duration(seconds: float) -> str:
    """Format seconds as 45 s, 12 min, or 1 h 52 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"

    # Rounded before it is split, so that 3,599 s are 1 h 00 min and not 60 min.
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes:02} min"
