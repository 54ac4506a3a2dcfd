import pytest

from dynamo_lightning.rollout.requests import make_requests, share_of_rank


@pytest.fixture
def batch(make_prompt, make_batch):
    return make_batch([make_prompt(7), make_prompt(9)], [2, 3], iteration=4)


def test_each_prompt_gets_its_group_size(batch):
    requests = make_requests(batch, "train", seed=0)
    assert [(r.prompt.prompt_id, r.sample_index) for r in requests] == [(7, 0), (7, 1), (9, 0), (9, 1), (9, 2)]


def test_seeds_depend_on_run_iteration_prompt_and_sample_only(batch, make_prompt, make_batch):
    seeds = {r.prompt.prompt_id: r.seed for r in make_requests(batch, "train", seed=0) if r.sample_index == 1}
    alone = make_requests(make_batch([make_prompt(9)], [2], iteration=4), "train", seed=0)
    assert alone[1].seed == seeds[9]
    others = [
        make_requests(batch, "train", seed=1),
        make_requests(batch, "evaluate", seed=0),
        make_requests(make_batch(list(batch.prompts), [2, 3], iteration=5), "train", seed=0),
    ]
    assert all(requests[1].seed != seeds[7] for requests in others)


def test_evaluations_of_a_run_share_their_seeds(batch, make_batch):
    later = make_batch(list(batch.prompts), [2, 3], iteration=99)
    assert make_requests(batch, "evaluate", seed=0) == make_requests(later, "evaluate", seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_shares_are_equal_in_number_and_cover_every_request_once(batch, world_size):
    requests = make_requests(batch, "train", seed=0)
    shares = [share_of_rank(requests, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share, _ in shares}) == 1
    kept = [request for share, missing in shares for request in share[: len(share) - missing]]
    assert sorted(kept, key=requests.index) == requests
