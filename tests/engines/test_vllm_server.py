"""The client of vLLM servers against stand-ins: weights, faults, deaths. Real servers: test_vllm_engine.py."""

import threading
import time
from types import SimpleNamespace

import fake_vllm_server
import pytest
import torch

from dynamo_lightning.engines.engine import Request
from dynamo_lightning.engines.vllm import client
from dynamo_lightning.engines.vllm.client import ServerRefused
from dynamo_lightning.engines.vllm.server import VLLMServerEngine
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import RolloutRequest


@pytest.fixture
def policy(tiny_policy):
    policy = load_policy(tiny_policy, PolicyConfig())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy


@pytest.fixture
def servers(tiny_policy):
    servers = [fake_vllm_server.FakeServer(load_policy(tiny_policy, PolicyConfig())) for _ in range(2)]
    yield servers
    for server in servers:
        server.die()


@pytest.fixture
def make_generator(tmp_path):
    made = []

    def make(servers, **options):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        options = {"patience": 1.0, "requests_per_server": 4, "time_limit": 5.0, **options}
        made.append(VLLMServerEngine(urls, str(tmp_path / "weights"), **options))
        return made[-1]

    yield make
    for generator in made:
        generator.close()
    assert not list(tmp_path.glob("weights/*"))  # what was handed over is cleaned up


@pytest.fixture
def requests(make_prompt):
    return [RolloutRequest(make_prompt(i // 4), i % 4, 1000 + i) for i in range(40)]


def generate(generator, policy, requests, tiny_policy, max_response_length=8):
    tokenizer = load_tokenizer(tiny_policy)
    return sample_rollouts(
        generator, policy, tokenizer, requests, max_response_length=max_response_length, temperature=1.0
    )


def assert_each_request_has_its_own_rollout(rollouts, requests):
    assert [rollout.key for rollout in rollouts] == [(r.prompt.prompt_id, r.sample_index) for r in requests]
    assert [rollout.token_ids[0] for rollout in rollouts] == [5 + request.seed % 7 for request in requests]


def test_weights_reach_every_server_and_rollouts_are_spread(policy, servers, make_generator, requests, tiny_policy):
    generator = make_generator(servers)
    generator.sync(policy, 3)
    for server in servers:
        for own, served in zip(policy.parameters(), server.policy.parameters(), strict=True):
            assert torch.equal(own, served)
    rollouts = generate(generator, policy, requests, tiny_policy)
    assert_each_request_has_its_own_rollout(rollouts, requests)
    assert all(rollout.logprobs.tolist() == [-0.5, -0.5] and not rollout.truncated for rollout in rollouts)
    assert sorted(servers[0].served + servers[1].served) == [request.seed for request in requests]
    assert servers[0].served and servers[1].served


def test_unchanged_weights_are_not_pushed_again(policy, servers, make_generator):
    generator = make_generator(servers)
    assert generator.push_difference is None
    generator.sync(policy, 3)
    assert 0 <= generator.push_difference < 1e-4
    generator.sync(policy, 3)
    assert [server.num_reloads for server in servers] == [1, 1]


def test_a_skipped_push_is_caught_and_says_what_differs(policy, servers, make_generator):
    generator = make_generator(servers)
    generator.sync(policy, 0)
    servers[1].ignores_reloads = True
    with torch.no_grad():  # a step so small that no log-probability would show it
        policy.get_input_embeddings().weight[3, 3] *= 1 + 1e-6
    with pytest.raises(RuntimeError, match=r"does not hold the policy's weights of version \w+-1 .*embed_tokens"):
        generator.sync(policy, 1)


def test_weights_must_be_pushed_before_responses_are_sampled(policy, servers, make_generator, requests, tiny_policy):
    generator = make_generator(servers)
    with pytest.raises(RuntimeError, match="call sync"):
        generate(generator, policy, requests, tiny_policy)
    generator.sync(policy, 0)
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(1.001)
    with pytest.raises(RuntimeError, match="call sync"):
        generate(generator, policy, requests, tiny_policy)


def test_what_a_dying_server_leaves_goes_to_the_other_and_counts_once(
    policy, servers, make_generator, requests, tiny_policy
):
    generator = make_generator(servers)
    generator.sync(policy, 0)
    servers[0].die_after = 5
    assert_each_request_has_its_own_rollout(generate(generator, policy, requests, tiny_policy), requests)
    assert len(servers[0].served) == 5
    assert sorted(servers[0].served + servers[1].served) == [request.seed for request in requests]


def test_a_server_that_comes_back_gets_the_current_weights_first(
    policy, servers, make_generator, requests, tiny_policy
):
    generator = make_generator(servers[:1], patience=10.0)
    generator.sync(policy, 0)
    servers[0].die_after = 5
    port = servers[0].port

    def restart():
        while servers[0].http is not None:
            time.sleep(0.01)
        time.sleep(0.3)
        servers[0].restart(port)

    thread = threading.Thread(target=restart)
    thread.start()
    rollouts = generate(generator, policy, requests, tiny_policy)
    thread.join()
    assert_each_request_has_its_own_rollout(rollouts, requests)
    assert servers[0].version.endswith("-0")
    assert sorted(servers[0].served) == [request.seed for request in requests]


def test_when_all_servers_stay_away_the_run_stops_and_says_what_is_missing(
    policy, servers, make_generator, requests, tiny_policy
):
    generator = make_generator(servers)
    generator.sync(policy, 0)
    servers[0].die_after, servers[1].die_after = 5, 3
    with pytest.raises(RuntimeError, match=r"all 2 vLLM servers have been down for 1 s with 32 of 40 .*r\.urls"):
        generate(generator, policy, requests, tiny_policy)


def test_a_push_goes_on_without_a_dead_server(policy, servers, make_generator, requests, tiny_policy):
    generator = make_generator(servers)
    generator.sync(policy, 0)
    servers[0].die()
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(1.001)
    with pytest.warns(UserWarning, match="goes without the weights"):
        generator.sync(policy, 1)
    assert_each_request_has_its_own_rollout(generate(generator, policy, requests, tiny_policy), requests)


def test_a_push_that_no_server_takes_names_the_folder(policy, servers, make_generator):
    generator = make_generator(servers, patience=0.3)
    generator.sync(policy, 0)
    for server in servers:
        server.die()
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(1.001)
    with (
        pytest.warns(UserWarning, match="goes without the weights"),
        pytest.raises(RuntimeError, match=r"none of the vLLM servers .* model\.generator\.weights_folder="),
    ):
        generator.sync(policy, 1)


def test_a_refused_request_is_not_tried_again(policy, servers, make_generator, make_prompt, tiny_policy):
    generator = make_generator(servers)
    generator.sync(policy, 0)
    with pytest.raises(ServerRefused, match="status 400: too long for this server"):
        generate(generator, policy, [RolloutRequest(make_prompt(0, (5,) * 50), 0, 1)], tiny_policy)


def test_a_prompt_that_may_not_fit_names_the_setting(policy, servers, make_generator, requests, tiny_policy):
    generator = make_generator(servers)
    generator.sync(policy, 0)
    with pytest.raises(ValueError, match=r"need 103 tokens, but model\.generator\.max_model_len is 64"):
        generate(generator, policy, requests, tiny_policy, max_response_length=100)


def test_a_server_that_is_not_there_is_named(policy, make_generator):
    with pytest.raises(RuntimeError, match=r"no vLLM server answers at http://127\.0\.0\.1:9 .*model\.generator\.urls"):
        make_generator(["http://127.0.0.1:9"], patience=0.3).sync(policy, 0)


@pytest.mark.parametrize("path", ["/weight_info", "/collective_rpc", "/inference/v1/generate"])
def test_a_server_without_what_is_needed_says_how_to_start_it(policy, servers, make_generator, path):
    servers[0].missing = (path,)
    with pytest.raises(RuntimeError, match="VLLM_SERVER_DEV_MODE=1, --enable-scale-out and --worker"):
        make_generator(servers).sync(policy, 0)


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ({"hidden_size": 99}, r"hidden_size 99 instead of 32.* model\.model_name="),
        ({"head_dim": 32}, "head_dim 32 instead of 16"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False instead of True"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 instead of float32.*--dtype float32"),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"chunked_prefill_on_cpu": True}, "--no-enable-chunked-prefill"),
        ({"max_model_len": 16}, r"model\.generator\.max_model_len is 32.*--max-model-len 32"),
    ],
)
def test_a_server_of_another_model_is_refused(policy, servers, make_generator, served, message):
    servers[1].description.update(served)
    with pytest.raises(RuntimeError, match=message):
        make_generator(servers, max_model_len=32).sync(policy, 0)


def test_attempts_are_further_and_further_apart_and_end_with_the_patience(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=clock.append))
    attempts = []

    def attempt():
        clock[0] = sum(clock)
        del clock[1:]
        attempts.append(clock[0])
        raise client.ServerDown("no answer")

    with pytest.raises(client.ServerDown):
        client.retry(attempt, patience=20.0)
    assert attempts == pytest.approx([0, 0.2, 0.7, 1.7, 3.7, 8.7, 13.7, 18.7])


@pytest.mark.parametrize("options", [{"urls": []}, {"urls": ["localhost:8000"]}, {"urls": ["http://a"], "patience": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=r"model\.generator\.(urls|patience)"):
        VLLMServerEngine(**options)


def test_connections_stay_open_and_are_no_more_than_requests_under_way(
    policy, servers, make_generator, requests, tiny_policy
):
    generator = make_generator(servers, requests_per_server=3)
    generator.sync(policy, 0)
    for _ in range(3):
        generate(generator, policy, requests, tiny_policy)
    assert len(servers[0].served + servers[1].served) == 3 * len(requests)
    assert all(1 <= server.num_connections <= 3 + 1 for server in servers)


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time limit"
        time.sleep(0.01)


def test_closing_the_engine_cancels_what_the_servers_work_on(policy, servers, make_generator, requests, tiny_policy):
    generator = make_generator(servers, time_limit=60.0)
    generator.sync(policy, 0)
    sample = generator.begin(policy, load_tokenizer(tiny_policy), longest=20, temperature=1.0)
    asked = [Request(request.prompt.token_ids, request.seed, 8) for request in requests]
    for server in servers:
        server.seconds = 60.0
    errors = []

    def run():
        try:
            sample(asked)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: all(len(server.served) == 4 for server in servers))
    generator.close()
    wait_until(lambda: all(sorted(server.aborted) == sorted(server.served) for server in servers))
    thread.join(5.0)
    assert errors == ["requests to the vLLM servers were cancelled: the run ends"]
    assert [len(server.served) for server in servers] == [4, 4]  # nothing new was begun


def test_a_job_that_fails_for_good_cancels_the_others(policy, servers, make_generator, make_prompt, tiny_policy):
    generator = make_generator(servers, time_limit=60.0)
    generator.sync(policy, 0)
    for server in servers:
        server.seconds = 60.0
    refused = RolloutRequest(make_prompt(9, (5,) * 50), 0, 1)
    requests = [*(RolloutRequest(make_prompt(0), i, i) for i in range(7)), refused]  # all under way at once
    with pytest.raises(ServerRefused, match="status 400: too long for this server"):
        generate(generator, policy, requests, tiny_policy)
    wait_until(lambda: all(sorted(server.aborted) == sorted(server.served) for server in servers))


def test_an_engine_can_be_used_again_after_it_was_closed(policy, servers, make_generator, requests, tiny_policy):
    generator = make_generator(servers)
    for version in range(2):
        generator.sync(policy, version)
        assert_each_request_has_its_own_rollout(generate(generator, policy, requests, tiny_policy), requests)
        generator.close()


def test_an_answer_that_is_not_json_is_one_line(policy, servers, make_generator, monkeypatch):
    monkeypatch.setattr(fake_vllm_server.json, "dumps", lambda result: "<html>a proxy")
    with pytest.raises(RuntimeError, match=r"/weight_info: the answer is not JSON: '<html>a proxy'\): it must be vLLM"):
        make_generator(servers[:1]).sync(policy, 0)
