"""Rollouts by vLLM servers: other processes, on other devices or other machines, reached over HTTP.

Weights go to the servers by a folder that both sides see: the trainer writes them, the servers reload. A server is
started with three things that ours need (docs/vllm.md has the whole command):

    VLLM_SERVER_DEV_MODE=1 … --enable-scale-out \
        --worker-extension-cls dynamo_lightning.engines.vllm.worker.WeightSyncExtension

The development endpoints are open to whoever reaches the port: bind servers to loopback or to a private network.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.distributed import gather_objects, rank, stop_together
from dynamo_lightning.engines.engine import Request
from dynamo_lightning.engines.vllm.client import ServerClient, ServerDown, ServerRefused, retry
from dynamo_lightning.engines.vllm.engine import (
    EngineDtype,
    Output,
    TokenFilter,
    VLLMEngine,
)
from dynamo_lightning.engines.vllm.spread import Spread
from dynamo_lightning.engines.vllm.weights import sum_workers
from dynamo_lightning.engines.vllm.worker import WORKER_EXTENSION, describe_architecture
from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.files import folder_written_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 2 * 2**30
"""Size from which on a new file of weights is begun."""


class VLLMServerEngine(VLLMEngine):
    """Samples on one or several vLLM servers, which get the weights after each update.

    Rollouts go to whichever server has room. One that dies leaves its unfinished rollouts to the others; when it comes
    back it gets the current weights before it gets work.

    Args:
        urls: The servers, such as `http://localhost:8000`.
        weights_folder: Folder by which servers get the weights; on a file system that trainer and servers share.
        requests_per_server: Rollouts of each training process under way on a server at once.
        time_limit: Seconds for one response, and for a reload, after which a server counts as down.
        patience: Seconds to wait while no server can be reached, at the start too, before the run stops.
        max_model_len: Tokens of prompt and response together to make use of; `null` takes the servers' limit.
        dtype: Type the servers compute in; `auto` is that of the trainer: its mixed precision, or the policy's own.
        token_filter: Exclusion of unlikely tokens.
        max_logprob_difference: Largest mean difference between servers and policy on a few random sequences after a
            push, nats; `null` is 1e-4 for float32 and 0.2 for shorter types.
    """

    works_ahead = True

    def __init__(
        self,
        urls: list[str],
        weights_folder: str = "runs/vllm_weights",
        requests_per_server: int = 64,
        time_limit: float = 600.0,
        patience: float = 300.0,
        max_model_len: int | None = None,
        dtype: EngineDtype = "auto",
        token_filter: TokenFilter = TokenFilter(),  # noqa: B008  # its values show in --help and --print_config
        max_logprob_difference: float | None = None,
    ) -> None:
        super().__init__(max_model_len, dtype, token_filter, max_logprob_difference)
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise UserError(f"model.generator.urls needs one or several of the form http://host:port, got {urls}")
        for name, value in (
            ("requests_per_server", requests_per_server),
            ("time_limit", time_limit),
            ("patience", patience),
        ):
            if value <= 0:
                raise UserError(f"model.generator.{name} must be positive, got {value}")
        self.urls = [url.rstrip("/") for url in urls]
        self.weights_folder = Path(weights_folder)
        self.requests_per_server = requests_per_server
        self.time_limit = time_limit
        self.patience = patience
        self._run = ""
        self._saved: Path | None = None
        self._alive: list[str] = []
        self._client: ServerClient | None = None

    @property
    def client(self) -> ServerClient:
        """The connections to the servers, until `close`."""
        if self._client is None:
            # One connection per rollout under way, and one per server for what is asked meanwhile.
            self._client = ServerClient(len(self.urls) * (self.requests_per_server + 1))
        return self._client

    @override
    def label(self, version: int) -> str:
        """Version with a name of this run: another run may use the same servers."""
        return f"{self._run}-{version}"

    # --- the servers --------------------------------------------------------------------------------------------------

    @override
    def start(self, policy: PreTrainedModel, dtype: torch.dtype) -> None:
        if self._run:
            return
        limits, message = list[int](), ""
        try:
            if rank() == 0:
                limits = [self.check_server(url, policy, dtype) for url in self.urls]
        except RuntimeError as error:
            message = str(error)
        stop_together(message)
        limits = gather_objects(limits)
        if self.max_model_len is None:
            self.max_model_len = min(limits, default=None)
        self._run = gather_objects([uuid.uuid4().hex[:8]])[0]

    def check_server(self, url: str, policy: PreTrainedModel, dtype: torch.dtype) -> int:
        """Check that a server is there, can be given weights, and serves the policy's architecture.

        Returns:
            The longest prompt with response that it takes, tokens.

        Raises:
            RunError: Names what to change.
        """
        try:
            retry(lambda: self.client.call(url, "/health", time_limit=10), self.patience)
        except ServerDown as error:
            raise RunError(
                f"no vLLM server answers at {url} after {self.patience:.0f} s ({error}): start it, or correct "
                "model.generator.urls"
            ) from error
        try:
            served = self.client.run(self.describe(url))
        except (ServerRefused, ServerDown) as error:
            raise RunError(
                f"the server at {url} cannot be used ({error}): it must be vLLM 0.32, started with "
                f"VLLM_SERVER_DEV_MODE=1, --enable-scale-out and --worker-extension-cls {WORKER_EXTENSION}"
            ) from error
        wanted = {
            **describe_architecture(policy.config),
            "dtype": str(dtype).removeprefix("torch."),
            "logprobs_mode": "processed_logprobs",
        }
        wrong = [
            f"{name} {served[name]} instead of {value}"
            for name, value in wanted.items()
            if value is not None and served.get(name) not in (None, value)  # not every kind of model has every size
        ]
        if wrong:
            raise RunError(
                f"the server at {url} does not serve this policy: {', '.join(wrong)}. Start it with --model of the "
                f"architecture of model.model_name={policy.name_or_path}, --dtype {wanted['dtype']} (or change "
                "model.generator.dtype) and --logprobs-mode processed_logprobs"
            )
        if served.get("chunked_prefill_on_cpu"):
            raise RunError(
                f"the server at {url} must be started with --no-enable-chunked-prefill: on a CPU vLLM 0.32 dies of a "
                "request with a seed whose prompt is read in parts"
            )
        if self.max_model_len is not None and served["max_model_len"] < self.max_model_len:
            raise RunError(
                f"the server at {url} takes {served['max_model_len']} tokens, but model.generator.max_model_len is "
                f"{self.max_model_len}: lower it, or start the server with --max-model-len {self.max_model_len}"
            )
        return int(served["max_model_len"])

    async def describe(self, url: str) -> Mapping[str, Any]:
        """`describe_model` of a server's first worker, after a request to each endpoint that is needed later."""
        await self.client.request(url, "/weight_info", time_limit=10)
        served = (await self.rpc(url, "describe_model"))[0]
        await self.rpc(url, "repack_tied_head")  # a worker of an older version of ours has another name for it
        await self.sample(url, {"token_ids": [1], "sampling_params": {"max_tokens": 1, "detokenize": False, "seed": 0}})
        return served

    async def sample(self, url: str, body: Mapping[str, Any]) -> Any:
        """Answer of a server to a request of tokens."""
        return await self.client.request(url, "/inference/v1/generate", body, time_limit=self.time_limit)

    async def rpc(self, url: str, method: str, **kwargs: str) -> list[Any]:
        """Call a method of every worker of a server."""
        body = {"method": method, "kwargs": kwargs}
        answer = await self.client.request(url, "/collective_rpc", body, time_limit=self.time_limit)
        return answer["results"] if answer else []

    # --- weights ------------------------------------------------------------------------------------------------------

    @override
    def push(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Push from the first process; servers that are down are left out and get the weights later."""
        if rank() != 0:
            self._saved = self.weights_folder / version
            return
        before, self._saved = self._saved, save_weights(weights, self.weights_folder / version)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

        def push_to_all() -> list[str]:
            alive, message = [], ""
            for url, error in self.client.run(self.load_all(version)).items():
                if error is None:
                    alive.append(url)
                else:
                    message = str(error)
                    rank_zero_warn(f"vLLM server {url} is down and goes without the weights of {version}: {error}")
            if not alive:
                raise ServerDown(message)
            return alive

        try:
            self._alive = retry(push_to_all, self.patience)
        except ServerDown as error:
            raise RunError(
                f"none of the vLLM servers could be given the weights of version {version} within "
                f"{self.patience:.0f} s (last: {error}): see their logs, and whether they see "
                f"model.generator.weights_folder={self.weights_folder}; model.generator.patience is how long to wait"
            ) from error

    async def load_all(self, version: str) -> dict[str, ServerDown | None]:
        """Have all servers load the saved weights, at the same time; the error of each that is down."""

        async def load(url: str) -> ServerDown | None:
            try:
                await self.load(url, version)
            except ServerDown as error:
                return error
            return None

        return dict(zip(self.urls, await asyncio.gather(*map(load, self.urls)), strict=True))

    async def load(self, url: str, version: str) -> None:
        """Have a server load the saved weights.

        Raises:
            ServerDown: If it is down, or still at work with older weights.
        """
        assert self._saved is not None
        await self.rpc(url, "reload_weights", weights_path=str(self._saved.absolute()))
        await self.rpc(url, "repack_tied_head")
        if not (await self.client.request(url, "/reset_prefix_cache", {}, time_limit=self.time_limit))["success"]:
            raise ServerDown(f"{url} did not forget its prefix cache: requests of older weights are under way")
        await self.client.request(url, "/update_weight_version", {"new_version": version}, time_limit=self.time_limit)

    async def revive(self, url: str, version: str) -> None:
        """Make a server that was down usable: a new process has other weights."""
        await self.client.request(url, "/health", time_limit=10)
        if (await self.client.request(url, "/weight_info", time_limit=10))["weight_version"] != version:
            rank_zero_warn(f"vLLM server {url} came back with other weights and gets those of {version}")
            await self.load(url, version)

    @override
    def engine_state(self) -> list[Mapping[str, Any]]:
        """State of the servers that are up; empty except in the first process."""
        return [self.client.run(self.server_state(url)) for url in self._alive] if rank() == 0 else []

    async def server_state(self, url: str) -> Mapping[str, Any]:
        """Checksums over all workers of a server, and its version."""
        version = (await self.client.request(url, "/weight_info", time_limit=self.time_limit))["weight_version"]
        return {**sum_workers(await self.rpc(url, "weight_checksums")), "version": version}

    @override
    def close(self) -> None:
        """Cancel what is under way and remove the weights from the shared folder; the servers keep running."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._saved is not None and rank() == 0:
            shutil.rmtree(self._saved, ignore_errors=True)
        self._run, self._saved, self._synced = "", None, None

    # --- requests -----------------------------------------------------------------------------------------------------

    @override
    def complete(self, requests: Sequence[Request], params: Mapping[str, Any], version: str) -> list[Output]:

        async def work(url: str, request: Request) -> Output:
            own = {"max_tokens": request.max_tokens, "seed": request.seed}
            body = {"token_ids": list(request.token_ids), "sampling_params": {**params, **own}}
            choice = (await self.sample(url, body))["choices"][0]
            output = Output(
                tuple(choice["token_ids"]),
                tuple(token["logprob"] for token in choice["logprobs"]["content"]),
                frozenset(span["version"] for span in choice["weight_versions"] or ()),
            )
            if output.versions != {version}:  # the server was restarted behind our back
                raise ServerDown(f"{url} sampled from weights of version {sorted(output.versions)}")
            return output

        spread = Spread(
            self.urls,
            work,
            lambda url: self.revive(url, version),
            jobs_per_server=self.requests_per_server,
            patience=self.patience,
        )
        return self.client.run(spread.run(requests))

    @override
    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities by the servers that are up; empty except in the first process."""
        params = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        scores = []
        for url in self._alive if rank() == 0 else []:
            rows = []
            for sequence in sequences:
                body = {"token_ids": list(sequence), "sampling_params": params}
                answer = self.client.run(self.sample(url, body))["prompt_logprobs"]
                rows.append(
                    [values[str(token)]["logprob"] for token, values in zip(sequence[1:], answer[1:], strict=True)]
                )
            scores.append(torch.tensor(rows))
        return scores


def save_weights(weights: Iterator[tuple[str, Tensor]], folder: Path) -> Path:
    """Write weights as safetensors files of about 2 GiB; the folder appears when it is complete."""
    from safetensors.torch import save_file

    with folder_written_atomically(folder) as partial:
        shard: dict[str, Tensor] = {}
        number = 0
        for name, value in weights:
            shard[name] = value.cpu().contiguous()
            if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                save_file(shard, partial / f"model-{number:05d}.safetensors")
                shard, number = {}, number + 1
        if shard:
            save_file(shard, partial / f"model-{number:05d}.safetensors")
    return folder
