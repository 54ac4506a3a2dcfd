"""A reward behind HTTP, against a server that answers as it is told, hangs, talks nonsense or is not there."""

import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dynamo_lightning.rewards import HttpReward, MathReward, WeightedReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.types import Prompt, Rollout

CALL = {"prompt": "2 + 3", "answer": "5"}


class Handler(BaseHTTPRequestHandler):
    """The response of the policy says what to do."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        command, _, argument = asked["response"].partition(" ")
        if command == "hang":
            time.sleep(float(argument))
        failing = command == "fail_once" and sum(a == asked for a in self.server.asked) == 1
        self.send_response(int(argument) if command == "status" else 503 if failing else 200)
        self.end_headers()
        if command == "drip":
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        self.wfile.write(argument.encode() if command == "say" else b'{"reward": 0.25}')

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # clients that went away
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def url(server):
    return f"http://127.0.0.1:{server.server_port}/score"


def test_the_endpoint_gets_everything_and_gives_the_number(server, url):
    assert HttpReward(url)(response="\ud800 hello", **CALL, level=3) == 0.25
    assert server.asked[-1] == {**CALL, "response": "\ud800 hello", "columns": {"level": 3}}
    assert HttpReward(url)(response="say 1", **CALL) == 1.0
    assert HttpReward(url, key="score")(response='say {"score": -2.5}', **CALL) == -2.5
    assert pickle.loads(pickle.dumps(HttpReward(url)))(response="", **CALL) == 0.25
    assert WeightedReward([MathReward(), HttpReward(url)], [1.0, 2.0])(response="5", **CALL) == 1.5


@pytest.mark.parametrize(
    "garbage", ["", "<html>", "NaN", "true", '"1"', "[1]", '{"score": 1}', '{"reward": null}', "1e999", "{" * 99]
)
def test_garbage_is_an_error_that_quotes_it(url, garbage):
    with pytest.raises(
        ValueError, match="must reply with a finite number or an object with one under 'reward', got b'"
    ):
        HttpReward(url)(response=f"say {garbage}", **CALL)


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_not(server, url):
    assert HttpReward(url)(response="fail_once a", **CALL) == 0.25
    with pytest.raises(RuntimeError, match=r"no reward from http://.* in 3 attempts: status 503"):
        HttpReward(url, attempts=3)(response="status 503", **CALL)
    server.asked.clear()
    with pytest.raises(RuntimeError, match="refused a response with status 403"):
        HttpReward(url)(response="status 403", **CALL)
    assert len(server.asked) == 1


def test_an_endpoint_that_hangs_or_is_not_there_is_an_error(url):
    with pytest.raises(RuntimeError, match=r"in 2 attempts: .*timed out"):
        HttpReward(url, timeout=0.2)(response="hang 2", **CALL)
    with pytest.raises(RuntimeError, match=r"in 1 attempts: .*refused"):
        HttpReward("http://127.0.0.1:9/", attempts=1)(response="", **CALL)


def test_an_endpoint_that_drips_for_ever_is_stopped_by_the_time_limit_and_the_others_are_scored(url):
    texts = ["a", "drip", "b", "say garbage", "hang 5", "c"]
    rollouts = [Rollout(Prompt(0, "", "", (1,), "5"), 0, (1,), (0.0,), text) for text in texts]
    with RewardScorer(HttpReward(url, timeout=0.4, attempts=1), ScoringConfig(time_limit=1.0)) as scorer:
        scores = scorer.score(rollouts)
    assert [score.failure for score in scores] == [None, "timeout", None, "crash", "crash", None]
    assert [score.reward for score in scores] == [0.25, 0.0, 0.25, 0.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://host/x"}, "url='ftp://host/x' must begin with http"),
        ({"url": "host/x"}, "must begin with http"),
        ({"url": "http://h", "timeout": 0.0}, "timeout > 0 and attempts ≥ 1, got 0.0 and 2"),
        ({"url": "http://h", "attempts": 0}, "got 2.0 and 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HttpReward(**settings)
