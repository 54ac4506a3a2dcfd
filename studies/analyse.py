"""Tables and figure of a study, from its result files alone: `python -m studies.analyse studies/noise_limited.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamo_lightning.errors import RunError, UserError
from studies.comparison import read_results
from studies.design import load_study, results_folder
from studies.tables import tables


def main(args: Sequence[str] | None = None) -> None:
    """Print the tables and write the figure."""
    parser = argparse.ArgumentParser(prog="python -m studies.analyse", description=__doc__)
    parser.add_argument("design", type=Path, help="file of the study, such as studies/noise_limited.py")
    parser.add_argument("--figure", type=Path, default=None, help="where the figure goes (PNG or SVG)")
    options = parser.parse_args(args)
    try:
        study = load_study(options.design)
        print(tables(study, results_folder(options.design)))
        if options.figure is not None:
            from studies.figure import draw

            draw(study, read_results(study, results_folder(options.design)), options.figure)
    except (UserError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
