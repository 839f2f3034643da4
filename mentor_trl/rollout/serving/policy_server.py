"""A server that holds the policy: whether it is the right one, and the policy's weights on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ...connection.addresses import checked_address
from ...connection.client import Client, Patience
from ...connection.contents import content, reading
from ...connection.failures import Exhausted, WeightsLost, WrongServer
from ...vllm_server.keys import key_of
from ...vllm_server.options import INCOMPLETE, INITIAL
from . import facts


class PolicyServer:
    """
    A `mentor-trl serve` server, of the policy with its expert or alone.

    Args:
        url (`str`):
            Address of the server, as `http://127.0.0.1:8000`.
        num_tokens (`int`, *optional*):
            Number of ids that the policy's tokenizer defines, which the server must know.
        patience ([`~mentor_trl.connection.client.Patience`], *optional*):
            Time-outs and retries.
        concurrency (`int`, *optional*, defaults to `1024`):
            Rows that are sent at once.
        api_key_file (`str`, *optional*):
            File with the server's key. If not given, the key is in `MENTOR_TRL_API_KEY`, or, for a server on this
            machine, where `mentor-trl serve` has put it.

    Raises:
        [`ServerError`]: if no server answers in time, or [`WrongServer`], if it is not a MENTOR server, speaks for
            another vocabulary, or runs another version of this package.
        [`SetupError`]: if the address is none, or the file holds no key.
    """

    kind: str | None = None

    def __init__(
        self,
        url: str,
        num_tokens: int | None = None,
        patience: Patience | None = None,
        concurrency: int = 1024,
        api_key_file: str | None = None,
    ):
        self.client = Client(url, patience, partial(key_of, checked_address(url), api_key_file))
        self.url, self.patience, self.headers = self.client.url, self.client.patience, self.client.headers
        self.num_tokens = num_tokens
        self.concurrency = concurrency
        self._pushed: tuple[str | None, str] | None = None
        self._first: dict[str, Any] | None = None
        self.info = self._first = self.wait()
        self._adapter: tuple[str, str] | None = None
        with reading(self.url, "/v1/models", WrongServer):
            self.served_name = self.model_name = self._models()[0]

    @contextmanager
    def session(self) -> Iterator["PolicyServer"]:
        """
        Hold the policy's current weights, see [`load_policy`][PolicyServer.load_policy]. Makes sure on entry that the
        server answers, has them, and is not paused by a push that was cut off.
        """
        self.recover()
        yield self

    def check(self) -> dict[str, Any]:
        """Ask once what the server is: models, versions, vocabulary, draft length, context and weights."""
        return self.client.run(self._check())

    async def _check(self) -> dict[str, Any]:
        info = await facts.server_info(self.client, known=self._first is not None)
        facts.check_info(info, self.url, self.kind, self.num_tokens)
        if self._first is not None:
            facts.check_same(self._first, info, self.url)
        return info

    def wait(self) -> dict[str, Any]:
        """[`check`][PolicyServer.check], for as long as a server may take to come up."""
        return self.client.run(self.client.wait(self._check, facts.ADVICE))

    def load_policy(self, folder: str, version: str) -> None:
        """
        Replace the policy's weights on the server; the expert's stay as they are.

        Args:
            folder (`str`):
                Folder of safetensors files that the server sees under this name, see
                [`~mentor_trl.rollout.serving.weights.write_weights`]. It must stay until the next call: a server that
                was restarted is given these weights again.
            version (`str`):
                Name of these weights, another one than before.
        """
        self._pushed = str(folder), version
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return self._replace(lambda: self._call("mentor_load_policy", *self._pushed))
            except Exhausted:
                if attempt == self.patience.attempts:
                    raise
            self.info = self.wait()

    def receive_policy(self, send: Callable[[], None], version: str) -> None:
        """
        Replace the policy's weights by a transfer that does not go through a folder: `send` makes it while the server
        is paused. One that is restarted afterwards raises [`WeightsLost`] until this is called again.
        """
        self._pushed = None, version
        self.info = self.wait()

        def receive() -> None:
            self._call("mentor_name_weights", INCOMPLETE)
            send()
            self._call("mentor_name_weights", version)

        self._replace(receive)

    def load_adapter(self, folder: str, version: str) -> None:
        """
        Let a LoRA adapter take the place of the one before: a new name and folder each time, since vLLM keeps what it
        has computed for a prefix by these two. Rows ask for it by its name.

        Args:
            folder (`str`):
                Folder of the adapter, which the server sees under this name. It must stay until the next call.
            version (`str`):
                Name of the adapter.
        """
        if self.info["weights_version"] != INITIAL:
            raise WrongServer(
                f"{self.url} has other weights ({self.info['weights_version']!r}) than those that it was started "
                "with, and an adapter belongs to these. Restart it."
            )
        former, self._adapter = self._adapter, (str(folder), version)
        self._ensure_adapter()
        if former is not None and former[1] in self._models():
            self._tell("/v1/unload_lora_adapter", {"lora_name": former[1]})

    def _ensure_adapter(self) -> None:
        """Load the adapter where the server, which may have been restarted, does not have it."""
        folder, version = self._adapter
        if version not in self._models():
            self._tell("/v1/load_lora_adapter", {"lora_name": version, "lora_path": folder})
        self.model_name = version

    def _models(self) -> list[str]:
        with reading(self.url, "/v1/models", WrongServer):
            return [model["id"] for model in self._ask("/v1/models", "GET")["data"]]

    def _tell(self, path: str, body: dict[str, Any]) -> None:
        """A request whose answer is a text."""

        async def tell() -> None:
            response = await self.client.response(path, json=body)
            if not response.is_success:
                content(response, self.client.key_advice)

        self.client.run(self.client.retried(tell))

    def _replace(self, load: Callable[[], None]) -> None:
        """Change weights while no request runs, and leave nothing of the old ones in the prefix cache."""
        self._ask("/pause", params={"mode": "wait"})
        try:
            load()
            self._ask("/reset_prefix_cache")
        finally:
            self._ask("/resume")
        self.info = {**self.info, "weights_version": self._pushed[1]}

    def _ask(self, path: str, method: str = "POST", **kwargs: Any) -> Any:
        return self.client.run(self.client.retried(self.client.ask, path, method, **kwargs))

    def _call(self, method: str, *args: Any) -> Any:
        return self.client.run(self.client.retried(self.client.call, method, *args))

    def recover(self) -> None:
        """Wait until the server answers, and give it the current weights if it does not have them."""
        self.info = self.wait()
        if self._pushed is not None and self.info["weights_version"] != self._pushed[1]:
            if self._pushed[0] is None:
                raise WeightsLost(
                    f"{self.url} has the weights {self.info['weights_version']!r} and not {self._pushed[1]!r}: it was "
                    "restarted, or a transfer was cut off."
                )
            self.load_policy(*self._pushed)
        elif self.info["paused"]:
            self._ask("/resume")
        if self._adapter is not None:
            self._ensure_adapter()
