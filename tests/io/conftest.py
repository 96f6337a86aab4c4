"""A local hub instead of the Hugging Face hub."""

import pytest
from hub_server import OWNER, Hub, ask
from huggingface_hub import constants, utils


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    monkeypatch.chdir(tmp_path)
    ask(monkeypatch, server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # before 1.0, a session opened offline by a test stays offline
    getattr(utils, "reset_sessions", lambda: None)()
    monkeypatch.setenv("HF_TOKEN", OWNER)
    yield server
    server.shutdown()
    server.server_close()
