"""One event loop in a thread of its own, for all connections of this process."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar


T = TypeVar("T")
_LOCK = threading.Lock()
_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork has no thread for its parent's


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop, which runs."""
    with _LOCK:
        if os.getpid() not in _LOOPS:
            loop = _LOOPS[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="mentor_trl connections", daemon=True).start()
        return _LOOPS[os.getpid()]


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns on the loop, for callers that are no coroutines; they may have a loop of their own."""
    future = asyncio.run_coroutine_threadsafe(coroutine, background_loop())
    try:
        return future.result()
    finally:
        future.cancel()


async def awaited(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns on the loop, for coroutines of any loop."""
    loop = background_loop()
    if asyncio.get_running_loop() is loop:
        return await coroutine
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))


async def gathered(call: Callable[..., Awaitable[T]], items: Iterable[Any], limit: int) -> list[T]:
    """What `call(item)` returns for each of the items, `limit` at once; the first that fails ends the others."""
    slots = asyncio.Semaphore(limit)

    async def one(item: Any) -> T:
        async with slots:
            return await call(item)

    tasks = [asyncio.ensure_future(one(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
