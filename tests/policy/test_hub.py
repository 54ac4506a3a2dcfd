"""A model that cannot be had is one line in a few seconds, whatever name it was given."""

import json
import socket

import pytest

from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.hub import require_model
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer


@pytest.fixture
def unreachable(monkeypatch):
    """A hub that refuses every connection, and counts how often it was asked."""
    asked = []

    def refuse(address, timeout):
        asked.append((address, timeout))
        raise ConnectionRefusedError("Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_policy(name, PolicyConfig())])
def test_a_hub_that_cannot_be_reached_is_asked_once(unreachable, load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    missing = r"model\.model_name='runs/missing': there is no such folder .*cannot be reached"
    with pytest.raises(UserError, match=missing):
        load("runs/missing")
    assert len(unreachable) == 1


def test_a_name_that_is_no_hub_id_is_not_asked_for(unreachable):
    with pytest.raises(UserError, match=r"model\.model_name='no model': there is no such folder .*is no hub id"):
        require_model("no model")
    assert not unreachable


def test_behind_a_proxy_the_hub_library_finds_its_way(unreachable, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    require_model("some/model")
    assert not unreachable


def test_a_folder_needs_no_hub(unreachable, tiny_policy):
    require_model(tiny_policy)
    assert not unreachable


def test_a_folder_without_weights_is_one_line(tiny_policy, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    with open(f"{tiny_policy}/config.json") as file:
        (folder / "config.json").write_text(json.dumps(json.load(file)))
    with pytest.raises(UserError, match=r"model\.model_name='.*half': [^\n]+$"):
        load_policy(str(folder), PolicyConfig())
