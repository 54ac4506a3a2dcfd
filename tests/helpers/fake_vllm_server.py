"""A stand-in for a vLLM server: the same endpoints, with transformers behind them, and faults on demand."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from dynamo_lightning.engines.vllm.weights import checksum, sequence_logprobs
from dynamo_lightning.engines.vllm.worker import describe_architecture


class FakeServer:
    """Serves until `die`; `restart` begins anew with the weights it was made with."""

    def __init__(self, policy):
        self.initial = {name: value.detach().clone() for name, value in policy.named_parameters()}
        self.policy = policy
        self.served = []  # seeds of the answered requests
        self.die_after = None  # requests after which it dies without an answer
        self.ignores_reloads = False
        self.num_reloads = 0
        self.missing = ()  # paths that it does not have
        self.depends_on_weights = False  # whether responses do
        self.seconds = 0.0  # that a response takes
        self.description = {
            **describe_architecture(policy.config),
            "dtype": "float32",
            "logprobs_mode": "processed_logprobs",
            "max_model_len": 64,
        }
        self.aborted = []  # seeds of the requests whose client went away
        self.num_connections = 0
        self.lock = threading.Lock()
        self.connection = threading.local()
        self.http = None
        self.restart(0)

    def restart(self, port):
        self.load(self.initial)
        self.version = "default"
        self.die_after = None
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self.handler())
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def die(self):
        http, self.http = self.http, None
        if http is not None:
            threading.Thread(target=http.shutdown, daemon=True).start()
            http.socket.close()

    def load(self, weights):
        with torch.no_grad():
            for name, value in self.policy.named_parameters():
                value.copy_(weights[name])

    def answer(self, path, body):
        if path == "/health":
            return None
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/collective_rpc":
            return {"results": [getattr(self, body["method"])(**body["kwargs"])]}
        assert path == "/inference/v1/generate", path
        return self.generate(body["token_ids"], body["sampling_params"])

    def reload_weights(self, weights_path):
        self.num_reloads += 1
        if not self.ignores_reloads:
            parts = [load_file(file) for file in sorted(Path(weights_path).glob("*.safetensors"))]
            self.load({name: value for part in parts for name, value in part.items()})

    def repack_tied_head(self):
        return False

    def describe_model(self):
        return self.description

    def weight_checksums(self):
        values = {name: str(checksum(value)) for name, value in self.policy.named_parameters()}
        return {"checksums": values, "packed": {}}

    def generate(self, token_ids, params):
        if "prompt_logprobs" in params:
            with self.lock:
                row = sequence_logprobs(self.policy, [token_ids])[0].tolist()
            entries = [{str(t): {"logprob": v}} for t, v in zip(token_ids[1:], row, strict=True)]
            return {"prompt_logprobs": [None, *entries], "choices": []}
        if "logprobs" not in params:
            return {"choices": []}  # the client tries whether there is such an endpoint
        if len(token_ids) > 40:
            raise ValueError("too long for this server")
        with self.lock:
            if self.die_after is not None and len(self.served) >= self.die_after:
                self.die()
                raise ConnectionAbortedError
            self.served.append(params["seed"])
        self.work(params["seed"])
        weights = checksum(self.policy.get_input_embeddings().weight) if self.depends_on_weights else 0
        tokens = [5 + (params["seed"] + weights) % 7, params["stop_token_ids"][0]]
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": [{"token_id": t, "logprob": -0.5} for t in tokens]},
            "weight_versions": [{"version": self.version, "start": 0, "end": 2}],
        }
        return {"choices": [choice]}

    def work(self, seed):
        """Takes its time, unless the client closes the connection: vLLM aborts such a request too."""
        end = time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0:
            readable, _, _ = select.select([self.connection.socket], [], [], min(left, 0.02))
            if readable and not self.connection.socket.recv(1, socket.MSG_PEEK):
                self.aborted.append(seed)
                raise ConnectionAbortedError

    def handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections stay open

            def setup(self):
                super().setup()
                server.connection.socket = self.request
                with server.lock:
                    server.num_connections += 1

            def log_message(self, *args):
                pass

            def handle_one(self, body):
                if server.http is not self.server:  # dead: the connection is closed without an answer
                    self.close_connection = True
                    return
                status, content = 200, b""
                try:
                    if self.path in server.missing:
                        status = 404
                    else:
                        result = server.answer(self.path, body)
                        content = json.dumps(result).encode() if result is not None else b""
                except ConnectionAbortedError:
                    self.close_connection = True
                    return
                except ValueError as error:
                    status, content = 400, str(error).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                self.handle_one(None)

            def do_POST(self):
                self.handle_one(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

        return Handler
