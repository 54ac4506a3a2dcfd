"""Reads what a run has logged."""

import csv


def column(run, metric, version=0):
    """The values of a metric, one for each iteration that has it, of a run of this name, by default the first."""
    with open(f"runs/{run}/version_{version}/metrics.csv") as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row[metric]]
