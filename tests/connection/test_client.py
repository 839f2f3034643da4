"""The client of servers: retries, counts, loops, and what is no answer."""

import asyncio

import pytest

from fake_server import FakeServer, serving
from mentor_trl.connection import background
from mentor_trl.connection.addresses import addresses
from mentor_trl.connection.client import Client, Patience
from mentor_trl.connection.failures import Exhausted, KeyRefused, ServerError, WrongServer
from mentor_trl.errors import SetupError


PATIENCE = Patience(connect=5.0, read=0.5, attempts=3, back_off=0.01, recovery=1.0)


class Echo(FakeServer):
    def answer(self, path, body):
        return {"path": path, **body}


@pytest.fixture
def fake():
    return Echo()


@pytest.fixture
def client(fake):
    with serving(fake) as url:
        yield Client(url, PATIENCE, key=lambda: fake.key)


def test_several_addresses():
    assert (
        addresses("http://a:1, https://b/ ") == addresses(["http://a:1", "https://b"]) == ["http://a:1", "https://b"]
    )
    for wrong, message in (("", "is not the address"), ([], "No address"), ("http://a,http://a/", "given twice")):
        with pytest.raises(SetupError, match=message):
            addresses(wrong)


def test_many_requests_from_any_loop_and_from_none(client):
    async def many():
        return await asyncio.gather(*(client.ask("/x", json={"n": n}) for n in range(50)))

    due = [{"path": "/x", "n": n} for n in range(50)]
    assert asyncio.run(many()) == client.run(many()) == asyncio.run(many()) == due
    assert client.requests == 150
    assert client.sent == 3 * sum(len(f'{{"n":{n}}}') for n in range(50))
    assert client.received == 3 * sum(len(f'{{"path": "/x", "n": {n}}}') for n in range(50))


def test_no_more_than_so_many_requests_at_once(fake):
    running, most = 0, []

    def answer(path, body):
        nonlocal running
        running += 1
        most.append(running)
        running -= 1
        return {}

    fake.answer = answer
    with serving(fake) as url:
        client = Client(url, PATIENCE, lambda: None, concurrency=2)
        client.run(background.gathered(client.ask, ["/x"] * 20, 20))
    assert len(most) == 20 and max(most) <= 2


@pytest.mark.parametrize("trouble", [500, "drop", "hang"])
def test_what_may_pass_is_tried_again(trouble, fake, client):
    fake.script["/x"] = [trouble] * 2
    assert client.run(client.retried(client.ask, "/x"))["path"] == "/x"
    fake.script["/x"] = [trouble] * 3
    with pytest.raises(Exhausted, match="failed 3 times in a row"):
        client.run(client.retried(client.ask, "/x"))
    assert len(fake.calls) == client.requests == 6


@pytest.mark.parametrize(("status", "error"), [(400, ServerError), (401, KeyRefused), (404, WrongServer)])
def test_refusals_are_not_repeated(status, error, fake, client):
    fake.script["/x"] = [status] * 2
    with pytest.raises(error, match=f"{status}"):
        client.run(client.retried(client.ask, "/x"))
    assert len(fake.calls) == 1


def test_the_key_is_looked_up_for_each_request(fake, client):
    for fake.key in ("one", "two"):
        assert client.run(client.ask("/x"))["path"] == "/x"


def test_a_server_is_waited_for(fake, client):
    fake.script["/x"] = [503, "drop"]
    assert client.run(client.wait(lambda: client.ask("/x"), "Start it"))["path"] == "/x"
    fake.script["/x"] = [503] * 1000
    with pytest.raises(ServerError, match="No server answers at .*after 1 s of trying. Start it, and look at its log"):
        client.run(client.wait(lambda: client.ask("/x"), "Start it"))


def test_the_first_failure_ends_the_others():
    seen = []

    async def call(item):
        seen.append(item)
        await asyncio.sleep(0.01 * item)
        if item == 1:
            raise ValueError("one")
        await asyncio.sleep(60.0)

    with pytest.raises(ValueError, match="one"):
        background.run(background.gathered(call, range(5), 3))
    assert len(seen) < 5
