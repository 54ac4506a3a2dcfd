"""Tables and figure of a study, from its result files alone: `python -m studies.analyse studies/noise_limited.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.files import write_atomically
from studies.comparison import read_results
from studies.design import load_study, results_folder
from studies.tables import tables


def with_tables(page: str, name: str, text: str) -> str:
    """A page with a study's tables between its `<!-- begin name -->` and `<!-- end name -->`.

    Raises:
        UserError: If the page has no such place.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"the page has no {begin.strip()} … {end.strip()}")
    return f"{before}{begin}\n{text}\n\n{end}{after}"


def main(args: Sequence[str] | None = None) -> None:
    """Print the tables and write the figure."""
    parser = argparse.ArgumentParser(prog="python -m studies.analyse", description=__doc__)
    parser.add_argument("design", type=Path, help="file of the study, such as studies/noise_limited.py")
    parser.add_argument("--figure", type=Path, default=None, help="where the figure goes (PNG or SVG)")
    parser.add_argument("--page", type=Path, default=None, help="page whose tables of this study are replaced")
    options = parser.parse_args(args)
    try:
        study = load_study(options.design)
        text = tables(study, results_folder(options.design))
        print(text)
        if options.page is not None:
            write_atomically(options.page, with_tables(options.page.read_text(), study.name, text))
        if options.figure is not None:
            from studies.figure import draw

            draw(study, read_results(study, results_folder(options.design)), options.figure)
    except (UserError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
