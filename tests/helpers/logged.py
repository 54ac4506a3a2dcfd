"""Reads what a run has logged."""

import csv


def column(run, metric):
    """The values of a metric, one for each iteration that has it, of the first run of this name."""
    with open(f"runs/{run}/version_0/metrics.csv") as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row[metric]]
