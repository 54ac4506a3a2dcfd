import pytest

from dynamo_lightning.callbacks import VarianceReductionMonitor
from dynamo_lightning.callbacks.variance_reduction import variance_ratios


def test_ratios_by_hand(make_record):
    # groups of 2 and 4: one right of 2 → a = 1·1/(2·1) = 1/2; one right of 4 → a = 1·3/(4·3) = 1/4; mean size 3
    record = make_record(rewards=[(1, 0), (1, 0, 0, 0)], variances=[0.25, 0.09])
    ratios = variance_ratios(record)
    assert ratios["alloc/realised_variance_ratio"] == pytest.approx((0.5 / 1 + 0.25 / 3) / ((0.5 + 0.25) / 2))
    assert ratios["alloc/predicted_variance_ratio"] == pytest.approx((0.25 / 1 + 0.09 / 3) / ((0.25 + 0.09) / 2))
    # √a = 0.5, 0.3: mean 0.4, SD 0.1
    assert ratios["alloc/best_variance_ratio"] == pytest.approx(1 / (1 + (0.1 / 0.4) ** 2))


def test_equal_groups_have_ratio_one(make_record):
    ratios = variance_ratios(make_record(rewards=[(1, 0, 0), (1, 1, 0)], variances=[0.2, 0.1]))
    assert ratios["alloc/predicted_variance_ratio"] == pytest.approx(1)
    assert ratios["alloc/realised_variance_ratio"] == pytest.approx(1)


def test_groups_left_with_fewer_than_two_rollouts_are_left_out(make_record):
    whole = make_record(rewards=[(1, 0), (1, 0, 0, 0)])
    with_lost = make_record(rewards=[(1, 0), (1, 0, 0, 0), (1,), ()], group_sizes=[2, 4, 5, 5], variances=[0.25] * 4)
    name = "alloc/realised_variance_ratio"
    assert variance_ratios(with_lost)[name] == variance_ratios(whole)[name]


def test_success_is_reaching_the_threshold(make_record):
    record = make_record(rewards=[(0.8, 0.7), (0.9, 0.1, 0.1, 0.1)])
    strict = make_record(rewards=[(1, 0), (1, 0, 0, 0)])
    name = "alloc/realised_variance_ratio"
    assert variance_ratios(record, success_threshold=0.8)[name] == variance_ratios(strict)[name]


def test_undefined_ratio_is_not_logged(train, make_record):
    def script(iteration):
        return make_record(iteration, rewards=[(1, 1), (0, 0)])

    logged = train([VarianceReductionMonitor()], script=script, epoch_length=2).logged
    assert "alloc/realised_variance_ratio" not in logged
    assert logged["alloc/predicted_variance_ratio"] == [1, 1]


def test_predicted_ratio_is_in_the_progress_bar(train, make_record):
    trainer = train([VarianceReductionMonitor()], epoch_length=1).trainer
    assert trainer.progress_bar_metrics == {"alloc/predicted_variance_ratio": 1.0}
