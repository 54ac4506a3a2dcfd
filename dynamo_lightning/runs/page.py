"""The page of one or several runs: one HTML file with everything in it, for a browser without network.

Text of runs never becomes markup: tables are escaped here, and everything else travels as JSON whose `<` is escaped and
which the page's script puts into text nodes.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from dynamo_lightning.errors import UserError
from dynamo_lightning.files import write_atomically
from dynamo_lightning.runs.advice import comparisons_of, differing_options, left_out, verdict
from dynamo_lightning.runs.comparison import arms_of
from dynamo_lightning.runs.figures import MAX_POINTS, plots_of
from dynamo_lightning.runs.group_frames import group_frames
from dynamo_lightning.runs.history import RunHistory, read_history
from dynamo_lightning.runs.rollout_rows import MAX_BYTES, RolloutColumns, read_rollouts
from dynamo_lightning.runs.summary import TRAINING_PHASES
from dynamo_lightning.runs.table import format_number, with_interval

MAX_ROLLOUTS = 50_000
"""Rollouts on a page by default."""


def write_page(folders: Sequence[str], output: str, max_rollouts: int = MAX_ROLLOUTS) -> Path:
    """Write the page of some runs.

    Args:
        folders: Log folders of runs, finished or not.
        output: The HTML file; it is replaced.
        max_rollouts: Rollouts on the page, about: beyond it whole groups are drawn at random.

    Raises:
        UserError: If plotly is missing, a folder is no run's, or the file cannot be written.
    """
    library = plotly_javascript()
    path = Path(output)
    if path.is_dir():
        raise UserError(f"report --output {output} is a folder: give a file, such as {output}/report.html")
    page = render(read_runs(folders), library, max_rollouts)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"report --output {output} cannot be written ({error.strerror}): give another file") from error
    return path


def plotly_javascript() -> str:
    """Plotly's script, which the page contains.

    Raises:
        UserError: If the package is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            'report --output needs plotly, which is not installed: pip install "dynamo-lightning[report]"'
        ) from error
    script: str = get_plotlyjs()
    return script


def read_runs(folders: Sequence[str]) -> list[RunHistory]:
    """The runs, labeled A, B and so on by arm; runs of one arm, which differ in their seed, are A1, A2 and so on."""
    runs = {run.folder: run for run in (read_history(folder) for folder in folders)}
    if len(runs) == 1:
        return list(runs.values())
    labeled = {}
    for arm in arms_of({folder: run.summary or {} for folder, run in runs.items()}):
        for number, folder in enumerate(arm.runs, start=1):
            label = arm.label if len(arm.runs) == 1 else f"{arm.label}{number}"
            labeled[folder] = replace(runs[folder], label=label)
    return [labeled[folder] for folder in runs]


def render(runs: Sequence[RunHistory], library: str, max_rollouts: int = MAX_ROLLOUTS) -> str:
    """The page as text.

    Args:
        runs: One or several.
        library: Plotly's script.
        max_rollouts: See `write_page`.
    """
    rollouts = read_rollouts(runs, max_rollouts)
    kept = rollouts.kept
    frames = {run.label: group_frames(run, kept.get(number, {})) for number, run in enumerate(runs)}
    data = {
        "labels": [run.label or "run" for run in runs],
        "plots": [asdict(plot) for plot in plots_of(runs)],
        "frames": [
            {"run": number, "frames": frames[run.label]} for number, run in enumerate(runs) if frames[run.label]
        ],
        "marks": [
            {"run": run.label, "iteration": mark.iteration, "text": mark.tripwire, "level": mark.level}
            for run in runs
            for mark in run.warnings
        ],
    }
    title = runs[0].folder if len(runs) == 1 else f"{len(runs)} runs"
    parts = {
        "TITLE": escaped(f"Report of {title}"),
        "VERSION": escaped(version("dynamo_lightning")),
        "OVERVIEW": _overview(runs) + _warnings(runs) + _comparison(runs) + _notes(runs, rollouts),
        "STYLE": _file("page.css"),
        "LIBRARY": library,
        "DATA": as_script_data(data),
        "ROLLOUTS": as_script_data(_columns(rollouts)),
        "SCRIPT": _file("plots.js") + _file("rollouts.js"),
    }
    page = _file("page.html")
    pieces = page.split("{{")
    # One pass, so that what a run wrote cannot be taken for another placeholder.
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def escaped(text: str) -> str:
    """Text as HTML; control characters and halves of surrogate pairs, which HTML lacks, become `\ufffd`."""
    return html.escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text))


def as_script_data(data: Any) -> str:
    """JSON that stays inside a script element, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return (files("dynamo_lightning.runs") / "page_files" / name).read_text(encoding="utf-8")


def _columns(rollouts: RolloutColumns) -> dict[str, Any]:
    columns = {name: value for name, value in vars(rollouts).items()}
    return columns | {"shown": len(rollouts.group)}


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its first column the rows' headings; a narrow screen scrolls it, by keyboard too."""
    head = "".join(f'<th scope="col">{escaped(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>'
        + "".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    name = escaped(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _overview(runs: Sequence[RunHistory]) -> str:
    rows = []
    for run in runs:
        summary = run.summary or {}
        seconds = summary.get("seconds") or {}
        rows.append(
            [
                f"{run.label}  {run.folder}".strip(),
                str(summary.get("status", "no summary")),
                str(run.iterations[-1] if run.iterations else summary.get("iterations", 0)),
                "–" if summary.get("seed") is None else str(summary["seed"]),
                f"{sum(seconds.get(phase, 0.0) for phase in TRAINING_PHASES):.0f}" if seconds else "–",
                format_number((summary.get("final") or {}).get("alloc/predicted_variance_ratio")),
            ]
        )
    titles = ["run", "status", "RL iterations", "seed", "training seconds", "variance ratio"]
    text = _table("Runs", titles, rows)
    scores = [
        [f"{name.removeprefix('val/')} {run.label}".strip(), with_interval(before, name), with_interval(after, name)]
        for run in runs
        for before, after in [((run.summary or {}).get("before") or {}, (run.summary or {}).get("after") or {})]
        for name in sorted({*before, *after})
        if name.startswith("val/") and not name.endswith(("_low", "_high"))
    ]
    return text + (
        _table("Validation, with 95 % intervals", ["metric", "before", "after"], sorted(scores)) if scores else ""
    )


def _warnings(runs: Sequence[RunHistory]) -> str:
    lines = [(run.label, mark) for run in runs for mark in run.warnings]
    if not lines:
        return ""
    items = "".join(
        f'<li class="{"error" if mark.level == "error" else "warning"}">'
        f"<strong>{escaped(' '.join(filter(None, [label, mark.level])))}</strong>, iteration {mark.iteration}: "
        f"{escaped(mark.message)}</li>"
        for label, mark in lines
    )
    return f'<h2 id="warnings">Warnings</h2><ul class="warnings">{items}</ul>'


def _comparison(runs: Sequence[RunHistory]) -> str:
    if len(runs) < 2:
        return ""
    comparisons = comparisons_of(runs)
    text = '<h2 id="comparison">Which run is better</h2>'
    if comparisons:
        text += "".join(f"<p>{escaped(verdict(each))}</p>" for each in comparisons)
        rows = [
            [
                f"{each.metric}, {each.arms}",
                f"{each.result.difference:+.3f} [{each.result.low:+.3f}, {each.result.high:+.3f}]",
                str(each.result.num_problems),
                f"{each.result.p_value:.4f}",
                f"{each.adjusted_p_value:.4f}",
            ]
            for each in comparisons
        ]
        caption = "Difference after training, problem by problem: bootstrap interval, sign-flip test"
        text += _table(caption, ["metric, runs", "difference", "problems", "p", "p (Holm)"], rows)
    else:
        text += "<p>No paired comparison: the runs have no counts of the same validation problems.</p>"
    options = differing_options(runs)
    if options:
        titles = ["option", *(run.label for run in runs)]
        text += _table("Options that differ", titles, [[name, *values] for name, values in options])
    elif all(run.options for run in runs):
        text += "<p>The runs have the same options.</p>"
    return text


def _notes(runs: Sequence[RunHistory], rollouts: RolloutColumns) -> str:
    notes = left_out(runs)
    longest = max((len(run.iterations) for run in runs), default=0)
    if longest > MAX_POINTS:
        step = -(-longest // MAX_POINTS)
        notes.append(f"Curves of {longest} iterations are drawn as means of {step} iterations.")
    if len(rollouts.group) < rollouts.num_rollouts:
        notes.append(
            f"The browser has {len(rollouts.group)} of the logs' {rollouts.num_rollouts} rollouts: whole groups drawn "
            f"at random, up to --rollouts and {MAX_BYTES // 2**20} MiB of logs."
        )
    items = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    return f'<h2 id="notes">Notes</h2><ul>{items}</ul>' if notes else ""
