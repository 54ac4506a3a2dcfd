"""A language model as judge, against an endpoint that speaks chat completions and says what it is told."""

import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.rewards import JudgeReward

CALL = {"prompt": "Capital of France?", "answer": "Paris"}


class Handler(BaseHTTPRequestHandler):
    """The judge's reply is the text between the marks that the judge is asked about."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), asked))
        response = asked["messages"][0]["content"].split("<<<\n")[1].split("\n>>>")[0]
        self.send_response(200)
        self.end_headers()
        reply = {"choices": [{"message": {"role": "assistant", "content": response}}]}
        self.wfile.write(b"<html>" if response == "garbage" else json.dumps(reply).encode())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


def test_the_last_score_of_the_reply_counts(url):
    judge = pickle.loads(pickle.dumps(JudgeReward(url, "judge", max_score=10)))
    assert judge(response="Score: 2? No. Score: 7.5", **CALL) == 0.75
    assert judge.name == "judge"


def test_the_judge_gets_all_three_texts_in_one_pass(server, url, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    JudgeReward(url + "/", "judge", api_key_variable="JUDGE_KEY")(response="{answer} Score: 1", **CALL)
    path, key, asked = server.asked[-1]
    assert (path, key, asked["model"], asked["temperature"]) == ("/v1/chat/completions", "Bearer secret", "judge", 0.0)
    text = asked["messages"][0]["content"]
    assert "Capital of France?" in text and "\nParis\n" in text and "{answer} Score: 1" in text


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("no idea", "has no score that"),
        ("Score: 2", "score 2 is not from 0 to max_score=1"),
        ("garbage", "must reply with a chat completion, got b'<html>'"),
    ],
)
def test_a_reply_without_a_usable_score_is_an_error_that_quotes_it(url, response, message):
    with pytest.raises(RunError, match=message):
        JudgeReward(url, "judge")(response=response, **CALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "host"}, "must begin with http"),
        ({"instructions": "Is {answer} right?"}, r"no \{response\}"),
        ({"score_pattern": r"\d+"}, "has no group"),
        ({"score_pattern": "("}, "is no regular expression"),
        ({"max_score": 0.0}, "max_score > 0"),
        ({"attempts": 0}, "attempts ≥ 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        JudgeReward(**{"url": "http://h/v1", "model": "judge", **settings})


def test_a_missing_key_names_its_variable(url, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="api_key_variable='JUDGE_KEY' is not set"):
        JudgeReward(url, "judge", api_key_variable="JUDGE_KEY")(response="", **CALL)
