"""A stand-in for a stock vLLM server of a policy with the branching processor: real answers of a tiny model."""

import asyncio
import math
from collections import defaultdict
from typing import Any

from fake_server import FakeServer
from mentor_trl.rollout import MixedRequest
from mentor_trl.version import __version__
from mentor_trl.vllm_server.options import GAMMA, RULE, SEED, SHARE, SPAN, model_shape
from mentor_trl.vllm_server.token_table import TokenTable
from stock_helpers import EnumeratedPolicy


BRANCH_ID = 4  # behind the 4 tokens of the model


class PolicyStandIn(FakeServer):
    """
    Serves the policy of `models["initial"]`, or of the name that was last loaded. `late` shifts its coins, and
    `branches` says whether it has the processor at all.
    """

    def __init__(self, models: dict[str, Any], sentence_ids=()):
        super().__init__()
        self.policies = {name: EnumeratedPolicy(model) for name, model in models.items()}
        self.models, self.table = models, TokenTable(4, BRANCH_ID, tuple(sentence_ids))
        self.version, self.instance, self.branches, self.late, self.digest = "initial", 0, True, 0, "d0"
        self.adapters: dict[str, str] = {}
        self.max_model_len = 64

    @classmethod
    def of_tokenizer(cls, model, tokenizer) -> "PolicyStandIn":
        """With a tokenizer's ids, for training: a push renames the weights, and leaves them."""
        fake = cls({"initial": model})
        fake.policies = defaultdict(lambda: fake.policies["initial"], fake.policies)
        fake.table = TokenTable.of(tokenizer, model.config.vocab_size + 1)
        fake.max_model_len = model.config.max_position_embeddings
        return fake

    def restart(self) -> None:
        self.version, self.instance, self.adapters = "initial", self.instance + 1, {}

    def info(self) -> dict[str, Any]:
        return {
            "kind": "policy",
            "mentor_trl": __version__,
            "policy": "policy",
            "policy_shape": model_shape(self.models["initial"].config),
            "policy_digest": self.digest,
            "dtype": "float32",
            "max_model_len": self.max_model_len,
            "weights_version": self.version,
            "instance": str(self.instance),
            "branches": self.branches,
            "num_tokens": self.table.num_tokens,
            "branch_id": self.table.branch_id,
            "sentences_digest": self.table.digest,
        }

    def answer(self, path: str, body: dict) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": name} for name in ("policy", *self.adapters)]}
        if path == "/is_paused":
            return {"is_paused": False}
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"]
            return b"Success"
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return b"Success"
        if path == "/collective_rpc":
            method, args = body["method"], body["args"]
            if method == "mentor_load_policy":
                self.version = args[1]
            return {"results": [self.info()]}
        return self.complete(body) if path == "/v1/completions" else {}

    def complete(self, body: dict) -> dict:
        branch_id = self.table.branch_id
        assert (
            body["model"] in ("policy", *self.adapters) and body["ignore_eos"] and branch_id in body["stop_token_ids"]
        )
        assert (body["top_p"], body["top_k"], body["min_p"], body["n"]) == (1.0, 0, 0.0, 1)
        entries = body["vllm_xargs"]
        request = MixedRequest(
            [body["prompt"]],
            [float(entries.get(GAMMA, math.inf))],
            body["max_tokens"],
            tuple(index for index in body["stop_token_ids"] if index != branch_id),
            temperature=body["temperature"],
            branch_rule=entries.get(RULE, "entropy"),
            share=entries.get(SHARE, 0.0),
            span=entries.get(SPAN, 1),
            sentence_ids=self.table.sentence_ids,
            row_seeds=(int(entries.get(SEED, 0)) + self.late,),
        )
        segment = asyncio.run(
            self.policies[self.version].segment(request, 0, body["prompt"], body["max_tokens"], None)
        )
        ids, logps = list(segment.token_ids), list(segment.logps)
        if segment.branched:
            ids, logps = [*ids, branch_id], [*logps, 0.0]
        return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": "stop"}]}
