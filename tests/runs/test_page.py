import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_folders import HOSTILE, rollout, write_run

from dynamo_lightning.cli import main
from dynamo_lightning.errors import MissingFileError, UserError
from dynamo_lightning.evaluation.paired import PairedDifference
from dynamo_lightning.runs.advice import differing_options, verdict
from dynamo_lightning.runs.comparison import Comparison
from dynamo_lightning.runs.figures import MAX_POINTS, plots_of
from dynamo_lightning.runs.history import read_history
from dynamo_lightning.runs.page import read_runs, render
from dynamo_lightning.runs.plot_specs import LINE_PLOTS
from dynamo_lightning.runs.rollout_rows import read_rollouts
from dynamo_lightning.runs.trends import trend_in_words


def page_data(page, name):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)[1])


def test_every_metric_of_a_run_is_in_a_plot_with_data(tmp_path):
    run = read_history(str(write_run(tmp_path / "run")))
    plots = plots_of([run])
    assert {plot.name for plot in plots} == {
        "validation-0", "reward", "entropy", "gradient", "clipping", "mismatch", "variance", "sizes", "shares",
        "shares-cost", "factors", "damped", "lengths", "truncated", "failures", "throughput", "memory", "phases",
    }  # fmt: skip
    for plot in plots:
        for trace in plot.traces:
            assert len(trace["x"]) == len(trace["y"]) > 0 and any(y is not None for y in trace["y"]), plot.name


def test_a_metric_that_a_run_does_not_have_has_no_plot(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("reward,step\n0.5,0\n0.6,1\n")
    (folder / "groups.jsonl").unlink()
    run = read_history(str(folder))
    assert [plot.name for plot in plots_of([run])] == ["validation-0", "reward"]  # "before" is in the summary


def test_several_named_rewards_have_a_plot_of_their_own(tmp_path):
    folder = write_run(tmp_path / "run")

    def plots_of_rewards(header, values):
        (folder / "metrics.csv").write_text(f"{header},step\n{values},0\n")
        return [plot for plot in plots_of([read_history(str(folder))]) if plot.name == "rewards"]

    assert plots_of_rewards("rewards/math/mean,rewards/math/std", "0.5,0.1") == []
    (plot,) = plots_of_rewards("rewards/math/mean,rewards/format/mean", "0.5,0.1")
    assert {trace["name"]: trace["y"] for trace in plot.traces} == {"format": [0.1], "math": [0.5]}


def test_titles_tell_what_one_sees():
    def title(values):
        run = SimpleNamespace(metrics={"reward": values})
        return trend_in_words("Training reward", run, "reward")

    assert title([0.1 + 0.01 * i for i in range(50)]) == "Training reward rises from 0.12 to 0.57"
    assert title([0.6 - 0.01 * i for i in range(50)]) == "Training reward falls from 0.58 to 0.13"
    assert title([0.5, 0.4] * 25) == "Training reward: 0.44 at the end, no clear trend"
    assert title([float("nan")]) == "Training reward"


def test_entropy_spikes_are_marked_where_their_number_rises(tmp_path):
    run = read_history(str(write_run(tmp_path / "run")))
    (plot,) = (plot for plot in plots_of([run]) if plot.name == "entropy")
    (cross,) = (trace for trace in plot.traces if trace["meta"]["role"] == "cross")
    assert cross["x"] == [21] and cross["name"] == "1 spike"


def test_curves_of_long_runs_are_means_of_several_iterations(tmp_path):
    run = read_history(str(write_run(tmp_path / "run", num_iterations=MAX_POINTS + 500)))
    (plot,) = (plot for plot in plots_of([run]) if plot.name == "sizes")
    largest = plot.traces[0]
    assert len(largest["x"]) == 1000 and largest["x"][:2] == [1, 3] and set(largest["y"]) == {12.0}


def test_missing_torn_and_empty_files_are_told_and_not_fatal(tmp_path):
    folder = write_run(tmp_path / "run")
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text[: text.rindex(",", 0, -40)] + "\n\0garbage,,\n")
    (folder / "groups.jsonl").write_text('{"iteration": 1, "sizes": [1]}\n{"iter')
    (folder / "summary.json").write_text('{"iterations": 4')
    (folder / "tripwires.jsonl").write_text("[]\nnull\n")
    run = read_history(str(folder))
    assert len(run.iterations) == 39 and run.groups == [] and run.summary is None
    assert run.unreadable[0].startswith(f"{folder}/summary.json is not complete JSON")
    assert run.unreadable[1] == "2 rows of metrics.csv are torn or not numbers, and left out"
    assert "2 rows of metrics.csv are torn" in render([run], library="")


def test_files_damaged_at_random_never_end_in_a_traceback(tmp_path):
    folder = write_run(tmp_path / "run", num_iterations=12, tripwires=[{"iteration": 3, "message": "m"}])
    other = write_run(tmp_path / "other", num_iterations=12)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    values = [b"null", b"true", b'"x"', b"-1", b"1e999", b"NaN", b"{}", b"[]", b"9" * 20]
    rng = random.Random(0)
    for number in range(80):
        path = rng.choice(sorted(whole))
        content = whole[path]
        if number % 2:
            content = content[: rng.randrange(len(content))]
        spots = list(re.finditer(rb'-?\d+(\.\d+)?|\[[^\[\]]*\]|"[^"]*"|\{[^{}]*\}', content))
        for spot in sorted(rng.sample(spots, min(3, len(spots))), key=lambda match: -match.start()):
            content = content[: spot.start()] + rng.choice(values) + content[spot.end() :]
        path.write_bytes(content)
        assert "<main" in render(read_runs([str(folder), str(other)]), library="")
        path.write_bytes(whole[path])


def test_an_empty_run_has_a_page_without_plots(tmp_path):
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    page = render(read_runs([str(tmp_path)]), library="")
    data = page_data(page, "page-data")
    assert data["plots"] == data["frames"] == [] and "metrics.csv has no complete iteration" in page.lower()


def test_folders_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="report: there is no run folder nowhere"):
        read_history("nowhere")
    with pytest.raises(UserError, match=r"has none of a run's files \(metrics\.csv, "):
        read_history(str(tmp_path))


def test_text_of_a_run_is_never_markup(tmp_path):
    rows = [rollout(1, 1, 0, response=HOSTILE, prompt=HOSTILE, answer=HOSTILE, source=HOSTILE, tokens=[HOSTILE] * 6)]
    tripwires = [{"iteration": 3, "tripwire": HOSTILE, "level": HOSTILE, "message": HOSTILE}]
    folder = write_run(tmp_path / "<b>run", rollouts=rows, options=f"x: {json.dumps(HOSTILE)}\n", tripwires=tripwires)
    page = render(read_runs([str(folder)]), library="")
    assert page.count("<script") == 4 and "<b>" not in page
    page.encode()  # no lone surrogate
    (response,) = page_data(page, "rollout-data")["response"]
    assert response == HOSTILE


def test_rollouts_beyond_the_limit_are_left_out_by_whole_groups(tmp_path):
    rows = [rollout(i, p, s) for i in range(1, 51) for p in range(10) for s in range(4)]
    runs = read_runs([str(write_run(tmp_path / "run", rollouts=rows))])
    columns = read_rollouts(runs, max_rollouts=1000)
    assert columns.num_rollouts == 2000 and 700 < len(columns.group) < 1300
    assert {columns.group.count(group) for group in set(columns.group)} == {4}
    assert f"The browser has {len(columns.group)} of the logs&#x27; 2000 rollouts" in render(runs, "", 1000)
    assert len(read_rollouts(runs, max_rollouts=2000).group) == 2000


def test_responses_of_evaluations_are_among_the_rollouts(tmp_path):
    folder = write_run(tmp_path / "run")
    evaluation = folder / "evaluations" / "0"
    evaluation.mkdir(parents=True)
    row = {"source": "math500", "prompt_id": 7, "sample_index": 1, "question": "1+1?", "response": "2", "reward": None}
    (evaluation / "math500.responses.jsonl").write_text(json.dumps(row) + "\n")
    columns = read_rollouts(read_runs([str(folder)]), 100)
    group = columns.groups[columns.group[-1]]
    assert (group["stage"], group["iteration"], group["prompt"]) == ("evaluation 0", None, "1+1?")
    assert columns.reward[-1] is None and columns.tokens[-1] is None


def test_options_that_differ_are_listed_without_those_that_name_the_run(tmp_path):
    first = write_run(tmp_path / "a", options="name: a\nloss: {class_path: pkg.GSPO, clip: 0.2}\n")
    second = write_run(tmp_path / "b", options="name: b\nloss: {class_path: pkg.gspo.GSPO, clip: 0.3, k: null}\n")
    runs = read_runs([str(first), str(second)])
    assert differing_options(runs) == [("loss.clip", ["0.2", "0.3"]), ("loss.k", ["–", "null"])]


@pytest.mark.parametrize(
    "difference, low, high, p_value, sentence",
    [
        (0.1, 0.02, 0.18, 0.01, "B is better than A at toy/pass@1 by 0.100, 95 % interval 0.020 to 0.180 over 50"),
        (-0.1, -0.18, -0.02, 0.01, "A is better than B at toy/pass@1 by 0.100, 95 % interval 0.020 to 0.180 over 50"),
        (0.1, -0.02, 0.22, 0.01, "The data does not show whether B or A is better at toy/pass@1"),
        (0.1, 0.02, 0.18, 0.2, "The data does not show whether B or A is better at toy/pass@1"),
    ],
)
def test_the_verdict_names_the_better_run_or_says_that_the_data_does_not_show_it(
    difference, low, high, p_value, sentence
):
    result = PairedDifference(50, difference, low, high, p_value)
    assert verdict(Comparison("toy/pass@1", "B − A", result, p_value)).startswith(sentence)


def test_a_clear_difference_of_two_runs_is_told_on_their_page(tmp_path):
    first = write_run(tmp_path / "a", correct=[1, 2] * 20)
    second = write_run(tmp_path / "b", correct=[3, 4] * 20)
    page = render(read_runs([str(first), str(second)]), library="")
    assert "B is better than A at toy/pass@1 by 0.500, 95 % interval 0.500 to 0.500 over 40 problems" in page


def test_runs_of_one_arm_are_numbered(tmp_path):
    folders = [write_run(tmp_path / arm / f"version_{i}", seed=i) for arm in ("grpo", "dynamo") for i in range(2)]
    assert [run.label for run in read_runs(list(map(str, folders)))] == ["A1", "A2", "B1", "B2"]


def test_command_writes_a_page_beside_its_table(tmp_path, capsys, monkeypatch):
    pytest.importorskip("plotly", reason="needs the extra `report`")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    main(["report", "run", "--output", "pages/report.html"])
    printed = capsys.readouterr().out
    assert "toy/pass@1" in printed and printed.endswith("wrote    pages/report.html\n")
    assert all(len(line) <= 80 for line in printed.splitlines())
    page = tmp_path / "pages" / "report.html"
    assert 1e6 < page.stat().st_size < 8e6
    assert "default-src 'none'" in page.read_text()


def test_mistakes_of_the_command_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="error: report --output run is a folder: give a file, such as run/report"):
        main(["report", "run", "--output", "run"])
    with pytest.raises(SystemExit, match="error: report --rollouts must be at least 0, got -1"):
        main(["report", "run", "--rollouts", "-1"])
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(SystemExit, match="error: report --output needs plotly, which is not installed: pip install"):
        main(["report", "run", "--output", "report.html"])


def test_the_documentation_names_every_plot():
    page = Path(__file__).parents[2] / "docs" / "report.md"
    if not page.exists():
        pytest.skip("the documentation does not come with an installed package")
    text = page.read_text().lower()
    assert [spec.subject for spec in LINE_PLOTS if spec.subject.lower() not in text] == []
