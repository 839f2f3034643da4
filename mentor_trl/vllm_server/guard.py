"""
What a `mentor-trl serve` server lets through. vLLM's own `--api-key` guards `/v1` alone, and its development endpoints
call any method of a worker for whoever reaches the port.
"""

import hashlib
import hmac
import ipaddress
import json
import os
import socket
from typing import Any
from urllib.parse import urlsplit

from ..errors import SetupError
from .keys import KEY_FILE, read_key


# Environment variables: JSON lists of names that a request may call this server, and of web pages that may ask it
HOSTS, ORIGINS = "MENTOR_TRL_ALLOWED_HOSTS", "MENTOR_TRL_ALLOWED_ORIGINS"
METHODS = ("mentor_info", "mentor_take_records", "mentor_name_weights", "mentor_load_policy", "mentor_digest")
BODY_BYTES = 64 << 20
HEALTH = ("GET", "/health")
RPC = ("POST", "/collective_rpc")
# Endpoints of any server, of one whose weights are replaced, and of one that takes adapters
ASKING = {
    *(("GET", path) for path in ("/health", "/v1/models", "/version", "/metrics", "/metrics/")),
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")),
}
LEARNING = {
    *(("GET", path) for path in ("/is_paused", "/get_world_size")),
    *(("POST", path) for path in ("/collective_rpc", "/pause", "/resume", "/reset_prefix_cache")),
    *(("POST", path) for path in ("/init_weight_transfer_engine", "/update_weights", "/finish_weight_update")),
}
ADAPTERS = {("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")}


class Refused(Exception):
    """A request that is not let through, with the status and the reason that are answered."""


class Guard:
    """
    ASGI middleware, the outermost one, that refuses what does not name this server, comes from a web page, has no key,
    or asks for what clients of this package do not need. `GET /health` needs no key. Without a file with a key in the
    environment it is a [`SetupError`].
    """

    endpoints: set[tuple[str, str]]

    def __init__(self, app: Any):
        if KEY_FILE not in os.environ:
            raise SetupError(f"The server has no key: set {KEY_FILE} to a file with one, or start it with mentor-trl.")
        self.app = app
        self.key = _hashed(read_key(os.environ[KEY_FILE]))
        own = socket.gethostname().lower()
        self.hosts = {"localhost", own, own.partition(".")[0], *json.loads(os.environ.get(HOSTS, "[]"))}
        self.origins = set(json.loads(os.environ.get(ORIGINS, "[]")))

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            endpoint = self._check(scope)
            if endpoint == RPC:
                receive = _replayed(_checked_call(await _body(receive)))
        except Refused as refused:
            return await _answer(send, *refused.args)
        return await self.app(scope, receive, send)

    def _check(self, scope: dict) -> tuple[str, str]:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_host(headers.get("host", ""))
        origin = headers.get("origin")
        if origin is not None and not self.origins & {origin, "*"}:
            raise Refused(403, f"web pages of {origin!r} may not ask this server (--allowed-origins)")
        endpoint = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
        preflight = origin is not None and endpoint[0] == "OPTIONS"  # a browser asks without the key first
        if endpoint == HEALTH or preflight:
            return endpoint
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_hashed(key), self.key):
            raise Refused(401, "this server wants its key, as `Authorization: Bearer KEY`")
        if endpoint not in self.endpoints:
            raise Refused(403, f"this server does not let {' '.join(endpoint)} through")
        return endpoint

    def _check_host(self, host: str) -> None:
        """A web page that points its own name to this machine (DNS rebinding) sends that name; an address is none."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
            if name not in self.hosts:
                ipaddress.ip_address(name)
        except ValueError:
            raise Refused(403, f"this server is not called {host!r} (--allowed-host)") from None


class MixedGuard(Guard):
    """Guard of a server of policy and expert, whose expert nobody overwrites."""

    endpoints = ASKING | LEARNING | {("POST", "/start_draft_weight_update")}


class PolicyGuard(Guard):
    """Guard of a server of a policy alone."""

    endpoints = ASKING | LEARNING | ADAPTERS | {("POST", "/start_weight_update")}


class ExpertGuard(Guard):
    """Guard of a server of an expert alone, which is asked and never changed."""

    endpoints = ASKING


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.strip().encode()).digest()


async def _body(receive: Any) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "the request was cut off")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > BODY_BYTES:
            raise Refused(413, f"a call of a worker's method takes at most {BODY_BYTES} bytes")
        if not message.get("more_body"):
            return b"".join(parts)


def _checked_call(body: bytes) -> bytes:
    """A call of a worker's method, written anew so that nobody behind reads it in another way."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the call of a worker's method is not JSON") from None
    if not isinstance(call, dict) or set(call) - {"method", "args"} or not isinstance(call.get("args", []), list):
        raise Refused(400, "a call of a worker's method has the entries `method` and `args`, and no other")
    if call.get("method") not in METHODS:
        raise Refused(403, f"this server does not let the method {str(call.get('method'))[:100]!r} through")
    return json.dumps({"method": call["method"], "args": call.get("args", [])}).encode()


def _replayed(body: bytes) -> Any:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict:
        return next(messages, {"type": "http.disconnect"})

    return receive


async def _answer(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
