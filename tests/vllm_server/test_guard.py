"""Who may ask a server for what, and where its key is."""

import asyncio
import json
import os
import secrets
import socket
import stat

import httpx
import pytest

from mentor_trl.errors import SetupError
from mentor_trl.vllm_server import keys
from mentor_trl.vllm_server.guard import (
    BODY_BYTES,
    HOSTS,
    METHODS,
    ORIGINS,
    ExpertGuard,
    Guard,
    MixedGuard,
    PolicyGuard,
)
from mentor_trl.vllm_server.keys import KEY, KEY_FILE, default_key_file, key_of, read_key, store_key


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in (KEY, KEY_FILE, HOSTS, ORIGINS):
        monkeypatch.delenv(name, raising=False)


class App:
    """What stands behind the guard: answers 200 to everything, and keeps what it got."""

    def __init__(self):
        self.calls: list[tuple[str, bytes]] = []

    async def __call__(self, scope, receive, send):
        body = (await receive()).get("body", b"")
        self.calls.append((f"{scope['method']} {scope['path']}", body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def app():
    return App()


@pytest.fixture
def ask(app, monkeypatch):
    """`ask(method, path, ...)`: the answer to a request with the key, but for what is given; its app is `app`."""
    key = secrets.token_urlsafe(32)
    monkeypatch.setenv(KEY_FILE, str(store_key(key, 8000)))

    def ask(method, path, guard: type[Guard] = MixedGuard, headers=None, base="http://127.0.0.1:8000", **kwargs):
        async def send():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(guard(app)), base_url=base) as client:
                return await client.request(
                    method, path, headers={"Authorization": f"Bearer {key}", **(headers or {})}, **kwargs
                )

        return asyncio.run(send())

    return ask


HARMFUL = [
    ("POST", "/collective_rpc", {"method": "save_sharded_state", "args": ["/tmp/x"]}),
    ("POST", "/collective_rpc", {"method": "mentor_load_policy", "args": ["/tmp/x", "v"]}),
    ("POST", "/pause", {}),
    ("POST", "/resume", {}),
    ("POST", "/v1/completions", {"prompt": [1]}),
    ("POST", "/update_weights", {}),
    ("GET", "/v1/models", {}),
    ("GET", "/nowhere", {}),
]


@pytest.mark.parametrize(("method", "path", "body"), HARMFUL)
def test_nobody_without_the_key(method, path, body, ask, app):
    for key in ("", "Bearer", "Bearer ", "Bearer wrong", "Basic wrong", "Bearer \N{LATIN SMALL LETTER E WITH ACUTE}"):
        answer = ask(method, path, headers={"Authorization": key.encode("latin-1")}, json=body)
        assert answer.status_code == 401, key
    assert not app.calls


@pytest.mark.parametrize(("method", "path", "body"), HARMFUL)
def test_no_web_page(method, path, body, ask, app):
    """As `fetch(..., {mode: 'no-cors'})` sends it; even with the key."""
    for origin in ("http://evil.example", "null", "http://localhost:3000", "http://127.0.0.1:8000"):
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        assert ask(method, path, headers=headers, content=json.dumps(body)).status_code == 403
    assert not app.calls


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.nip.io", "localhost.evil", "", "[::"]
)
def test_no_name_that_a_page_points_here(host, ask, app):
    for method, path, body in [*HARMFUL, ("GET", "/health", {})]:
        assert ask(method, path, headers={"Host": host}, json=body).status_code == 403
    assert not app.calls


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "10.1.2.3", "[::1]:8000", "LOCALHOST:1", socket.gethostname()])
def test_addresses_and_own_names(host, ask):
    assert ask("GET", "/health", headers={"Host": host}).status_code == 200


def test_further_hosts_and_origins(ask, app, monkeypatch):
    monkeypatch.setenv(HOSTS, json.dumps(["gpu.example"]))
    monkeypatch.setenv(ORIGINS, json.dumps(["https://mine.example"]))
    mine = {"Host": "gpu.example:8000", "Origin": "https://mine.example"}
    assert ask("POST", "/v1/completions", headers=mine, json={}).status_code == 200
    assert ask("POST", "/v1/completions", headers={**mine, "Authorization": ""}, json={}).status_code == 401
    assert ask("OPTIONS", "/v1/completions", headers={**mine, "Authorization": ""}).status_code == 200
    assert ask("OPTIONS", "/v1/completions", headers={"Authorization": ""}).status_code == 401
    assert ask("POST", "/pause", headers={**mine, "Origin": "https://other.example"}).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/sleep"),
        ("POST", "/start_weight_update"),
        ("POST", "/abort_requests"),
        ("GET", "/server_info"),
        ("POST", "/invocations"),
        ("POST", "/pause/"),
        ("POST", "//pause"),
        ("GET", "/pause"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/openapi.json"),
        ("POST", "/health"),
        ("DELETE", "/v1/models"),
    ],
)
def test_no_endpoint_that_is_not_needed(method, path, ask, app):
    assert ask(method, path, json={}).status_code == 403
    assert not app.calls


def test_weights_of_each_kind_have_their_endpoint(ask):
    assert ask("POST", "/start_draft_weight_update").status_code == 200
    assert ask("POST", "/start_draft_weight_update", guard=PolicyGuard).status_code == 403
    assert ask("POST", "/start_weight_update", guard=PolicyGuard).status_code == 200
    assert ask("POST", "/v1/load_lora_adapter", guard=PolicyGuard).status_code == 200


def test_an_expert_is_asked_and_never_changed(ask, app):
    for path in ("/v1/completions", "/tokenize", "/detokenize"):
        assert ask("POST", path, guard=ExpertGuard).status_code == 200
    app.calls.clear()
    for path in ("/collective_rpc", "/pause", "/update_weights", "/start_weight_update", "/v1/load_lora_adapter"):
        assert ask("POST", path, guard=ExpertGuard, json={"method": "mentor_info"}).status_code == 403
    assert not app.calls


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"method": "save_sharded_state", "args": ["/tmp/x"]}', 403),
        (b'{"method": "mentor_info", "method": "save_sharded_state"}', 403),
        (b'{"method": "mentor_load_tensors", "args": []}', 403),
        (b'{"method": ["mentor_info"]}', 403),
        (b'{"method": "mentor_info", "kwargs": {"self": 1}}', 400),
        (b'{"method": "mentor_info", "args": "ab"}', 400),
        (b'["mentor_info"]', 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b"{}", 403),
        (b'"' + b"x" * BODY_BYTES + b'"', 413),
    ],
)
def test_no_method_that_is_not_needed(body, status, ask, app):
    assert ask("POST", "/collective_rpc", content=body).status_code == status
    assert not app.calls


def test_what_is_needed_gets_through(ask, app):
    for method in METHODS:
        assert ask("POST", "/collective_rpc", json={"method": method, "args": ["a", 1]}).status_code == 200
    assert [json.loads(body) for _, body in app.calls] == [{"method": m, "args": ["a", 1]} for m in METHODS]
    app.calls.clear()
    assert ask("POST", "/v1/completions", json={"prompt": [1]}).status_code == 200
    assert app.calls == [("POST /v1/completions", b'{"prompt":[1]}')]
    assert ask("GET", "/health", headers={"Authorization": ""}).status_code == 200


def test_sockets_are_closed_and_the_rest_of_the_server_lives(app, monkeypatch):
    monkeypatch.setenv(KEY_FILE, str(store_key("key", 8000)))
    seen, sent = [], []

    async def lifespan(scope, receive, send):
        seen.append(scope["type"])

    async def send(message):
        sent.append(message["type"])

    guard = MixedGuard(lifespan)
    asyncio.run(guard({"type": "lifespan"}, None, None))
    asyncio.run(guard({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))
    assert seen == ["lifespan"] and sent == ["websocket.close"]


def test_no_guard_without_a_key(tmp_path, monkeypatch):
    with pytest.raises(SetupError, match=KEY_FILE):
        MixedGuard(None)
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "empty"))
    with pytest.raises(SetupError, match="holds no key"):
        MixedGuard(None)


def test_only_the_user_can_read_a_key(tmp_path):
    mask = os.umask(0)
    try:
        (tmp_path / "mentor_trl").mkdir(mode=0o777)
        file = store_key("first", 8000)
        assert store_key("second", 8000) == file and read_key(file) == "second"
    finally:
        os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_a_folder_of_another_user_keeps_no_key(tmp_path, monkeypatch):
    monkeypatch.setattr(keys.os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(SetupError, match="belongs to user.*--api-key-file"):
        store_key("k", 8000)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="XDG_STATE_HOME"):
        store_key("k", 8000)


def test_where_a_client_finds_the_key(tmp_path, monkeypatch):
    local, remote = "http://localhost:8000", "http://gpu.example:8000"
    assert key_of(local) is None
    store_key("default", 8000)
    assert default_key_file(8000).exists() and key_of(f"http://{socket.gethostname()}:8000/") == "default"
    assert [key_of(url) for url in (local, "http://[::1]:8000", "http://127.0.0.2:8000")] == ["default"] * 3
    assert key_of(remote) is None and key_of("http://localhost:8001") is None and key_of("http://localhost") is None
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    assert key_of(remote) == key_of(local) == "from-file"
    monkeypatch.setenv(KEY, "from-environment")
    assert key_of(remote) == key_of(local) == "from-environment"
    assert key_of(remote, str(tmp_path / "key")) == "from-file"
    monkeypatch.setenv(KEY, "two words")
    with pytest.raises(SetupError, match=f"{KEY} holds no key"):
        key_of(local)
    with pytest.raises(SetupError, match="nowhere"):
        key_of(local, str(tmp_path / "nowhere"))
