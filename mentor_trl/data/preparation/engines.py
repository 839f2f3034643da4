"""What draws the expert's responses: transformers in process, vLLM in process, or a vLLM server."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from mentor_trl.data.loading import DataError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZES = {"transformers": 8, "vllm": 512, "server": 64}


@dataclass(frozen=True)
class Response:
    """
    One response of the expert.

    Args:
        text (`str`):
            What it says, without special tokens.
        finished (`bool`):
            Whether it ended by itself, not at the limit of its length.
    """

    text: str
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """
    How responses are drawn.

    Args:
        num (`int`, *optional*, defaults to `1`):
            Responses a prompt.
        temperature (`float`, *optional*, defaults to `0.6`):
            Temperature; `0` for the likeliest token.
        top_p (`float`, *optional*, defaults to `0.95`):
            Nucleus that is sampled from.
        max_new_tokens (`int`, *optional*, defaults to `4096`):
            Tokens that a response may have.
    """

    num: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.num < 1 or self.max_new_tokens < 1:
            raise DataError(f"`num` is {self.num} and `max_new_tokens` {self.max_new_tokens}; both must be 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise DataError(
                f"`temperature` is {self.temperature} and `top_p` {self.top_p}; use a temperature of 0 or more and a "
                "top_p above 0 and up to 1"
            )
        if self.temperature == 0 and self.num > 1:
            raise DataError(f"At `temperature` 0 all {self.num} responses are equal; set `num` to 1, or a temperature")


class Engine(Protocol):
    """Draws responses."""

    def generate(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """
        Draw `num` responses to each prompt.

        Args:
            prompt_ids (`Sequence[list[int]]`):
                Token ids of the prompts.
            seeds (`Sequence[int]`):
                A seed for each prompt.
        """


def choose_engine(engine: str, server_url: str | None) -> str:
    """Return `engine`, or for `auto` the server if there is a URL, vLLM if it is installed, transformers otherwise."""
    if engine == "auto":
        if server_url:
            return "server"
        return "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine == "server" and not server_url:
        raise DataError("`engine` is server; set `server_url` to its address, as http://127.0.0.1:8000")
    if engine != "server" and server_url:
        raise DataError(f"`server_url` is set, and `engine` is {engine}; leave one of them out")
    if engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise DataError("`engine` is vllm, which is not installed; run `pip install vllm`, or set it to transformers")
    return engine


class TransformersEngine:
    """
    transformers' `generate`, on a GPU where there is one.

    Args:
        model (`str`):
            Model id or folder of the expert.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        sampling ([`Sampling`]):
            How responses are drawn.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights.
        revision (`str`, *optional*):
            Revision of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that the repository ships.
    """

    def __init__(
        self,
        model: str,
        tokenizer: "PreTrainedTokenizerBase",
        sampling: Sampling,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        from transformers import GenerationConfig

        from mentor_trl.experts.load import load_expert, stop_token_ids

        expert = load_expert(model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model = expert.to("cuda" if torch.cuda.is_available() else "cpu")
        self.name, self.tokenizer = model, tokenizer
        self.stop_ids = stop_token_ids(self.model, tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]
        drawing = {"do_sample": False}
        if sampling.temperature > 0:
            drawing = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self.sampling = sampling
        # One of our own: the expert's may penalise repetitions, or cut the nucleus once more.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.num,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
            **drawing,
        )

    def generate(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """Draw `num` responses to each prompt; the first seed is that of the batch."""
        longest = max(len(ids) for ids in prompt_ids)
        self._check_length(longest)
        device = self.model.device
        padded = [[self.pad_id] * (longest - len(ids)) + list(ids) for ids in prompt_ids]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seeds[0])
            output = self.model.generate(
                input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device)
            )
        responses = [self._response(ids) for ids in output[:, longest:].tolist()]
        num = self.sampling.num
        return [responses[start : start + num] for start in range(0, len(responses), num)]

    def _check_length(self, longest: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest + self.sampling.max_new_tokens > limit:
            raise DataError(
                f"A prompt of {longest} tokens and `max_new_tokens` {self.sampling.max_new_tokens} exceed the context "
                f"of {self.name}, {limit} tokens; lower `max_new_tokens` to {max(limit - longest, 0)} or less, or "
                "make the prompts with a lower `max_prompt_tokens`"
            )

    def _response(self, ids: list[int]) -> Response:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return Response(self.tokenizer.decode(ids[:end], skip_special_tokens=True), finished=end is not None)


class VLLMEngine:
    """
    vLLM in process.

    Args:
        model (`str`):
            Model id or folder of the expert.
        sampling ([`Sampling`]):
            How responses are drawn.
        **options:
            Arguments of `vllm.LLM`; those that are `None` are left out.
    """

    def __init__(self, model: str, sampling: Sampling, **options):
        from vllm import LLM

        self.sampling = sampling
        self.llm = LLM(model=model, **{key: value for key, value in options.items() if value is not None})

    def generate(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """Draw `num` responses to each prompt."""
        from vllm import SamplingParams

        sampling = self.sampling
        params = [
            SamplingParams(
                n=sampling.num,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=seed,
            )
            for seed in seeds
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [[Response(o.text, o.finish_reason == "stop") for o in output.outputs] for output in outputs]


class ServerEngine:
    """
    A stock vLLM server (`vllm serve EXPERT`), asked through its OpenAI-compatible API.

    Args:
        url (`str`):
            Address, with or without `/v1`.
        model (`str`):
            Name under which the server serves the expert.
        sampling ([`Sampling`]):
            How responses are drawn.
        timeout (`float`, *optional*, defaults to `3600.0`):
            Seconds that one prompt may take.
        attempts (`int`, *optional*, defaults to `5`):
            Times that a request is sent, before a server that fails or cannot be reached is given up.
        pause (`float`, *optional*, defaults to `2.0`):
            Seconds before the second attempt; doubled before each further one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        timeout: float = 3600.0,
        attempts: int = 5,
        pause: float = 2.0,
    ):
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model, self.sampling, self.attempts, self.pause = model, sampling, attempts, pause
        self.client = httpx.Client(timeout=httpx.Timeout(timeout, connect=30.0))
        served = [entry["id"] for entry in self._request("GET", "/models")["data"]]
        if model not in served:
            raise DataError(
                f"The server at {url} serves {', '.join(served)}, not {model}; set `expert` to the name it serves, or "
                "start it with --served-model-name"
            )

    def generate(self, prompt_ids: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """Draw `num` responses to each prompt, all prompts at once."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max_workers=len(prompt_ids)) as pool:
            return list(pool.map(self._complete, prompt_ids, seeds))

    def _complete(self, ids: list[int], seed: int) -> list[Response]:
        sampling = self.sampling
        body = {
            "model": self.model,
            "prompt": list(ids),
            "n": sampling.num,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
            # Otherwise the server takes these from the expert's generation config.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        choices = sorted(self._request("POST", "/completions", json=body)["choices"], key=lambda c: c["index"])
        return [Response(choice["text"], choice["finish_reason"] == "stop") for choice in choices]

    def _request(self, method: str, path: str, **options) -> dict:
        import time

        import httpx

        for attempt in range(1, self.attempts + 1):
            try:
                answer = self.client.request(method, self.url + path, **options)
                if answer.status_code < 500:
                    break
                problem = f"answers {answer.status_code}: {answer.text[:300]}"
            except httpx.TransportError as error:
                problem = f"cannot be reached ({type(error).__name__}: {error})"
            if attempt < self.attempts:
                time.sleep(self.pause * 2 ** (attempt - 1))
        else:
            raise DataError(
                f"The server at {self.url} {problem}, {self.attempts} times; check `server_url` and the server, then "
                "run the command again to go on"
            )
        if answer.status_code != 200:
            raise DataError(f"The server at {self.url} refuses {path} ({answer.status_code}): {answer.text[:300]}")
        return answer.json()
