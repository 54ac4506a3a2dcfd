"""When the callback speaks, what it writes, and what it keeps in checkpoints."""

import json
import warnings

import pytest

from dynamo_lightning.callbacks import Tripwires
from dynamo_lightning.callbacks.tripwires import TRIPWIRES, Measurement, Tripwire
from dynamo_lightning.callbacks.tripwires.observation import Observation
from dynamo_lightning.callbacks.tripwires.table import NAMES
from dynamo_lightning.errors import RunError, UserError

FAR, NEAR = {"sampling/push_logp_difference": 0.1}, {"sampling/push_logp_difference": 0.01}
BETWEEN = {"sampling/push_logp_difference": 0.02}  # below the threshold of 0.03, above the recovery of 0.015


def rows(run):
    return [json.loads(line) for line in (run.folder / "tripwires.jsonl").read_text().splitlines()]


@pytest.fixture
def play(train, make_record):
    """Trains on iterations with these metrics, the gradient norms being 1; gives the run's warnings of tripwires."""

    def run(metrics, callback=None, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(
                [callback or Tripwires()],
                script=lambda i: make_record(i, metrics=metrics[i]),
                epoch_length=len(metrics),
                **options,
            )
        return [str(w.message) for w in caught if str(w.message).startswith("tripwire")]

    run.folder = train.folder
    return run


def test_a_tripwire_speaks_once_and_writes_a_row(play):
    messages = play([FAR] * 8)
    assert len(messages) == 1
    assert messages[0].startswith("tripwire engine_mismatch, iteration 3: the log-probabilities of engine and trainer")
    (row,) = rows(play)
    assert row == {
        "iteration": 3,
        "tripwire": "engine_mismatch",
        "level": "warning",
        "message": messages[0].split(": ", 1)[1],
        "value": pytest.approx(0.1),
        "threshold": 0.03,
    }


def test_it_speaks_again_only_after_recovery(play):
    assert len(play([FAR] * 4 + [BETWEEN] * 4 + [FAR] * 4)) == 1
    assert [row["iteration"] for row in rows(play)] == [3]
    assert len(play([FAR] * 4 + [NEAR] * 4 + [FAR] * 4, version=1)) == 2


def test_a_run_without_anything_wrong_writes_no_file(play):
    assert play([NEAR] * 5) == []
    assert not (play.folder / "tripwires.jsonl").exists()


def test_a_fast_development_run_writes_no_file(play):
    play([{}], fast_dev_run=True)
    assert not (play.folder / "tripwires.jsonl").exists()


def test_stop_on_ends_the_run_with_its_words_in_the_log(play):
    with pytest.raises(RunError, match=r"tripwire engine_mismatch \(Tripwires\.stop_on\) ends the run at iteration 3"):
        play([FAR] * 8, Tripwires(stop_on=["engine_mismatch"]))
    (row,) = rows(play)
    assert (row["iteration"], row["level"]) == (3, "error")


def test_a_tripwire_that_is_left_out_is_silent(play):
    assert play([FAR] * 8, Tripwires(leave_out=["engine_mismatch"])) == []


def test_another_threshold_moves_the_recovery_with_it(play):
    assert play([FAR] * 8, Tripwires(thresholds={"engine_mismatch": 0.2})) == []
    tripwire = next(t for t in Tripwires(thresholds={"engine_mismatch": 0.2}).tripwires if t.name == "engine_mismatch")
    assert tripwire.recovery == pytest.approx(0.1)


@pytest.mark.parametrize("option", ["stop_on", "leave_out", "thresholds"])
def test_an_unknown_name_is_one_clear_line(option):
    value = {"entropy_colapse": 0.2} if option == "thresholds" else ["entropy_colapse"]
    with pytest.raises(
        UserError, match=rf"Tripwires\.{option}: there is no tripwire 'entropy_colapse', did you mean entropy_collapse"
    ):
        Tripwires(**{option: value})
    with pytest.raises(UserError, match=r"no tripwire 'x'; they are not_finite, old_weights"):
        Tripwires(leave_out=["x"])


def test_a_name_cannot_both_stop_and_be_left_out():
    with pytest.raises(UserError, match="duplicates is in stop_on and in leave_out"):
        Tripwires(stop_on=["duplicates"], leave_out=["duplicates"])


def test_the_state_goes_through_a_checkpoint(play, train, make_record, tmp_path):
    first = Tripwires()
    play([{**FAR, "rewards/math/mean": 0.5}] * 5, first, limit_val_batches=1, check_val_every_n_epoch=1)
    second = Tripwires()
    second.load_state_dict(first.state_dict())
    assert second.history == first.history and second.history.newest.components == {"math": 0.5}
    assert len(second.history.recent) == 5 and [v.iteration for v in second.history.validations] == [0, 5]
    assert second.state_dict() == first.state_dict()
    assert second.judge() == []  # it has spoken before the checkpoint


def test_fields_of_another_version_in_a_checkpoint_are_left_out():
    state = Tripwires().state_dict()
    state["recent"] = [{"iteration": 3, "no_longer_measured": 1.0}]
    tripwires = Tripwires()
    tripwires.load_state_dict(state)
    assert list(tripwires.history.recent) == [Observation(3)]


def test_validations_are_noted_with_their_intervals_and_the_reward_before_them(play):
    tripwires = Tripwires()
    play([{}] * 4, tripwires, limit_val_batches=1, check_val_every_n_epoch=1)
    before, after = tripwires.history.validations
    assert before.iteration == 0 and after.iteration == 4
    assert after.reward == pytest.approx(0.25)  # rewards (1, 0) and (0, 0)
    value, low, high = after.estimates["val/toy/pass@1"]
    assert (value - low, high - value) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_run_that_learned_nothing_ends_with_a_line_about_it(train, make_record, caplog):
    with caplog.at_level("INFO"):
        train([Tripwires()], script=lambda i: make_record(i, rewards=[(0.0, 0.0)]), epoch_length=4)
    assert "nothing was learned: no group had a learning signal in 4 iterations" in caplog.text


def test_a_low_value_is_bad_where_the_recovery_is_above_the_threshold():
    low = Tripwire("x", lambda history: Measurement(0.0, ""), threshold=0.1, recovery=0.2)
    assert low.is_beyond(0.1) and not low.is_beyond(0.15) and low.has_recovered(0.2) and not low.has_recovered(0.15)
    high = Tripwire("x", lambda history: Measurement(0.0, ""), threshold=0.2, recovery=0.1)
    assert high.is_beyond(0.2) and not high.is_beyond(0.15) and high.has_recovered(0.1) and not high.has_recovered(0.15)


def test_names_are_unique():
    assert len(set(NAMES)) == len(TRIPWIRES)
