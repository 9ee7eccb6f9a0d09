"""What a shell reads to complete commands: tyro's script, with what it lacks in bash mended.

tyro knows flags and commands but no positional arguments, such as the folders of `mmrec compare`; it puts
a space behind a folder, cuts names at spaces, and takes the lines of a help text for flags.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout

_BASH = (
    # Nothing found here leaves the word to readline, which knows files and folders.
    ("complete -F _tyro_mmrec ", "complete -o default -F _tyro_mmrec "),
    ('COMPREPLY=($(compgen -f -- "$cur"))', "COMPREPLY=()"),
    (
        'matches+=("$completion")',
        '[[ -z $completion || $completion == *" "* ]] || matches+=("$completion")',
    ),
)


def completion_script(shell: str, print_script: Callable[[], object]) -> str:
    """The script for a shell; `print_script` prints tyro's, and ends the program as tyro does."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            print_script()
    except SystemExit as ended:
        if ended.code:
            raise
    script = printed.getvalue()
    for own, mended in _BASH if shell == "bash" else ():
        script = script.replace(own, mended)
    return script
