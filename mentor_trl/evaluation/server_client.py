"""lm-eval's client of OpenAI-compatible servers: a seed for each sample of a prompt, and the ends of completions."""

import json
import os
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import requests
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from mentor_trl.errors import SetupError
from mentor_trl.rewards.answers import completion_text

from .token_limit import Completion


# Prompts that are counted: the longest in characters
COUNTED = 16
DEFAULTS = {"num_concurrent": 32, "timeout": 7200, "max_retries": 3, "tokenizer_backend": None}


class _EndsAndSeeds:
    """
    lm-eval sends one seed with every request, so that a server which honours it gives the same sample 32 times, and
    does not look at the reason why a completion ends.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._drawn: Counter[str] = Counter()

    def _create_payload(self, messages: Any, *args: Any, seed: int = 0, **kwargs: Any) -> dict:
        prompt = json.dumps(messages)
        seed += self._drawn[prompt]
        self._drawn[prompt] += 1
        return super()._create_payload(messages, *args, seed=seed, **kwargs)

    def parse_generations(self, outputs: dict | list[dict], **kwargs: Any) -> list[Completion]:
        """Return the completions of one or several replies."""
        outputs = outputs if isinstance(outputs, list) else [outputs]
        choices = [sorted(output["choices"], key=lambda choice: choice["index"]) for output in outputs]
        return [
            Completion(self._text(choice), choice.get("finish_reason") == "length")
            for output in choices
            for choice in output
        ]

    def measure(self, prompts: list) -> tuple[int, int] | None:
        """Tokens of the longest prompt and positions of the model, if the server tells them, as vLLM does."""
        address = f"{self.base_url.partition('/v1')[0]}/tokenize"
        longest = sorted(prompts, key=lambda prompt: len(json.dumps(prompt)))[-COUNTED:]
        counts, positions = [], None
        for prompt in longest:
            try:
                body = {"model": self.model, **self._as_request(prompt)}
                reply = httpx.post(address, json=body, headers=_header(), timeout=30.0).raise_for_status().json()
                positions = int(reply["max_model_len"])
                counts.append(int(reply["count"]))
            except (httpx.HTTPError, ValueError, KeyError, TypeError):
                return None
        return max(counts), positions

    def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
        """Send the requests; what still fails after the retries is an error of the set-up."""
        try:
            return super().generate_until(*args, **kwargs)
        except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
            raise SetupError(
                f"The server refuses or does not answer: {error or type(error).__name__}; what it said is above. "
                "Prompt and `max_new_tokens` must fit its context length, and `timeout` in `model_args` its speed"
            ) from error


class ServerCompletions(_EndsAndSeeds, LocalCompletionsAPI):
    """Completions of a text, `/completions`."""

    def _text(self, choice: dict) -> str:
        return choice["text"]

    def _as_request(self, prompt: str) -> dict:
        return {"prompt": prompt}


class ServerChatCompletions(_EndsAndSeeds, LocalChatCompletion):
    """Completions of messages, `/chat/completions`."""

    def _text(self, choice: dict) -> str:
        return completion_text([choice["message"]])  # with reasoning that the server has parsed out of it put back

    def _as_request(self, prompt: Any) -> dict:
        return {"messages": json.loads(prompt.prompt)}


def make_server_model(
    model: str, base_url: str | None, model_args: dict[str, Any], apply_chat_template: bool, seed: int
) -> ServerCompletions | ServerChatCompletions:
    """
    Make the client of a server, whose address may lack `/v1`, after a look at what it serves. The seed is that of the
    first sample of each prompt; the next ones get the next numbers.
    """
    if not base_url:
        raise SetupError(
            "The back-end `server` needs the server's address; set `base_url`, as http://127.0.0.1:8000/v1"
        )
    root = _root(base_url)
    _check_served(root, model)
    client, route = ServerCompletions, "completions"
    if apply_chat_template:
        client, route = ServerChatCompletions, "chat/completions"
    return client(**{**DEFAULTS, **model_args, "model": model, "base_url": f"{root}/{route}", "seed": seed})


def _root(base_url: str) -> str:
    root = base_url.rstrip("/").removesuffix("/completions").removesuffix("/chat")
    parts = urlsplit(root)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SetupError(f"`base_url` is {base_url}; give an address as http://127.0.0.1:8000/v1")
    return root if parts.path else f"{root}/v1"


def _header() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _check_served(root: str, model: str) -> None:
    try:
        reply = httpx.get(f"{root}/models", headers=_header(), timeout=30.0)
        reply.raise_for_status()
        served = [entry["id"] for entry in reply.json()["data"]]
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 404:  # a server without a list of models
            return
        raise SetupError(f"The server at {root} refuses: {error}; check `base_url` and OPENAI_API_KEY") from error
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise SetupError(f"No server answers at {root} ({error or type(error).__name__}); check `base_url`") from error
    if model not in served:
        raise SetupError(f"The server at {root} serves {', '.join(served)}, not '{model}'; set `model` to one of them")
