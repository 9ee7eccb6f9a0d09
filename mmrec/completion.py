"""What a shell reads to complete commands: tyro's script, with what it lacks mended.

It takes the further lines of a help text for flags. In bash tyro knows flags and commands but no positional
arguments, such as the folders of `mmrec compare`; it puts a space behind a folder and cuts names at spaces.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout

_ONE_A_LINE = ("print(completion)", "print(*completion.splitlines())")
_BASH = (
    # Nothing found here leaves the word to readline, which knows files and folders.
    ("complete -F _tyro_mmrec ", "complete -o default -F _tyro_mmrec "),
    ('COMPREPLY=($(compgen -f -- "$cur"))', "COMPREPLY=()"),
    (
        'matches+=("$completion")',
        '[[ -z $completion ]] || matches+=("$completion")',
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
    for own, mended in (_ONE_A_LINE, *(_BASH if shell == "bash" else ())):
        script = script.replace(own, mended)
    return script
