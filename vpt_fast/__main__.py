"""The entry of the vpt-fast command and of python -m vpt_fast.

Importing it takes no time, so that Ctrl-C ends the command in one line from its first moment, as
`flags.one_line_errors` does later.
"""

from __future__ import annotations

import sys


def main() -> None:
    # Windows has no signals and no locks of files like those that the commands use.
    if sys.platform == "win32":
        print("error: the commands do not run on Windows itself; run them in WSL", file=sys.stderr)
        sys.exit(2)
    try:
        from vpt_fast.commands.cli import main as run

        run()
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
