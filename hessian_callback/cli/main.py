"""The command ``hessian-callback``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. Only the commands that train or measure import Lightning.

    Args:
        args: the arguments behind the program's name; ``None`` for those of the process.

    Raises:
        SystemExit: with status 2, a sentence and a remedy, if options or files are not usable.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given[:1] == ["report"]:
        from hessian_callback.reports import report

        report.main(given[1:])
    elif given[:1] == ["study"]:
        from hessian_callback.studies import command

        command.main(given[1:])
    else:
        from hessian_callback.cli import training

        training.main(args)


if __name__ == "__main__":
    main()
