r"""
The logits processor that ends the requests of mixed rollouts at their branch points.

A row of a mixed rollout is sampled by the policy until its coin falls on the expert: w is computed from the policy's
distribution at the request's temperature, the coin from the row's seed and the position alone, and at z = 1 one id is
left with probability 1, the branch id. The request, which names it among its `stop_token_ids`, ends there, also where
its length ends: vLLM looks for stop ids first. Whoever sent it drops the branch id, asks the expert for the token, and
goes on with a request for the longer prefix. The branch id and padding are masked for all requests, so that a request
ends in the branch id at branch points only.

w is a function of the policy's whole distribution; top_p, top_k and min_p truncate what is then drawn from.

The processor is loaded by name (`--logits-processors`, or the argument `logits_processors` of `vllm.LLM`), never by an
entry point: vLLM then keeps the ids that it shows to processors current under asynchronous scheduling, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ..errors import EngineError, SetupError
from .branch_coins import BranchTensors, branch_coins, on_device
from .branch_requests import BranchOptions, check_branching, parse_branching
from .options import PROCESSOR, TOKENS
from .token_table import TokenTable, engine_stop_ids


INTERFACES: tuple[type, ...] = (LogitsProcessor,)
try:  # of the V2 model runner, which knows processors since vLLM 0.31
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2
except ImportError:
    pass
else:
    INTERFACES += (LogitsProcessorV2,)


@dataclass
class _Row:
    """A request with gamma. The ids are lists that vLLM keeps current; the V2 model runner has them on the device."""

    options: BranchOptions
    temperature: float
    prompt: list[int]
    output: list[int]

    def near(self, ends: frozenset[int]) -> bool:
        """Whether one of the last ids ends a sentence."""
        recent = self.output[-self.options.span :]
        if recent and recent[-1] < 0:
            raise EngineError(
                "vLLM shows placeholders instead of the ids that it sampled last, and the rule 'sentence' needs them: "
                "start it with --no-async-scheduling."
            )
        missing = self.options.span - len(recent)
        return not ends.isdisjoint(recent) or (missing > 0 and not ends.isdisjoint(self.prompt[-missing:]))


class BranchingProcessor(*INTERFACES):
    """
    Args:
        vllm_config (`vllm.config.VllmConfig`):
            Configuration of the engine.
        place (`torch.device`, or `LogitsProcRequestState` of the V2 model runner):
            Device of the logits, or what knows it.
        is_pin_memory (`bool`, *optional*):
            Not used.
    """

    def __init__(self, vllm_config, place: Any, is_pin_memory: bool | None = None):
        check_engine(vllm_config)
        self.table = engine_tokens(vllm_config)
        self.states = None if is_pin_memory is not None else place
        self.device = place if self.states is None else place.device
        self._ends = frozenset(self.table.sentence_ids)
        self._rows: dict[int, _Row] = {}  # by row of the batch, or by slot
        self._batch: dict[int, _Row] = {}
        self._changed = True
        if self.states is not None:
            ends = torch.zeros(self.states.vocab_size, dtype=torch.bool)
            ends[list(self.table.sentence_ids)] = True
            self._ends_mask = ends.to(self.device)

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        check_branching(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        """Rows that came, went and moved, before each forward pass of the V1 model runner."""
        self._changed |= process_dict_updates(self._rows, batch_update, _new_row)

    def add_request(self, req_idx: int, sampling_params) -> bool:
        """A request that came, to the V2 model runner."""
        row = _new_row(sampling_params, None, [])
        if row is not None or req_idx in self._rows:
            self._changed = True
        if row is None:
            self._rows.pop(req_idx, None)
        else:
            self._rows[req_idx] = row
        return True  # the mask is for every request

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Mask what is never sampled, `(B, V)`, and leave rows at branch points the branch id alone."""
        logits[:, self.table.num_tokens :] = -torch.inf
        if self.table.branch_id < self.table.num_tokens:
            logits[:, self.table.branch_id] = -torch.inf
        if not self._rows:
            return logits
        if ctx is not None:
            slots = ctx.idx_mapping_np.tolist()
            batch = {row: self._rows[slot] for row, slot in enumerate(slots) if slot in self._rows}
            self._changed |= list(map(id, batch.values())) != list(map(id, self._batch.values()))
            self._changed |= batch.keys() != self._batch.keys()
        if self._changed:
            self._collect(self._rows if ctx is None else batch)
        if not self._batch:
            return logits
        positions, near = self._host_prefixes() if ctx is None else self._device_prefixes(ctx)
        every = len(self._batch) == logits.size(0)
        policy = None
        if self._tensors.need_entropy:
            policy = logits[:, : self.table.num_tokens]
            policy = policy if every else policy[self._index]
        coins = branch_coins(policy, self._tensors, positions, near)
        if not every:
            coins = coins.new_zeros(logits.size(0)).index_put_((self._index,), coins)
        logits.masked_fill_(coins.unsqueeze(-1), -torch.inf)
        logits[:, self.table.branch_id].masked_fill_(coins, 0.0)
        return logits

    def _collect(self, rows: dict[int, _Row]) -> None:
        self._batch, self._changed = dict(sorted(rows.items())), False
        options = [row.options for row in self._batch.values()]
        self._tensors = BranchTensors.of(options, [row.temperature for row in self._batch.values()], self.device)
        self._index = on_device(list(self._batch), torch.int64, self.device)

    def _host_prefixes(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Lengths of the prefixes of the rows with gamma, and whether a sentence begins behind them."""
        rows = self._batch.values()
        positions = on_device([len(row.prompt) + len(row.output) for row in rows], torch.int64, self.device)
        if "sentence" not in self._tensors.rules:
            return positions, None
        return positions, on_device([row.near(self._ends) for row in rows], torch.bool, self.device)

    def _device_prefixes(self, ctx) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same where the V2 model runner keeps the prefixes."""
        positions = ctx.pos[self._index].long() + 1
        if "sentence" not in self._tensors.rules:
            return positions, None
        spans = on_device([row.options.span for row in self._batch.values()], torch.int64, self.device).unsqueeze(1)
        back = torch.arange(1, max(row.options.span for row in self._batch.values()) + 1, device=self.device)
        at = positions.unsqueeze(1) - back
        recent = self.states.all_token_ids.gpu[ctx.idx_mapping[self._index].long().unsqueeze(1), at.clamp(min=0)]
        return positions, (self._ends_mask[recent.long()] & (back <= spans) & (at >= 0)).any(dim=1)


def _new_row(params, prompt: list[int] | None, output: list[int]) -> _Row | None:
    options = parse_branching(params.extra_args)
    return _Row(options, params.temperature, prompt or [], output) if options.gamma < float("inf") else None


def check_engine(vllm_config) -> None:
    """Raise [`SetupError`] if an engine could not branch exactly, with the fix."""
    wrong = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "prompts of embeddings (--enable-prompt-embeds)": getattr(
            vllm_config.model_config, "enable_prompt_embeds", False
        ),
        "watermarks": getattr(vllm_config, "watermark_config", None) is not None,
    }
    found = [name for name, asked in wrong.items() if asked]
    if found:
        raise SetupError(
            f"This engine branches mixed rollouts ({PROCESSOR}), and cannot do so with {', '.join(found)}: start it "
            "without."
        )


def engine_tokens(vllm_config) -> TokenTable:
    """What an engine knows of its tokens, from its policy's tokenizer, or from its `additional_config`."""
    config, additional = vllm_config.model_config, vllm_config.additional_config
    if isinstance(additional, dict) and TOKENS in additional:
        return TokenTable(**{**additional[TOKENS], "sentence_ids": tuple(additional[TOKENS].get("sentence_ids", ()))})
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer, revision=config.tokenizer_revision, trust_remote_code=config.trust_remote_code
    )
    return TokenTable.of(tokenizer, config.get_vocab_size(), engine_stop_ids(config))
