import warnings

import pytest

from dynamo_lightning.callbacks import LearningSignalMonitor

SOLVED, HOPELESS, MIXED = (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)


@pytest.fixture
def play(train, make_record):
    """Trains on the given groups of each iteration; the warnings about learning."""

    def run(iterations, patience, **options):
        monitor = LearningSignalMonitor(patience)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(
                [monitor],
                script=lambda i: make_record(i, rewards=iterations[i], gradient_norms=()),
                epoch_length=len(iterations),
                **options,
            )
        return monitor, [str(w.message) for w in caught if "learning signal" in str(w.message)]

    return run


def test_iterations_in_a_row_without_a_signal_are_told_with_their_groups(play):
    monitor, messages = play([[SOLVED, SOLVED, HOPELESS]] * 3, patience=3)
    assert len(messages) == 1
    assert messages[0].startswith(
        "no group had a learning signal in 3 iterations in a row: the responses of 6 groups were all "
    )
    assert "all correct, of 3 all incorrect" in messages[0] and "data.train" in messages[0]
    assert (monitor.num_iterations, monitor.num_teaching) == (3, 0)


def test_the_remedy_fits_the_cause(play):
    assert "train on harder ones" in play([[SOLVED]], patience=1)[1][0]
    message = play([[HOPELESS]], patience=1, version=1)[1][0]
    for option in ("data.train", "data.template", "model.sampling.max_response_length", "model.reward"):
        assert option in message


def test_one_group_with_a_signal_starts_the_count_anew(play):
    assert play([[SOLVED], [SOLVED], [SOLVED, MIXED], [SOLVED], [SOLVED]], patience=3)[1] == []


def test_the_warning_comes_again_when_the_number_has_doubled(play):
    _, messages = play([[HOPELESS]] * 9, patience=2)
    assert [message.split(" in ")[1].split()[0] for message in messages] == ["2", "4", "8"]


def test_a_run_that_learned_nothing_ends_with_a_line_about_it(play, caplog):
    with caplog.at_level("INFO"):
        play([[SOLVED]] * 4, patience=10)
    assert "nothing was learned: no group had a learning signal in 4 iterations" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        play([[SOLVED], [MIXED]], patience=10, version=1)
    assert "nothing was learned" not in caplog.text


def test_the_count_is_in_the_checkpoint():
    first, second = LearningSignalMonitor(), LearningSignalMonitor()
    first.num_iterations, first.idle = 7, [7, 14, 0]
    second.load_state_dict(first.state_dict())
    assert (second.num_iterations, second.idle) == (7, [7, 14, 0])


def test_patience_below_one_is_refused():
    with pytest.raises(ValueError, match="patience of at least 1, got 0"):
        LearningSignalMonitor(0)
