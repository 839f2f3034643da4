"""The policy's weights on their way to a server over NCCL."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from trl.generation.vllm_client import VLLMClient

from ...connection.failures import ServerError
from .policy_server import PolicyServer


class PolicyWeightClient(VLLMClient):
    """Sends the policy's weights over NCCL to a server that holds it alone, meeting it at `group_port`."""

    def __init__(self, server: PolicyServer, group_port: int, device: torch.device):
        self.server = server
        super().__init__(base_url=server.url, group_port=group_port, connection_timeout=server.patience.connect)
        self.device = device
        self._sent: str | None = None

    def _get(self, url: str, **kwargs: Any) -> dict:
        return super()._get(url, headers=self.server.headers(), timeout=self.server.patience.read, **kwargs)

    def _post(self, url: str, **kwargs: Any) -> dict:
        return super()._post(url, headers=self.server.headers(), timeout=self.server.patience.read, **kwargs)

    def push(
        self, metadata: list[tuple[str, str, list[int]]], params: Iterator[tuple[str, torch.Tensor]], version: str
    ) -> None:
        """
        Replace the policy's weights on the server; `metadata` are name, data type and shape of each of them. A
        [`ServerError`] if the transfer fails, or does not end within the read time-out.
        """
        if self.server.wait()["weights_version"] != self._sent:
            self.close_communicator()  # the server was started anew, and nobody is at the other end

        def transfer() -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread begins on the first one
            if self.communicator is None:
                self.init_communicator(self.device)
            self.update_named_params(metadata, params)

        self._sent = None
        self.server.receive_policy(lambda: bounded(transfer, self.server.patience.read), version)
        self._sent = version


class DraftWeightClient(PolicyWeightClient):
    """Sends them to a server that also holds the expert, which TRL's client would overwrite."""

    def _start_weight_update(self) -> None:
        self._post(f"{self.base_url}/start_draft_weight_update", json={})


def bounded(call: Callable[[], None], seconds: float) -> None:
    """
    Run a call that may never return, such as an NCCL transfer whose other end has died. A [`ServerError`] if it fails,
    or is not done after `seconds`.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise ServerError(f"The policy's weights did not get through in {seconds:.0f} s. Look at the server's log.")
    if failures:
        raise ServerError(f"The policy's weights could not be transferred: {failures[0]}") from failures[0]
