"""Analysis of made-up results with known answers."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("studies", reason="needs a checkout, and `python -m pytest` from its root")

from dynamo_lightning.errors import RunError, UserError
from studies.analyse import main, with_tables
from studies.comparison import compare, end_of, read_results
from studies.design import Arm, Study, load_study, results_folder
from studies.paired import holm, ratio_interval, sign_flip_p
from studies.tables import tables

ROOT = Path(__file__).parents[2]
STUDY = Study(
    name="made_up",
    frozen_on="2026-01-01",
    shared={},
    arms=(Arm("equal", ("--a=1",)), Arm("better", ("--a=2",))),
    reference="equal",
    learning_rates=(1e-4, 2e-4),
    seeds=(0, 1, 2),
    metric="val/x/pass@1",
    target=0.5,
    limit=40,
)
CROSSED = {  # evaluation at which the target was reached, of four; None: never
    ("equal", 1e-4): (2, 4, 2),
    ("equal", 2e-4): (None, 4, 4),
    ("better", 1e-4): (3, 3, 3),
    ("better", 2e-4): (1, 2, 1),
}


def write(folder, arm, rate, seed, crossed):
    run = next(run for run in STUDY.runs() if (run.arm.name, run.learning_rate, run.seed) == (arm, rate, seed))
    values = [0.3 if crossed is None or i < crossed else 0.5 for i in (1, 2, 3, 4)]
    curve = {"iteration": [10, 20, 30, 40], "tokens": [100, 200, 300, 400], "value": values}
    content = {"frozen_on": STUDY.frozen_on, "options": list(run.options), "tokens": 400, "curve": curve}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run.name}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    for (arm, rate), crossings in CROSSED.items():
        for seed, crossed in enumerate(crossings):
            write(tmp_path, arm, rate, seed, crossed)
    return tmp_path


def ends_in(folder):
    return {cell: end_of(STUDY, result) for cell, result in read_results(STUDY, folder).items()}


def test_a_run_ends_at_its_first_evaluation_at_the_target(folder):
    end = ends_in(folder)["equal", 1e-4, 0]
    assert (end.iterations, end.tokens, end.reached) == (20, 200, True)


def test_a_run_that_never_reached_the_target_counts_with_the_limit(folder):
    end = ends_in(folder)["equal", 2e-4, 0]
    assert (end.iterations, end.tokens, end.reached) == (40, 400, False)


def test_each_arm_is_compared_at_its_own_best_rate(folder):
    equal, better = compare(STUDY, ends_in(folder))
    # Equal: (20 + 40 + 20)/3 at 1e-4 and 40 at 2e-4. Better: 30 at 1e-4 and (10 + 20 + 10)/3 at 2e-4.
    assert (equal.learning_rate, better.learning_rate) == (1e-4, 2e-4)
    assert equal.iterations == pytest.approx(80 / 3)
    assert better.iterations == pytest.approx(40 / 3)
    assert better.ratio == better.token_ratio == 0.5
    assert better.interval == (0.5, 0.5)  # the ratio is 0.5 on every seed
    assert better.p == 0.25  # 2 of 8 sign patterns


def test_a_seed_that_is_still_running_is_left_out_of_the_comparison(folder):
    (folder / "better_2e-04_2.json").unlink()
    assert [found.seeds for found in compare(STUDY, ends_in(folder))] == [(0, 1, 2), (0, 1)]


def test_a_rate_that_only_one_of_two_arms_has_is_left_out_of_their_comparison(folder):
    for path in folder.glob("better_2e-04_*.json"):
        path.unlink()
    _, better = compare(STUDY, ends_in(folder))
    assert (better.learning_rates, better.learning_rate) == ((1e-4,), 1e-4)
    assert better.ratio == pytest.approx(90 / 80)


def test_one_seed_has_no_interval(folder):
    for path in folder.glob("*_[12].json"):
        path.unlink()
    assert [found.interval for found in compare(STUDY, ends_in(folder))] == [None, None]


def test_tables_are_the_same_when_made_again(folder):
    text = tables(STUDY, folder)
    assert text == tables(STUDY, folder)
    assert "| `better` | 3 | 2e-04, of 2 | 13 | 133 | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.250 | 0.250 |" in text
    assert "| `equal` | 27 (3 of 3) | 40 (2 of 3) |" in text


def test_results_of_another_design_are_refused(folder):
    path = folder / "equal_1e-04_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frozen_on": "2025-01-01"}))
    with pytest.raises(RunError, match="another design"):
        read_results(STUDY, folder)


def test_bootstrap_interval_holds_seeds_together():
    # On each seed the ratio is 2; drawn apart, the two arms' means would give a wide interval.
    assert ratio_interval([2, 20, 200], [1, 10, 100]) == pytest.approx((2, 2))
    # Two seeds: both draws of the first (ratio 1) and of the second (ratio 3) have probability 1/4 each.
    assert ratio_interval([1, 3], [1, 1]) == pytest.approx((1, 3))


def test_sign_flip_p_counts_patterns_by_hand():
    # Logs 1, 1, −1 with e: |sums| of the 8 patterns are 1 (six times) and 3 (twice); all are at least 1.
    e = 2.718281828459045
    assert sign_flip_p([e, e, 1], [1, 1, e]) == 1.0
    assert sign_flip_p([e, e, e], [1, 1, 1]) == 0.25
    assert sign_flip_p([1] * 10, [2] * 10) == pytest.approx(2 / 2**10)


def test_holm_by_hand():
    # 0.01 × 3, then max(0.03, 0.02 × 2), then max(0.04, 0.03 × 1)
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_a_rate_is_chosen_on_pilot_seeds_and_judged_on_others(folder):
    # Equal is better at 2e-4 on seed 1 only by its limit; the rates are what the design says, not the best of seeds.
    arms = (Arm("equal", ("--a=1",), learning_rate=1e-4), Arm("better", ("--a=2",), learning_rate=1e-4, num_seeds=1))
    study = dataclasses.replace(STUDY, arms=arms, pilot_seeds=(0,), seeds=(1, 2))
    names = [run.name for run in study.runs()]
    assert names == [
        "equal_1e-04_0", "better_1e-04_0", "equal_2e-04_0", "better_2e-04_0",
        "equal_1e-04_1", "better_1e-04_1", "equal_1e-04_2",
    ]  # fmt: skip
    ends = {cell: end_of(study, result) for cell, result in read_results(study, folder).items()}
    equal, better = compare(study, ends)
    assert (equal.seeds, better.seeds) == ((1, 2), (1,))
    assert better.learning_rates == (1e-4,)
    assert better.ratio == 30 / 40  # of seed 1 alone
    assert "| `equal` | 20 (1 of 1) | 40 (0 of 1) |" in tables(study, folder)  # the pilot seed alone


def test_an_arm_without_a_chosen_rate_has_pilots_only():
    study = dataclasses.replace(STUDY, pilot_seeds=(0,), seeds=(1, 2))
    assert {run.seed for run in study.runs()} == {0}
    assert compare(study, {}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pilot_seeds": (2, 3)}, r"seeds \[2\] are pilot seeds too"),
        ({"arms": (Arm("equal", (), learning_rate=3e-4),)}, "learning_rate=0.0003 of equal is not in"),
        ({"learning_rates": (1e-4, 1.2e-4)}, "two runs are called better_1e-04_0"),
    ],
)
def test_a_design_that_would_flatter_an_arm_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(STUDY, **changes)


def test_last_values_are_compared_with_the_reference_by_hand(tmp_path):
    study = dataclasses.replace(STUDY, target=None, final_metrics=("spikes",), learning_rates=(1e-4,), seeds=(0, 1))
    for run in study.runs():
        spikes = {"equal": (2.0, 4.0), "better": (1.0, 2.0)}[run.arm.name][run.seed]
        content = {"frozen_on": study.frozen_on, "options": list(run.options), "final": {"spikes": spikes}}
        (tmp_path / f"{run.name}.json").write_text(json.dumps(content))
    text = tables(study, tmp_path)
    assert "| `equal` | 2 | 3 |" in text
    assert "| `better` | 2 | 1.5; 0.50 [0.50, 0.50], p 0.500 |" in text  # 2 of 4 sign patterns


def test_figure_and_tables_come_from_a_design_file(folder, tmp_path, capsys):
    design = tmp_path / "made_up.py"
    design.write_text("from studies.design import Arm, Study\n" + f"STUDY = {STUDY!r}\n")
    results_folder(design).parent.mkdir()
    results_folder(design).symlink_to(folder, target_is_directory=True)
    main([str(design), "--figure", str(tmp_path / "figure.png")])
    assert "12 of 12 runs" in capsys.readouterr().out
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_missing_design_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*absent.py does not exist"):
        main([str(tmp_path / "absent.py")])


def test_a_reference_that_is_no_arm_is_refused():
    with pytest.raises(UserError, match="reference='absent'"):
        Study("s", "2026-01-01", {}, (Arm("equal", ()),), "absent", (1e-4,), (0,), "m", 0.5, 10)


@pytest.mark.parametrize("name", ["noise_limited", "several_epochs", "chain", "large_batch", "stress"])
def test_the_published_tables_are_those_of_the_results(name):
    page = (ROOT / "docs/study.md").read_text()
    study = load_study(ROOT / f"studies/{name}.py")
    assert with_tables(page, name, tables(study, ROOT / f"studies/{name}/results")) == page


def test_a_page_without_a_place_for_the_tables_is_refused():
    with pytest.raises(UserError, match="no <!-- begin made_up --> … <!-- end made_up -->"):
        with_tables("# Page\n<!-- begin made_up -->\n", "made_up", "| a |")
