"""The command `report`: runs side by side in the terminal, or as a page for a browser."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.comparison import compare
from dynamo_lightning.runs.live import watch
from dynamo_lightning.runs.page import MAX_ROLLOUTS, write_page

EPILOG = "Without --output it compares finished runs in the terminal; with it, runs may still be going on."


def report_parser() -> ArgumentParser:
    """Parser of what follows `report` on the command line."""
    parser = ArgumentParser(
        prog="python -m dynamo_lightning report",
        description="Put runs side by side.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("run_folders", nargs="+", metavar="RUN", help="Log folders of runs.")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="Write a page for a browser, one HTML file that needs no network: curves, allocation, rollouts, warnings "
        "and paired differences. Needs the extra `report`.",
    )
    parser.add_argument(
        "--rollouts",
        type=int,
        default=MAX_ROLLOUTS,
        metavar="N",
        help=f"Rollouts on the page, about; beyond it whole groups are drawn at random (default {MAX_ROLLOUTS}).",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="Show one run in the terminal as it goes on, until it ends or Ctrl-C is pressed.",
    )
    return parser


def report(arguments: Sequence[str]) -> None:
    """Put runs side by side, in the terminal or as one HTML file.

    Args:
        arguments: Those of the command line after `report`.

    Raises:
        UserError: If a folder is no run's, or the page cannot be written.
    """
    given = report_parser().parse_args(arguments)
    if given.rollouts < 0:
        raise UserError(f"report --rollouts must be at least 0, got {given.rollouts}")
    if given.watch:
        if given.output is not None or len(given.run_folders) != 1:
            raise UserError(
                f"report --watch shows one run in the terminal, got {len(given.run_folders)} runs"
                f"{' and --output' if given.output is not None else ''}: give one run and no --output"
            )
        watch(given.run_folders[0])
        return
    if given.output is None:
        compare(given.run_folders)
        return
    path = write_page(given.run_folders, given.output, given.rollouts)
    try:
        compare(given.run_folders)
    except UserError as error:  # the page shows such runs too, and says what is missing
        print(f"no table {error}")
    print(f"wrote    {path}")
