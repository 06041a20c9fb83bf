"""Format numbers, counts and durations for display."""

_SUFFIXES = ("K", "M", "B", "T")


def readable(number: float) -> str:
    """Format a number with at most one decimal and a suffix for powers of 1,000: 950, 12.3K, 10.3M or 7.0B."""
    if number < 1000:
        return f"{number:.0f}"
    power = 1
    while round(number / 1000**power, 1) >= 1000 and power < len(_SUFFIXES):
        power += 1
    return f"{number / 1000**power:,.1f}{_SUFFIXES[power - 1]}"


def counted(number: int, noun: str) -> str:
    """Format a number with its noun, such as `1 rank` or `2 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format a time as hours, minutes and seconds, such as 3:25:45."""
    total = round(seconds)
    return f"{total // 3600}:{total % 3600 // 60:02}:{total % 60:02}"
