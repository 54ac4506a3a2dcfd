import math

from dynamo_lightning.callbacks.thinned_curves import ThinnedCurves


def test_points_are_the_values_while_there_are_few():
    curves = ThinnedCurves(max_points=4)
    for iteration in range(1, 4):
        curves.add(iteration, {"a": 10.0 * iteration, "b": math.nan if iteration == 2 else 1.0})
    assert curves.points("a") == ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert curves.points("b") == ([1.0, 3.0], [1.0, 1.0])
    assert curves.names == {"a", "b"}


def test_later_points_are_means_over_twice_as_many_iterations():
    curves = ThinnedCurves(max_points=4)
    for iteration in range(1, 6):
        curves.add(iteration, {"a": float(iteration)})
    assert curves.bin_size == 2
    assert curves.points("a") == ([1.5, 3.5, 5.5], [1.5, 3.5, 5.0])
    for iteration in range(6, 10):
        curves.add(iteration, {"a": float(iteration)})
    assert curves.points("a") == ([2.5, 6.5, 10.5], [2.5, 6.5, 9.0])


def test_a_long_run_keeps_few_points_with_the_right_means():
    curves = ThinnedCurves()
    for iteration in range(1, 10_001):
        curves.add(iteration, {"a": float(iteration)})
    iterations, values = curves.points("a")
    assert 100 < len(values) <= 200 and iterations == values[:-1] + iterations[-1:]


def test_a_gap_of_many_iterations_is_no_curve_of_many_points():
    curves = ThinnedCurves(max_points=4)
    curves.add(1, {"a": 1.0})
    curves.add(1000, {"a": 3.0})
    assert curves.points("a") == ([128.5, 896.5], [1.0, 3.0])


def test_the_state_goes_through_plain_values():
    first = ThinnedCurves(max_points=4)
    for iteration in range(1, 6):
        first.add(iteration, {"a": float(iteration)})
    second = ThinnedCurves(max_points=4)
    second.load_state_dict(first.state_dict())
    for curves in (first, second):
        curves.add(6, {"a": 6.0})
    assert second.points("a") == first.points("a") == ([1.5, 3.5, 5.5], [1.5, 3.5, 5.5])
