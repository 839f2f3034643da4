"""Proxies, other programs and broken servers in the place of a server: one error that names it."""

import base64
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from test_server_client import PATIENCE, REQUEST, Fake

from fake_server import serving
from mentor_trl.cli.main import main
from mentor_trl.connection.failures import ServerError, WrongServer
from mentor_trl.errors import SetupError
from mentor_trl.rollout import MixedRequest
from mentor_trl.rollout.vllm.server import PolicyServerSampler, ServerSampler


class Raw(Fake):
    """A server that answers `raw`, bytes or what becomes JSON, where it is asked for one of its paths."""

    def __init__(self, raw: dict):
        super().__init__()
        self.raw = raw

    def answer(self, path, body):
        found = self.raw.get(body.get("method") or path)
        if found is None:
            return super().answer(path, body)
        return {"results": [found]} if path == "/collective_rpc" and not isinstance(found, bytes) else found


PAGE = b"<html>\n<title>Sign in</title>\n</html>"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            dict.fromkeys(["/health", "/collective_rpc", "mentor_info", "/v1/models"], PAGE),
            "not JSON: <html> <title>Sign",
        ),
        ({"/v1/models": PAGE}, "/v1/models answered .* not JSON"),
        ({"/v1/models": {"data": []}}, "answered /v1/models with something.*index out of range"),
        ({"/v1/models": {"data": None}}, "answered /v1/models with something"),
        ({"/is_paused": []}, "answered /is_paused with something"),
        ({"mentor_info": {}}, "says of itself '{}'"),
        ({"mentor_info": "e"}, "says of itself"),
        ({"mentor_info": {"error": "no such method"}}, "could not run mentor_info: no such method"),
        ({"mentor_info": {**Fake().info, "weights_version": "v", "max_model_len": "64"}}, "says of itself"),
        ({"mentor_info": {**Fake().info, "weights_version": "v", "max_model_len": 64, "kind": "m"}}, "says of itself"),
    ],
)
def test_servers_that_answer_something_else_are_named(raw, message, capsys):
    with serving(Raw(raw)) as url:
        with pytest.raises(WrongServer, match=message) as refused:
            ServerSampler(url, patience=PATIENCE)
        assert url in str(refused.value) and "\n" not in str(refused.value)
        assert main(["health", url]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("status", [301, 302, 403, 404, 405, 418])
def test_servers_that_refuse_are_not_waited_for(status):
    fake = Fake()
    fake.script["/collective_rpc"] = [status]
    with serving(fake) as url, pytest.raises(WrongServer, match=f"refused with {status}"):
        ServerSampler(url, patience=PATIENCE)
    assert sum(path == "/collective_rpc" for path, _ in fake.calls) == 1


@pytest.mark.parametrize("url", ["", "localhost:8000", "http://", "http://[::1", "http://a:port", "ftp://a", "/tmp/x"])
def test_what_is_no_address(url, capsys):
    with pytest.raises(SetupError, match="is not the address of a server: give one as http://127.0.0.1:8000"):
        ServerSampler(url, patience=PATIENCE)
    assert main(["health", url]) == 1
    assert "is not the address" in capsys.readouterr().err


TOKENS = {"token_ids": [1, 2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (PAGE, "not JSON: <html>"),
        ([], "list indices"),
        ({}, "no 'choices'"),
        ({"choices": []}, "index out of range"),
        ({"choices": None}, "NoneType"),
        ({"choices": [None]}, "NoneType"),
        ({"choices": [{"text": "abc"}]}, "no 'token_ids'"),
        ({"choices": [{"token_ids": None}]}, "the token ids of row [0-9]+ are None"),
        ({"choices": [{"token_ids": [1, None, 3]}]}, "the token ids of row"),
        ({"choices": [{"token_ids": [1, 2.5, 3]}]}, "the token ids of row"),
        ({"choices": [{"token_ids": [1, 2, 3, 4, -5]}]}, "the token ids of row"),
        ({"choices": [{"token_ids": [1, 2, 3, 4, 9]}]}, "the token ids of row"),
        ({"choices": [{"token_ids": []}]}, "has 0 tokens where 5 or a stop id were due"),
        ({"choices": [{"token_ids": [1, 2]}]}, "has 2 tokens where 5 or a stop id were due"),
        ({"choices": [{"token_ids": [1, 2, 3, 4, 5, 0]}]}, "has 6 tokens"),
    ],
)
def test_completions_of_another_shape_are_named(answer, message):
    with serving(Raw({"/v1/completions": answer})) as url:
        sampler = ServerSampler(url, patience=PATIENCE)
        with pytest.raises(ServerError, match=message) as refused:
            sampler.sample(REQUEST)
        assert url in str(refused.value)


def record(tokens=(1, 2, 3, 4, 5), start=1, fill=0.0) -> dict:
    values = np.full((len(tokens), 6), fill, dtype=np.float32)
    ids = np.array(tokens, dtype=np.int32)
    return {"start": start, "tokens": base64.b64encode(ids).decode(), "values": base64.b64encode(values).decode()}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "no 'weights_version'"),
        ({"weights_version": "v1", "rows": None}, "NoneType"),
        ({"weights_version": "v1", "rows": []}, "0 records of 1 rows"),
        ({"weights_version": "v1", "rows": [{}]}, "no 'tokens'"),
        ({"weights_version": "v1", "rows": [{**record(), "tokens": "%"}]}, "mentor_take_records"),
        (
            {"weights_version": "v1", "rows": [{**record(), "values": record((1,))["values"]}]},
            "records of row 0 are broken",
        ),
        ({"weights_version": "v1", "rows": [record((1, 2))]}, "records of row 0"),
        ({"weights_version": "v1", "rows": [record(start=2)]}, "records of row 0 begin at token 2"),
        ({"weights_version": "v1", "rows": [record(fill=math.nan)]}, "The policy's logits are NaN in row 0"),
        ({"weights_version": "v1", "rows": [record(fill=math.inf)]}, "records of row 0 are broken"),
    ],
)
def test_records_of_another_shape_are_named(found, message):
    with serving(Raw({"mentor_take_records": found})) as url:
        sampler = ServerSampler(url, patience=PATIENCE)
        sampler.load_policy("/shared/v1", "v1")
        with pytest.raises(ServerError, match=message) as refused:
            sampler.sample(MixedRequest([[1]], [1.0], 5, (0,)))
        assert url in str(refused.value)


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "NoneType"),
        ({"token_logprobs": None}, "NoneType"),
        ({"token_logprobs": [-0.1] * 4}, "5 tokens and 4 log-probabilities"),
        ({"token_logprobs": [-0.1, None, -0.1, -0.1, -0.1]}, "answered /v1/completions"),
        ({"token_logprobs": [-0.1, math.nan, -0.1, -0.1, -0.1]}, "not all finite"),
        ({"token_logprobs": [-0.1, -math.inf, -0.1, -0.1, -0.1]}, "not all finite"),
    ],
)
def test_log_probabilities_of_another_shape_are_named(logprobs, message):
    fake = Raw({"/v1/completions": {"choices": [{**TOKENS, "logprobs": logprobs}]}})
    fake.info = {**fake.info, "kind": "policy"}
    with serving(fake) as url:
        sampler = PolicyServerSampler(url, patience=PATIENCE)
        with pytest.raises(ServerError, match=message) as refused:
            sampler.sample(replace(REQUEST, gamma=[math.inf] * 12))
        assert url in str(refused.value)
