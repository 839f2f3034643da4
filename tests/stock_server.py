"""A stand-in for a stock vLLM server: real answers of a tiny model, over HTTP, without vLLM."""

import random
from typing import Any

import torch

from fake_server import FakeServer


class StockServer(FakeServer):
    """
    Serves a model. One that restarts serves `then`, if it is set. `raw` maps a path to what is answered there instead.
    `attributes` may be changed at any time: `processed` (the mode of log-probabilities), `stops` (ids that end a
    completion), `cut` (keeps only the most likely tokens, whatever is asked for).
    """

    def __init__(self, model, tokenizer, stops=(0,), name="expert", processed=True, positions=64):
        super().__init__()
        self.model, self.tokenizer, self.stops, self.processed = model, tokenizer, tuple(stops), processed
        self.entries = [{"id": name, "root": f"hub/{name}", "parent": None, "max_model_len": positions}]
        self.cut: int | None = None
        self.then: Any = None
        self.raw: dict[str, Any] = {}
        self.logits: dict[tuple[int, ...], torch.Tensor] = {}

    def restart(self) -> None:
        if self.then is not None:
            self.model, self.logits = self.then, {}

    def answer(self, path: str, body: dict) -> Any:
        if path in self.raw:
            return self.raw[path]
        if path == "/v1/models":
            return {"data": self.entries}
        if path == "/detokenize":
            return {"prompt": self.tokenizer.decode(body["tokens"])}
        assert path == "/v1/completions" and body["model"] in [entry["id"] for entry in self.entries]
        return self.complete(body)

    def next_logits(self, prefix: list[int]) -> torch.Tensor:
        with self.lock:
            if tuple(prefix) not in self.logits:
                with torch.no_grad():
                    logits = self.model(input_ids=torch.tensor([prefix])).logits[0, -1].double()
                self.logits[tuple(prefix)] = logits
            return self.logits[tuple(prefix)]

    def complete(self, body: dict) -> dict:
        prompt, chance = body["prompt"], random.Random(body.get("seed"))
        ids, logps, tops, reason = [], [], [], "length"
        for _ in range(body["max_tokens"]):
            logits = self.next_logits(prompt + ids)
            drawn = self._tempered(logits, body)
            index = chance.choices(range(len(drawn)), drawn.exp().tolist())[0]
            shown = drawn if self.processed else logits.log_softmax(-1)
            wanted = body.get("logprob_token_ids") or shown.topk(body["logprobs"]).indices.tolist()
            ids, logps = [*ids, index], [*logps, shown[index].item()]
            tops.append({f"token_id:{i}": max(shown[i].item(), -9999.0) for i in {*wanted, index}})
            if index in body["stop_token_ids"] or (not body["ignore_eos"] and index in self.stops):
                reason = "stop"
                break
        tokens = [f"token_id:{index}" for index in ids]
        logprobs = {"tokens": tokens, "token_logprobs": logps, "top_logprobs": tops}
        choice = {"text": "", "finish_reason": reason, "logprobs": logprobs}
        if body.get("prompt_logprobs") is not None:
            values = [self.next_logits(prompt[:at]).log_softmax(-1)[prompt[at]] for at in range(1, len(prompt))]
            entries = [{str(index): {"logprob": value.item()}} for index, value in zip(prompt[1:], values)]
            choice["prompt_logprobs"] = [None, *entries]
        return {"choices": [choice]}

    def _tempered(self, logits: torch.Tensor, body: dict) -> torch.Tensor:
        logits = logits / body["temperature"]
        if allowed := body.get("allowed_token_ids"):
            logits = torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(allowed), logits[allowed])
        if top := self.cut or body["top_k"]:
            logits = logits.masked_fill(logits < logits.topk(min(top, len(logits))).values[-1], -torch.inf)
        return logits.log_softmax(-1)
