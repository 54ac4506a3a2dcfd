from dataclasses import replace

import pytest

from dynamo_lightning.callbacks import EntropySpikeMonitor, IterationCheckpoint


def spikes(entropies, **options):
    monitor = EntropySpikeMonitor(**options)
    return [monitor.observe(entropy) for entropy in entropies], monitor


def test_spike_is_beyond_threshold_times_mad_of_the_window():
    # window 1, 2, 3, 4, H: median 3; deviations 2, 1, 0, 1, |H − 3|: MAD 1; so H spikes beyond 3 + 5 · 1
    assert spikes([1, 2, 3, 4, 8.0], window=5)[0][-1] is False
    assert spikes([1, 2, 3, 4, 8.1], window=5)[0][-1] is True
    assert spikes([1, 2, 3, 4, -2.1], window=5)[0][-1] is False  # window −2.1, 1, 2, 3, 4: median 2, MAD 1, −2.1 > −3


def test_nothing_is_judged_before_the_window_is_full():
    assert not any(spikes([1, 1.1, 0.9, 100.0], window=5)[0])


def test_constant_entropy_counts_jumps_but_not_rounding():
    assert spikes([2.0] * 5 + [2.0 + 1e-7, 2.5], window=5)[0][-2:] == [False, True]


def test_largest_change_is_between_neighbours_and_skips_undefined_entropies():
    monitor = spikes([1.0, 1.5, float("nan"), 1.25, 0.5], window=3)[1]
    assert monitor.largest_change == 0.75


def test_impossible_options_are_refused_with_the_number():
    with pytest.raises(ValueError, match="got 2"):
        EntropySpikeMonitor(window=2)
    with pytest.raises(ValueError, match="got 0"):
        EntropySpikeMonitor(threshold=0)


def test_resumed_run_logs_what_an_uninterrupted_one_does(train, make_record, tmp_path):
    entropies = [1.0, 1.1, 0.9, 5.0, 1.0, 1.1, 7.0, 1.0]

    def script(iteration):
        return replace(make_record(iteration), entropy=entropies[iteration])

    whole = train([EntropySpikeMonitor(window=3, threshold=3)], script=script, epoch_length=8, version=0)
    saver = IterationCheckpoint(every_n_iterations=4, save_top_k=-1)
    first = train([EntropySpikeMonitor(window=3, threshold=3), saver], script=script, epoch_length=8, version=1)
    path = f"{first.folder}/checkpoints/iteration=000004.ckpt"
    second = train(
        [EntropySpikeMonitor(window=3, threshold=3)], script=script, epoch_length=8, version=2, ckpt_path=path
    )
    assert second.module.seen == [4, 5, 6, 7]
    for name in ("stability/entropy_spikes", "stability/entropy_change_max"):
        assert len(whole.logged[name]) == 8
        assert second.logged[name] == whole.logged[name][4:]
    assert whole.logged["stability/entropy_spikes"][-1] > 0
