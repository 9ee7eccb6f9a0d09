"""Text of others, such as titles, in one line of a terminal."""


def one_line(text: str, *, most: int | None = None) -> str:
    """A text without line breaks, and without what a terminal would obey instead of showing it.

    Titles come from whoever uploads videos: an escape sequence can clear the screen or rename the window, and
    marks of direction can turn what follows around. Past `most` characters it ends in "…".
    """
    # Emoji are joined by U+200D, which Python does not call printable.
    shown = "".join(one if one.isprintable() or one == "\u200d" else " " for one in text)
    shown = " ".join(shown.split())
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"
