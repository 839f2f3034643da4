"""Stock vLLM engines of tiny models in this process."""

import copy
import math

import torch

from mentor_trl.objective.coins import request_seed
from mentor_trl.rollout.stock.policy_llm import EngineRequests, PolicyLLM, drive
from mentor_trl.vllm_server.options import TOKENS


ENGINE_OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 2**26,
    "max_model_len": 64,
    "max_num_seqs": 256,
    "enforce_eager": True,
    "disable_log_stats": True,
}


# vLLM takes down the process groups of all engines when one of them is collected
KEPT: list = []


def with_padding(model):
    """The model with one more row of its vocabulary, whose logits are large."""
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(model.config.vocab_size + 1)
    with torch.no_grad():
        padded.get_output_embeddings().weight[-1] = 3.0 * padded.get_output_embeddings().weight[0]
    return padded


def make_policy(folder, model, sentence_ids=(), **options) -> PolicyLLM:
    """A policy's engine, whose vocabulary has one row of padding."""
    with_padding(model).save_pretrained(folder)
    size = model.config.vocab_size
    tokens = {"num_tokens": size, "branch_id": size, "sentence_ids": list(sentence_ids)}
    KEPT.append(PolicyLLM(str(folder), additional_config={TOKENS: tokens}, **{**ENGINE_OPTIONS, **options}))
    return KEPT[-1]


class LLMExpert:
    """An expert in a vLLM engine of this process."""

    max_length = 64

    def __init__(self, folder, model, **options):
        from vllm import LLM

        model.save_pretrained(folder)
        settings = {**ENGINE_OPTIONS, "logprobs_mode": "processed_logprobs", "generation_config": "vllm", **options}
        KEPT.append(LLM(str(folder), enable_chunked_prefill=False, **settings))
        self.requests = EngineRequests(KEPT[-1])
        self.asked = 0

    async def speak(self, prefix_ids, count, temperature, stop_token_ids, row_seed, truncation):
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=temperature,
            max_tokens=count,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,
            logprobs=0,
            top_p=truncation.top_p,
            top_k=truncation.top_k,
            min_p=truncation.min_p,
            seed=request_seed(row_seed, len(prefix_ids), "expert"),
            detokenize=False,
        )
        self.asked += 1
        output = (await self.requests.complete(prefix_ids, params)).outputs[0]
        ids = list(output.token_ids)
        return ids, [entry[index].logprob for entry, index in zip(output.logprobs, ids)]


class BothEngines(PolicyLLM):
    """A policy's engine that runs beside an expert's."""

    def __init__(self, policy: PolicyLLM, expert: LLMExpert):
        self.__dict__.update(policy.__dict__)
        self.expert = expert

    def run(self, call):
        return drive([self.requests, self.expert.requests], call)


def truncated(logps: list[float], top_p: float, top_k: int, min_p: float) -> list[float]:
    """Probabilities after truncation, as vLLM documents it: min_p, then top_k, then top_p."""
    probs = [math.exp(logp) for logp in logps]
    keep = [p >= min_p * max(probs) for p in probs]
    order = sorted(range(len(probs)), key=lambda y: -probs[y] * keep[y])
    if top_k:
        keep = [kept and y in order[:top_k] for y, kept in enumerate(keep)]
    total = sum(p for p, kept in zip(probs, keep) if kept)
    mass, nucleus = 0.0, set()
    for y in order:
        if keep[y] and mass < top_p * total:
            nucleus.add(y)
            mass += probs[y]
    total = sum(probs[y] for y in nucleus)
    return [probs[y] / total if y in nucleus else 0.0 for y in range(len(probs))]
