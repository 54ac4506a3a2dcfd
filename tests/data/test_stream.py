"""The stream of batches: every prompt once per epoch, seeded, and exact on resume."""

import pytest

from dynamo_lightning.data.stream import PromptStream
from dynamo_lightning.types import GroupPlan, Prompt, PromptBatch


def make_prompts(num_prompts):
    return [Prompt(prompt_id=i, question="q", text="q", token_ids=(1,), answer="a") for i in range(num_prompts)]


def make_batch(iteration, prompts):
    return PromptBatch(iteration, [GroupPlan(prompt, 2) for prompt in prompts])


def make_stream(num_prompts=10, prompts_per_batch=4, seed=0, drop_last=False):
    return PromptStream(make_prompts(num_prompts), prompts_per_batch, seed, make_batch, drop_last)


def take(stream, count=None):
    """Iteration numbers and prompt ids of the next batches of this epoch."""
    taken = []
    for batch in stream:
        taken.append((batch.iteration, [prompt.prompt_id for prompt in batch.prompts]))
        if len(taken) == count:
            break
    return taken


def ids(batches):
    return [prompt_id for _, batch in batches for prompt_id in batch]


def test_each_epoch_has_every_prompt_once_in_another_order():
    stream = make_stream()
    first, second = take(stream), take(stream)
    assert sorted(ids(first)) == sorted(ids(second)) == list(range(10))
    assert ids(first) != ids(second)
    assert [len(batch) for _, batch in first] == [4, 4, 2]


def test_iterations_are_counted_on_over_epochs():
    stream = make_stream()
    assert [iteration for iteration, _ in take(stream) + take(stream)] == [0, 1, 2, 3, 4, 5]


def test_order_depends_on_the_seed_alone():
    assert take(make_stream(seed=3)) == take(make_stream(seed=3))
    assert take(make_stream(seed=3)) != take(make_stream(seed=4))


def test_a_short_last_batch_is_kept_or_dropped():
    assert len(make_stream()) == len(take(make_stream())) == 3
    assert len(make_stream(drop_last=True)) == len(take(make_stream(drop_last=True))) == 2
    assert len(make_stream(num_prompts=8)) == len(make_stream(num_prompts=8, drop_last=True)) == 2
    stream = make_stream(drop_last=True)
    assert [len(take(stream)) for _ in range(3)] == [2, 2, 2]


def test_a_consumer_that_stops_after_len_batches_gets_the_next_epoch_next():
    # As Lightning does: it never asks for the batch that would raise StopIteration.
    stream = make_stream()
    assert sorted(ids(take(stream, len(stream)))) == list(range(10))
    assert sorted(ids(take(stream, len(stream)))) == list(range(10))
    assert stream.epoch == 1


@pytest.mark.parametrize("stop", range(1, 7))
def test_resume_is_exact_wherever_the_run_stopped(stop):
    uninterrupted = make_stream()
    expected = take(uninterrupted) + take(uninterrupted) + take(uninterrupted)
    stopped = make_stream()
    seen = []
    while len(seen) < stop:
        seen += take(stopped, min(3, stop - len(seen)))
    resumed = make_stream()
    resumed.load_state_dict(stopped.state_dict())
    while len(seen) < len(expected):
        seen += take(resumed)
    assert seen == expected


def test_state_saved_while_a_batch_is_trained_on_points_to_the_next_one():
    stream = make_stream()
    batches = iter(stream)
    next(batches)
    assert stream.state_dict() == {"epoch": 0, "position": 4, "step": 1, "iteration": 1}


def test_a_batch_is_made_only_when_it_is_due():
    made = []
    stream = PromptStream(make_prompts(10), 4, 0, lambda *args: made.append(args[0]) or make_batch(*args))
    batches = iter(stream)
    assert made == []
    next(batches)
    assert made == [0]


def test_a_larger_data_set_goes_on_from_the_same_position():
    stream = make_stream()
    take(stream, 2)
    resumed = make_stream(num_prompts=20)
    resumed.load_state_dict(stream.state_dict())
    whole = make_stream(num_prompts=20)
    assert ids(take(resumed)) == ids(take(whole))[8:]
    assert (resumed.epoch, resumed.iteration) == (0, 5)


@pytest.mark.parametrize("num_prompts", [8, 5])
def test_a_data_set_too_small_for_the_position_starts_the_next_epoch(num_prompts):
    stream = make_stream()
    take(stream, 2)
    resumed = make_stream(num_prompts=num_prompts)
    resumed.load_state_dict(stream.state_dict())
    batches = take(resumed)
    assert sorted(ids(batches)) == list(range(num_prompts))
    assert batches[0][0] == 2
    assert resumed.epoch == 1


def test_another_batch_size_goes_on_from_the_same_prompt():
    stream = make_stream()
    take(stream, 2)
    resumed = make_stream(prompts_per_batch=1)
    resumed.load_state_dict(stream.state_dict())
    rest = ids(take(resumed))
    assert rest[:2] == ids(take(make_stream()))[8:]
    assert len(rest) == len(resumed) - 2, "an epoch has `len()` batches, those before included"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 0}, "0 prompts do not fill one batch of data.prompts_per_batch=4$"),
        ({"num_prompts": 3, "drop_last": True}, r"3 prompts do not fill .*=4 \(data.drop_last is true\)"),
        ({"prompts_per_batch": 0}, "data.prompts_per_batch=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 at least 0"),
    ],
)
def test_a_stream_without_batches_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_stream(**settings)


@pytest.mark.parametrize("change", [{"position": -1}, {"epoch": None}, {"iteration": 1.5}])
def test_a_corrupt_place_is_refused(change):
    stream = make_stream()
    with pytest.raises(ValueError, match="corrupt place in the prompt stream"):
        stream.load_state_dict({**stream.state_dict(), **change})


def test_prompts_taken_in_between_are_not_yielded_again_in_the_pass():
    stream = make_stream(10, 3)
    batches = iter(stream)
    seen = [prompt.prompt_id for prompt in next(batches).prompts]
    seen += [prompt.prompt_id for prompt in stream.take(4)]
    seen += [prompt.prompt_id for prompt in next(batches).prompts]
    assert sorted(seen) == list(range(10))
    assert stream.take(1) == []
    assert [len(batch.prompts) for batch in batches] == [3, 3], "the epoch goes on with the next pass"
    assert stream.epoch == 1
