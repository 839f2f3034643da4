"""
What draws the expert's responses: transformers in process, vLLM in process, or a vLLM server.

An engine is a function of the prompts' token ids and a seed for each prompt; it returns `num` responses to each.
"""

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..loading import DataError
from .settings import TrajectoryArguments


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Response(NamedTuple):
    """A response, without special tokens, and whether it ended by itself, not at the limit of its length."""

    text: str
    finished: bool


Engine = Callable[[list[list[int]], list[int]], list[list[Response]]]


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


def transformers_engine(args: TrajectoryArguments, tokenizer: "PreTrainedTokenizerBase") -> Engine:
    """transformers' `generate`, on a GPU where there is one. The first seed is that of the batch."""
    import torch
    from transformers import GenerationConfig

    from mentor_trl.experts.compatibility import stop_token_ids
    from mentor_trl.experts.load import load_expert

    expert = load_expert(
        args.expert, revision=args.expert_revision, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    limit = getattr(expert.config.get_text_config(), "max_position_embeddings", None)
    stop_ids = stop_token_ids(expert, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = stop_ids[0]
    drawing = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    # One of our own: the expert's may penalise repetitions, or cut the nucleus once more.
    expert.generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        num_return_sequences=args.num,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        **(drawing if args.temperature > 0 else {"do_sample": False}),
    )

    def response(ids: list[int]) -> Response:
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        return Response(tokenizer.decode(ids[:end], skip_special_tokens=True), finished=end is not None)

    def draw(prompt_ids: list[list[int]], seeds: list[int]) -> list[list[Response]]:
        longest = max(map(len, prompt_ids))
        if limit is not None and longest + args.max_new_tokens > limit:
            raise DataError(
                f"A prompt of {longest} tokens and `max_new_tokens` {args.max_new_tokens} exceed the context of "
                f"{args.expert}, {limit} tokens; lower `max_new_tokens`, or make the prompts with a lower "
                "`max_prompt_tokens`"
            )
        batch = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(expert.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seeds[0])
            output = expert.generate(**batch)[:, longest:].tolist()
        responses = [response(ids) for ids in output]
        return [responses[start : start + args.num] for start in range(0, len(output), args.num)]

    return draw


def vllm_engine(args: TrajectoryArguments, tokenizer: Any = None) -> Engine:
    """vLLM in process."""
    from vllm import LLM, SamplingParams

    names = ("dtype", "trust_remote_code", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "seed")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    llm = LLM(model=args.expert, revision=args.expert_revision, **options)
    sampling = {"n": args.num, "temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_new_tokens}

    def draw(prompt_ids: list[list[int]], seeds: list[int]) -> list[list[Response]]:
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = llm.generate(prompts, [SamplingParams(**sampling, seed=seed) for seed in seeds], use_tqdm=False)
        return [[Response(o.text, o.finish_reason == "stop") for o in output.outputs] for output in outputs]

    return draw


def server_engine(args: TrajectoryArguments, tokenizer: Any = None, attempts: int = 5, pause: float = 2.0) -> Engine:
    """A stock vLLM server (`vllm serve EXPERT`), asked through its OpenAI-compatible API, all prompts at once."""
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    client = httpx.Client(
        base_url=args.server_url.rstrip("/").removesuffix("/v1") + "/v1", timeout=httpx.Timeout(3600.0, connect=30.0)
    )
    served = [model["id"] for model in _ask(client, "GET", "models", "data", attempts, pause)]
    if args.expert not in served:
        raise DataError(
            f"The server at {args.server_url} serves {', '.join(served)}, not {args.expert}; set `expert` to the name "
            "it serves, or start it with --served-model-name"
        )

    def complete(ids: list[int], seed: int) -> list[Response]:
        sampling = {"n": args.num, "temperature": args.temperature, "top_p": args.top_p, "seed": seed}
        # Otherwise the server takes these from the expert's generation config.
        sampling |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        body = {"model": args.expert, "prompt": ids, "max_tokens": args.max_new_tokens, **sampling}
        choices = _ask(client, "POST", "completions", "choices", attempts, pause, json=body)
        choices.sort(key=lambda choice: choice["index"])
        return [Response(choice["text"], choice["finish_reason"] == "stop") for choice in choices]

    def draw(prompt_ids: list[list[int]], seeds: list[int]) -> list[list[Response]]:
        with ThreadPoolExecutor(max_workers=len(prompt_ids)) as pool:
            return list(pool.map(complete, prompt_ids, seeds))

    return draw


def _ask(client: Any, method: str, path: str, key: str, attempts: int, pause: float, **options: Any) -> list[dict]:
    import time

    import httpx

    for attempt in range(attempts):
        time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
        try:
            answer = client.request(method, path, **options)
            if answer.status_code == 200:
                return answer.json()[key]
            problem = f"answers {answer.status_code} to {path}: {answer.text[:300]}"
            if answer.status_code < 500:
                break
        except httpx.TransportError as error:
            problem = f"cannot be reached ({type(error).__name__}: {error})"
        except (ValueError, KeyError, TypeError):
            problem = f"answers {path} with what is no list of `{key}`: {answer.text[:100]!r}"
            break
    raise DataError(
        f"The server at {client.base_url} {problem} (asked {attempt + 1} times); check `server_url` and the server, "
        "then run the command again to go on"
    )


# What makes an engine of the options and the expert's tokenizer, and how many prompts it draws at once
ENGINES = {"transformers": (transformers_engine, 8), "vllm": (vllm_engine, 512), "server": (server_engine, 64)}
