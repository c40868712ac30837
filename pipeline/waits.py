"""How long to wait before the next try."""

MOST_DOUBLINGS = 64  # after which any wait is past its longest; a float does not take many more


def doubled_wait_s(first_s: float, times: int, longest_s: float) -> float:
    """Return a first wait doubled so many times, however many, and `longest_s` at most."""
    return min(longest_s, first_s * 2 ** min(times, MOST_DOUBLINGS))
