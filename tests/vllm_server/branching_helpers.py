"""An engine that holds a policy of four tokens and branches, and the law of the requests that it answers."""

from collections.abc import Hashable
from typing import Any

import torch

from mentor_trl.vllm_server.options import (
    GAMMA,
    RULE,
    SEED,
    SHARE,
    SPAN,
    TOKENS,
    engine_environment,
    policy_engine_options,
)
from statistics_helpers import forward_logps
from vllm_helpers import ENGINE_OPTIONS, make_model


NUM_TOKENS, PADDED, BRANCH, END = 4, 6, 5, 1
TOKEN_OPTIONS = {TOKENS: {"num_tokens": NUM_TOKENS, "branch_id": BRANCH, "sentence_ids": [END]}}


def make_policy(seed: int = 12):
    """The policy as it is served, with two rows of padding, and without."""
    served, trimmed = make_model(seed=seed, vocab_size=PADDED), make_model(seed=seed, vocab_size=PADDED)
    trimmed.resize_token_embeddings(NUM_TOKENS)
    return served, trimmed.eval()


def make_engine(folder: str, **options: Any):
    import os

    os.environ.update(engine_environment(cpu=True))
    from vllm import LLM

    own = policy_engine_options(folder, cpu=True)
    return LLM(**{**ENGINE_OPTIONS, "max_num_batched_tokens": 4096, **own, **options}, additional_config=TOKEN_OPTIONS)


def sampling(row: int, gamma: float = 1.0, rule: str = "random", share: float = 0.5, span: int = 1, **params: Any):
    """Parameters of a segment of the row whose seed is `row`; of the plain policy without gamma."""
    from vllm import SamplingParams

    extra = {GAMMA: str(gamma), RULE: rule, SHARE: str(share), SPAN: span, SEED: str(row)}
    settings = {"max_tokens": 4, "ignore_eos": True, "stop_token_ids": [BRANCH], "detokenize": False, "logprobs": 0}
    return SamplingParams(**{**settings, "extra_args": extra, **params})


def generate(engine, prompts: list[list[int]], params: list) -> list:
    """The single outputs of requests."""
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def segment(output) -> tuple[Hashable, ...]:
    """Token ids of an output, the last one `"branch"` at a branch point."""
    ids = tuple("branch" if index == BRANCH else index for index in output.token_ids)
    assert "branch" not in ids[:-1] and (ids[-1:] == ("branch",)) == (output.stop_reason == BRANCH)
    return ids


@torch.no_grad()
def segments(
    policy, prompt, length, gamma, rule, share=0.5, span=1, temperature=1.0, stop=(), keep=None
) -> dict[tuple[Hashable, ...], float]:
    """Distribution of what [`segment`] returns. `keep(p)`: the distribution that is drawn from, truncated."""
    done: dict[tuple[Hashable, ...], float] = {}
    pending = {(): 1.0}
    while pending:
        prefix, chance = pending.popitem()
        ids = [*prompt, *prefix]
        p = forward_logps(policy, torch.tensor([ids]), temperature)[0, -1].exp()
        entropy = torch.special.entr(p).sum().item()
        w = {
            "entropy": min(1.0, entropy / gamma),
            "threshold": float(entropy >= gamma),
            "random": share,
            "always": 1.0,
            "sentence": share if END in ids[-span:] else 0.0,
        }[rule] * (gamma < float("inf"))
        done[(*prefix, "branch")] = chance * w
        for token, likely in enumerate((p if keep is None else keep(p)).tolist()):
            outcome = (*prefix, token)
            if len(outcome) == length or token in stop:
                done[outcome] = chance * (1 - w) * likely
            elif chance * (1 - w) * likely > 0.0:
                pending[outcome] = chance * (1 - w) * likely
    return done
