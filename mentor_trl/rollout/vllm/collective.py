"""What the main process does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ...errors import EngineError


T = TypeVar("T")


def on_main(accelerator: Accelerator, call: Callable[[], T], others: Callable[[], None] | None = None) -> T:
    """What a call returns on the main process, on every process. If it fails, it fails on every process."""
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = call()
        except Exception as error:
            failure = error
            kind = type(error) if isinstance(error, EngineError) else RuntimeError
            outcome[1] = kind(f"On the main process: {error}")
    elif others is not None:
        others()
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome, from_process=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
