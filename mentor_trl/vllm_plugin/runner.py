"""
The mixed policy inside vLLM's model runner.

After the expert's pass over the scheduled tokens the runner asks [`MixedRunner.sample`] for the next tokens. Rows come
in two kinds. A *drafted* row brings tokens that the policy drafted in the step before, with their full distributions:
they are coupled with the expert, and behind them no bonus token is drawn, since the policy has no distribution there.
Any other row (first token, after a preemption, near the length limit, drafts that were padded or lost) has no
distribution of the policy: there the policy reads the scheduled tokens itself, and one token is drafted on the spot.
Both kinds are exact.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import AutoTokenizer
from vllm.forward_context import set_forward_context
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

from ..objective import mixture_logps, sentence_endings
from ..vllm_server.token_table import TokenTable, engine_stop_ids
from .mixing import Round, RowTensors, exponential_race, policy_probs, sample_round
from .records import RecordStore
from .requests import RowOptions, parse_row


@dataclass
class _Plan:
    """Which drafts of a step are judged: per row, how many are scheduled, and whether they are the policy's own."""

    counts: list[int]
    drafted: list[bool]
    live: list[bool]

    @property
    def undrafted(self) -> list[int]:
        return [row for row, live in enumerate(self.live) if live and not self.drafted[row]]


def _pick(values: torch.Tensor, index: list[int]) -> torch.Tensor:
    """`values[index]`, without a copy where that is all of them."""
    if index == list(range(len(values))):
        return values
    return values[torch.tensor(index).to(values.device)]


class MixedRunner:
    """
    Gives a model runner of vLLM, whose drafter holds the policy, the mixed policy by replacing three methods of that
    one object.
    """

    def __init__(self, runner, num_tokens: int | None = None, sentence_ids: list[int] | None = None):
        self.runner = runner
        self._given_sentence_ids = sentence_ids
        speculative = runner.speculative_config
        self.vocab_sizes = {
            "policy": speculative.draft_model_config.get_vocab_size(),
            "expert": runner.model_config.get_vocab_size(),
        }
        known = min(self.vocab_sizes.values())
        if num_tokens is not None and num_tokens > known:
            raise ValueError(
                f"The tokenizer defines {num_tokens} ids, and the models have rows for {self.vocab_sizes}. Resize the "
                "token embeddings of the smaller model."
            )
        self.num_tokens = num_tokens or known
        self.records = RecordStore()
        self.counts = dict.fromkeys(("rounds", "drafted", "undrafted", "policy_passes"), 0)
        self._options: dict[str, RowOptions] = {}
        self._names: list[str] = []
        self._tensors: RowTensors | None = None
        self._state = None
        self._sample_tokens = runner.sample_tokens
        runner.sample_tokens, runner._sample = self.sample_tokens, self.sample
        runner.drafter._sample_from_logits = self.sample_draft

    def policy(self) -> tuple[torch.nn.Module, Any]:
        """Model and model config of the policy."""
        return self.runner.get_draft_model(), self.runner.speculative_config.draft_model_config

    def info(self) -> dict[str, Any]:
        """What the engine is beside what one of a policy alone is."""
        return {
            "kind": "mixed",
            "expert": self.runner.model_config.model,
            "expert_stop_ids": engine_stop_ids(self.runner.model_config),
            "vocab_sizes": self.vocab_sizes,
            "num_tokens": self.num_tokens,
            "draft_length": self.runner.num_spec_tokens,
            "sentences_digest": self.sentences_digest,
            "counts": dict(self.counts),
        }

    @cached_property
    def sentence_ids(self) -> frozenset[int]:
        """Ids behind which a sentence may begin, for the branch rule `"sentence"`."""
        if self._given_sentence_ids is not None:
            return frozenset(self._given_sentence_ids)
        config = self.runner.model_config
        options = {"revision": config.tokenizer_revision, "trust_remote_code": config.trust_remote_code}
        return frozenset(sentence_endings(AutoTokenizer.from_pretrained(config.tokenizer, **options)))

    @cached_property
    def sentences_digest(self) -> str | None:
        """Of the table of sentence ends; `None` where there is no tokenizer to make it."""
        try:
            return TokenTable(0, 0, tuple(sorted(self.sentence_ids))).digest
        except (OSError, ValueError):
            return None

    def sample_tokens(self, grammar_output):
        """Keep what the forward pass left for the sampler, which vLLM clears before it samples."""
        self._state = self.runner.execute_model_state
        try:
            return self._sample_tokens(grammar_output)
        finally:
            self._state = None

    def sample_draft(self, logits: torch.Tensor, sampling_metadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft a token of each row from the policy's logits `(B, V_policy)`; returns ids and distributions."""
        probs = policy_probs(logits, sampling_metadata.temperature, self.num_tokens)
        return exponential_race(probs), probs

    def sample(self, logits: torch.Tensor, spec_decode_metadata) -> SamplerOutput:
        """Next tokens of all rows: `(B, S + 1)`, -1 behind a row's last."""
        runner, batch = self.runner, self.runner.input_batch
        temperature = batch.sampling_metadata.temperature
        plan = self._plan(spec_decode_metadata)
        first, logit_positions = self._first_logits(plan, spec_decode_metadata)
        hidden = None
        if plan.undrafted or not runner._input_fits_in_drafter(self._state.spec_decode_common_attn_metadata):
            # Also where the drafter is about to be skipped: else its cache would have holes at these tokens
            hidden = self._policy_pass()
        drafts, probs, row, step = self._drafts(plan, spec_decode_metadata, hidden, logit_positions, first)
        width = max(plan.counts, default=0) + 1
        options = self._row_tensors(batch.req_ids, logits.device)
        near = self._near(drafts, row, step) if "sentence" in options.rules else None
        shape = len(plan.counts), width
        committed = sample_round(
            drafts, probs, logits, first[row] + step, row, step, temperature[row], options, shape, near
        )
        return self._output(plan, committed, batch, spec_decode_metadata is not None)

    def _plan(self, metadata) -> _Plan:
        runner, batch = self.runner, self.runner.input_batch
        live = (~runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        counts = [0] * batch.num_reqs if metadata is None else list(metadata.num_draft_tokens)
        drafted = [False] * batch.num_reqs
        if runner._draft_probs is not None and any(counts):
            proposed, ids = runner._get_draft_token_ids_cpu()
            known = dict(zip(ids, proposed))
            if list(ids) != list(runner._draft_prob_req_ids):
                known = {}
            scheduled = self._state.scheduler_output.scheduled_spec_decode_tokens
            for row, name in enumerate(batch.req_ids):
                # Equality tells the policy's drafts from padding and from drafts whose distributions are gone
                drafted[row] = counts[row] > 0 and known.get(name, ())[: counts[row]] == scheduled[name]
        return _Plan(counts, drafted, live)

    def _first_logits(self, plan: _Plan, metadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of each row's first logits, and the scheduled token that all logits belong to."""
        if metadata is None:
            positions = self._state.spec_decode_common_attn_metadata.query_start_loc[1:] - 1
            return torch.arange(len(plan.counts), device=positions.device), positions
        counts = torch.tensor(plan.counts) + 1
        return (counts.cumsum(0) - counts).to(metadata.logits_indices.device), metadata.logits_indices

    def _drafts(self, plan: _Plan, metadata, hidden, logit_positions, first):
        """Drafts of the step with their distributions, request-major: ids, probs, row and step of each."""
        runner, device = self.runner, first.device
        where = {name: at for at, name in enumerate(runner._draft_prob_req_ids or ())}
        length = 0 if runner._draft_probs is None else runner._draft_probs.size(1)
        row, step, flat, cached, offset = [], [], [], [], 0
        for at, (name, count) in enumerate(zip(runner.input_batch.req_ids, plan.counts)):
            if plan.drafted[at]:
                row += [at] * count
                step += range(count)
                flat += range(offset, offset + count)
                cached += range(where[name] * length, where[name] * length + count)
            offset += count
        new = plan.undrafted
        self.counts["drafted"] += len(row)
        self.counts["undrafted"] += len(new)
        ids, probs = [torch.empty(0, dtype=torch.long, device=device)], []
        if row:
            ids.append(_pick(metadata.draft_token_ids, flat).long())
            probs.append(_pick(runner._draft_probs.flatten(0, 1), cached))
        if new:
            at = torch.tensor(new).to(device)
            policy = runner.drafter.model.compute_logits(hidden[logit_positions[first[at]]])
            probs.append(policy_probs(policy, runner.input_batch.sampling_metadata.temperature[at], self.num_tokens))
            ids.append(exponential_race(probs[-1]))
        if not probs:
            probs.append(torch.empty(0, self.num_tokens, device=device))
        row, step = torch.tensor([row + new, step + [0] * len(new)], dtype=torch.long).to(device).unbind(0)
        return torch.cat(ids), probs[0] if len(probs) == 1 else torch.cat(probs), row, step

    def _near(self, drafts: torch.Tensor, row: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Which drafts are among the first of a sentence, `(N,)`."""
        batch, found, ids = self.runner.input_batch, [], drafts.tolist()
        for at, (r, k) in enumerate(zip(row.tolist(), step.tolist())):
            span, size = self._options[batch.req_ids[r]].span, int(batch.num_tokens_no_spec[r])
            before = batch.token_ids_cpu[r, max(size - span, 0) : size].tolist()
            recent = (before + ids[at - k : at])[-span:]
            found.append(not self.sentence_ids.isdisjoint(recent))
        return torch.tensor(found, dtype=torch.bool).to(drafts.device)

    def _policy_pass(self) -> torch.Tensor:
        """Let the policy read the scheduled tokens, as the expert just did: its hidden states `(T, D)`."""
        runner, drafter, state = self.runner, self.runner.drafter, self._state
        attention = state.spec_decode_common_attn_metadata
        count = state.scheduler_output.total_num_scheduled_tokens
        # Padded drafts are -1
        drafter.input_ids[:count] = runner.input_ids.gpu[:count].clamp(min=0)
        drafter._set_positions(count, runner._get_positions(count))
        _, per_layer = drafter.build_per_group_and_layer_attn_metadata(attention)
        mode, padded, across = drafter._determine_batch_execution_and_padding(count)
        with set_forward_context(
            per_layer,
            drafter.vllm_config,
            num_tokens=padded,
            num_tokens_across_dp=across,
            cudagraph_runtime_mode=mode,
            slot_mapping=drafter._get_slot_mapping(padded, attention.slot_mapping),
        ):
            hidden = drafter.model(
                input_ids=drafter.input_ids[:padded], positions=drafter._get_positions(padded), inputs_embeds=None
            )
        self.counts["policy_passes"] += 1
        return hidden

    def _row_tensors(self, names: list[str], device) -> RowTensors:
        if names == self._names:
            return self._tensors
        rows = [self._row(name) for name in names]
        self._names, self._options = list(names), dict(zip(names, rows))
        tensor = lambda values: torch.tensor(values).to(device)
        self._tensors = RowTensors(
            tensor([row.gamma for row in rows]),
            tensor([row.share for row in rows]),
            tensor([row.score for row in rows]),
            {rule: tensor([row.rule == rule for row in rows]) for rule in sorted({row.rule for row in rows})},
        )
        return self._tensors

    def _row(self, name: str) -> RowOptions:
        if name in self._options:
            return self._options[name]
        params = self.runner.requests[name].sampling_params
        row = parse_row(params.extra_args)
        # log m of a row is known only if the expert is asked at all its tokens
        return replace(row, score=row.score or params.logprobs is not None)

    def _output(self, plan: _Plan, committed: Round, batch, wide: bool) -> SamplerOutput:
        rows = [self._options[name] for name in batch.req_ids]
        keys = [row.record if live else None for row, live in zip(rows, plan.live)]
        self.records.append(
            keys, batch.num_tokens_no_spec[: batch.num_reqs].tolist(), committed.tokens, committed.values
        )
        self.counts["rounds"] += 1
        tokens = committed.tokens.to(torch.int32)
        if not wide:
            # Rows still reading their prompt are discarded by vLLM, which takes any valid id
            tokens = tokens[:, :1].clamp(min=0)
        wanted = batch.sampling_metadata.max_num_logprobs is not None
        logprobs = self._logprobs(tokens, committed) if wanted else None
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    @staticmethod
    def _logprobs(tokens: torch.Tensor, committed: Round) -> LogprobsTensors:
        """log m of the sampled tokens; NaN in rows that did not ask for it."""
        _, weight, logp, logs, *_ = committed.values.unbind(-1)
        mixed = mixture_logps(logp, logs, weight)[:, : tokens.size(1)].reshape(-1, 1)
        ids = tokens.clamp(min=0).reshape(-1, 1)
        return LogprobsTensors(ids, mixed, torch.zeros_like(ids[:, 0]))
