"""Errors whose reader can mend them."""


class UserError(Exception):
    """Something the person at the keyboard can mend.

    The message says what was expected, what was found (file, row, field), and what to do next. The
    command line prints it as one line and exits with status 1; any other exception keeps its traceback.
    """


class MediaError(Exception):
    """One image or video that cannot be read: the sample is skipped and counted under `reason`.

    `reason` is a short phrase with no path in it, so that equal faults add up.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
