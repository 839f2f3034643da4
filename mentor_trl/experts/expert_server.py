"""One server of an expert, whose answers count only where it is known to be the server that was tested."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..connection.client import Client
from ..connection.contents import reading
from ..connection.failures import TRANSIENT, Exhausted
from .completions import PATH
from .self_test import START, Facts, SelfTest


T = TypeVar("T")
# A server that answered nothing for so long may have been restarted unseen. None comes up faster.
QUIET_SECONDS = 1.0


class ExpertServer:
    """
    Requests to one server. After a request that fails for want of an answer the server is tested again, waited for if
    it must be, and what it answered in the meantime is asked again. All of it runs on the connections' own loop.

    Args:
        client ([`~mentor_trl.connection.client.Client`]):
            Client of the server.
        test ([`~mentor_trl.experts.self_test.SelfTest`]):
            What the server has to prove.
    """

    def __init__(self, client: Client, test: SelfTest):
        self.client, self.test = client, test
        self.facts: Facts | None = None
        self.doubts = 0
        self._trusted = False
        self._answered, self._waiting = 0.0, 0
        self._testing: asyncio.Task | None = None

    async def complete(self, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """
        What `read` makes of the answer to a request for a completion.

        Raises:
            [`ServerError`]: if the server fails longer than it may, refuses the request, or answers something that
                cannot be read; [`WrongServer`], if it came back as another one.
        """
        failures = 0
        while True:
            await self.prove()
            doubts, failure = self.doubts, None
            self._waiting += 1
            try:
                answer = await self.client.ask(PATH, json=body)
                with reading(self.client.url, PATH):
                    found = read(answer)
            except TRANSIENT as error:
                failure = error
            finally:
                self._waiting -= 1
            if failure is None and doubts == self.doubts:
                self._answered = time.monotonic()
                return found
            if failure is not None:
                failures += 1
                if doubts == self.doubts:
                    self._doubt()
                if failures >= self.client.patience.attempts:
                    raise Exhausted(
                        f"{self.client.url} failed {failures} times at one request, last with "
                        f"{type(failure).__name__}: {failure}"
                    ) from failure
                await asyncio.sleep(self.client.patience.back_off * 2 ** (failures - 1))

    async def prove(self) -> Facts:
        """Make sure that the server is the one that was tested."""
        quiet = self._waiting == 0 and time.monotonic() - self._answered > QUIET_SECONDS
        while True:
            # One that is done stays here until the loop comes to `_tested`, which it would never while we wait for it
            if self._testing is None or self._testing.done():
                if self._trusted and not quiet:
                    return self.facts
                self._testing = asyncio.ensure_future(self._test())
                self._testing.add_done_callback(self._tested)
            await asyncio.shield(self._testing)
            quiet = False

    def _tested(self, task: asyncio.Task) -> None:
        if self._testing is task:
            self._testing = None
        if not task.cancelled():
            task.exception()

    def _doubt(self) -> None:
        self.doubts += 1
        self._trusted = False

    async def _test(self) -> None:
        if self._trusted:
            try:
                self._compare(await self.test.run_again(self.facts))
                self._answered = time.monotonic()
                return
            except TRANSIENT:
                self._doubt()
        self.facts = await self.client.wait(self._whole_test, START)
        self._trusted, self._answered = True, time.monotonic()

    async def _whole_test(self) -> Facts:
        return self._compare(await self.test.run())

    def _compare(self, found: Facts) -> Facts:
        if self.facts is None:
            return found
        self.facts.check_same(found, self.client.url, "came back as another server")
        return self.facts
