"""An expert in this process: a transformers model that reads the rows of an engine along."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from ...experts.port import Points, Spoken
from ...objective import couple, match_vocabulary
from .decoder import FIRST_RESERVE, MAX_CATCH_UP, MAX_PREFILL_TOKENS, inference, logit_rows, refuse_nan
from .lockstep import RAGGED, Ability


class InProcessExpert:
    """
    [`~mentor_trl.experts.port.Expert`] with a model of its own.

    Its key-value cache has a slot for each row that the engine has in progress, and reads a row no further than it is
    asked about it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Frozen model.
        vocab_size (`int`, *optional*):
            Rows of the policy's output embedding. The model's own if not given.
        num_tokens (`int`, *optional*):
            Number of ids that the tokenizer defines; ids from there on are never emitted.
        autocast (`Callable[[], AbstractContextManager]`, *optional*):
            Makes the mixed-precision context of the forward passes.
        name (`str`, *optional*):
            Model id or folder.
        ability ([`Ability`], *optional*):
            How the model's rows can advance. Where they only advance together, the engine drafts single tokens, and
            all rows that it has in progress begin at once.
    """

    couples = True

    def __init__(
        self,
        model,
        vocab_size: int | None = None,
        num_tokens: int | None = None,
        autocast: Callable[[], AbstractContextManager] | None = None,
        name: str | None = None,
        ability: Ability = RAGGED,
    ):
        self.model, self.name, self.num_tokens, self.autocast = model, name, num_tokens, autocast
        self.ability = ability
        self.decoder = ability.decoder(model, autocast=autocast)
        self.vocab_size = vocab_size or self.decoder.vocab_size
        self.prompts: list[tuple[int, ...] | None] = []
        self.seen = torch.empty(0, dtype=torch.long)

    @property
    def max_length(self) -> int | None:
        """Context in tokens."""
        return self.decoder.max_length

    # Rows in progress

    def begin(self, slots: int, width: int, device: torch.device) -> None:
        """Make room for `slots` rows of up to `width` tokens; none of them is read yet."""
        self.decoder.reserve(min(width, FIRST_RESERVE), slots, bound=width)
        self.seen = torch.zeros(slots, dtype=torch.long, device=device)
        self.prompts = [None] * slots

    def admit(self, slot: int, prompt: tuple[int, ...]) -> None:
        """A new row takes a slot. Its prompt is read when the row is first asked about."""
        self.prompts[slot] = prompt

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Rows go over to other slots, with up to `length` tokens."""
        # What an unread slot holds belongs to an earlier row
        read = [(source, target) for source, target in zip(sources, targets) if self.prompts[source] is None]
        if read:
            self.decoder.move(*map(list, zip(*read)), length)
        self.seen[targets] = self.seen[sources]
        for source, target in zip(sources, targets):
            self.prompts[target] = self.prompts[source]

    def consult(self, points: Points) -> Spoken:
        """
        Read the drafts of all rows in one pass, and couple those at branch points.

        Raises:
            `ValueError`: if the model's logits are NaN.
        """
        hidden = self._states(points)
        parts = []
        size = logit_rows(max(self.vocab_size, self.decoder.vocab_size))
        for first in range(0, len(points.row), size):
            chunk = slice(first, first + size)
            row, step = points.row[chunk], points.step[chunk]
            offset = (points.size[row] - 1 - self.seen[row] + step).to(hidden.device)
            logps = points.policy_logps(chunk)
            logs = self._logps(hidden[row.to(hidden.device), offset], points.temperature, logps.device)
            parts.append(_speak(points, chunk, logps, logs))
        return Spoken(*map(torch.cat, zip(*parts)))

    def committed(self, size: torch.Tensor) -> None:
        """After a consultation, `size (B,)` tokens of each row stand; what was read behind them does not count."""
        self.seen[: len(size)] = size - 1

    def _states(self, points: Points) -> torch.Tensor:
        """
        Bring the cache up to the last draft but one. Returns hidden states `(B, Q, D)`, where that before draft k of a
        row stands at `size - 1 - seen + k`.
        """
        B = len(points.size)
        unread = [slot for slot in range(B) if self.prompts[slot] is not None]
        if unread:
            prompts = [self.prompts[slot] for slot in unread]
            self.decoder.prefill(unread, prompts)
            self.seen[unread] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.seen.device)
            for slot in unread:
                self.prompts[slot] = None
        most = max(1, min(MAX_CATCH_UP, MAX_PREFILL_TOKENS // B))
        while True:
            missing = points.size - 1 - self.seen[:B]
            if int(missing.max()) <= most:
                break
            count = missing.clamp(max=most)
            self._read(points.tokens, count)
            self.seen[:B] += count
        return self._read(points.tokens, missing + points.length)

    def _read(self, tokens: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Read `count (B,)` more tokens a row; returns their hidden states `(B, Q, D)`."""
        B, longest = len(count), int(count.max())
        end = int((self.seen[:B] + count).max())
        # Shorter rows are padded: what they write at or behind their own end is not attended to before it is rewritten
        steps = torch.arange(longest, device=self.seen.device)
        positions = (self.seen[:B].unsqueeze(1) + steps).clamp(max=end)
        return self.decoder.forward(tokens[:B].gather(1, positions), positions, B, end + 1)

    def _logps(self, hidden: torch.Tensor, temperature: float, device: torch.device) -> torch.Tensor:
        logits = match_vocabulary(self.decoder.logits(hidden), self.vocab_size, self.num_tokens)
        logs = (logits.to(device) / temperature).log_softmax(-1)
        refuse_nan(logs[:, 0], "expert")
        return logs

    # Given rows

    @torch.no_grad()
    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> torch.Tensor:
        """
        log s of every token of given completions, `(rows, longest completion)` in nats on the model's device, NaN
        behind the ends. A prompt has at least one token.

        Raises:
            `ValueError`: if the model's logits are NaN.
        """
        longest = max(map(len, completion_ids), default=0)
        scores = torch.full((len(completion_ids), longest), torch.nan, device=self.decoder.device)
        for row, before in self._read_rows(prompt_ids, completion_ids):
            chosen = torch.tensor(completion_ids[row], dtype=torch.long, device=scores.device).unsqueeze(1)
            for at in range(0, len(chosen), self.decoder.rows_per_chunk):
                part = slice(at, at + self.decoder.rows_per_chunk)
                logs = self._logps(before[part], temperature, scores.device)
                scores[row, at : at + len(logs)] = logs.gather(1, chosen[part]).squeeze(1)
        return scores

    @torch.no_grad()
    def distributions(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> Callable[[slice], torch.Tensor]:
        """
        See [`~mentor_trl.experts.port.ReadableExpert`]. What is kept are hidden states; a slice's log s are computed
        when they are asked for, on the model's device.
        """
        found = {row: before.clone() for row, before in self._read_rows(prompt_ids, completion_ids)}
        hidden = torch.cat([found[row] for row in range(len(prompt_ids))])

        @torch.no_grad()
        def logps(part: slice) -> torch.Tensor:
            return self._logps(hidden[part], temperature, hidden.device)

        return logps

    def _read_rows(self, prompt_ids, completion_ids) -> Iterator[tuple[int, torch.Tensor]]:
        """Hidden states `(T, D)` before the tokens of each completion, with its row, in an order of their lengths."""
        order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]) + len(completion_ids[row]))
        reader = self.ability.decoder(self.model, autocast=self.autocast)
        with inference(self.model, **self.ability.attention):
            while order:
                width = len(prompt_ids[order[-1]]) + len(completion_ids[order[-1]])
                rows, order = _last(order, max(1, MAX_PREFILL_TOKENS // width))
                ids = torch.zeros((len(rows), width), dtype=torch.long, device=reader.device)
                for position, row in enumerate(rows):
                    sequence = torch.tensor([*prompt_ids[row], *completion_ids[row]], device=reader.device)
                    ids[position, : len(sequence)] = sequence
                hidden = reader.read(ids)
                for position, row in enumerate(rows):
                    start = len(prompt_ids[row]) - 1
                    yield row, hidden[position, start : start + len(completion_ids[row])]


def _last(items: list[int], count: int) -> tuple[list[int], list[int]]:
    """The last `count` items, and the others."""
    return items[-count:], items[:-count]


def _speak(points: Points, chunk: slice, logps: torch.Tensor, logs: torch.Tensor) -> Spoken:
    """What is said at the points of a chunk, from log p and log s of all tokens, `(n, V)` each."""
    token, branch = points.draft[chunk].clone(), points.branch[chunk].nonzero().squeeze(1)
    replaced = torch.zeros_like(token, dtype=torch.bool)
    token[branch], replaced[branch] = couple(token[branch], logps[branch], logs[branch], points.generator)
    index = token.unsqueeze(1)
    return Spoken(token, logps.gather(1, index).squeeze(1), logs.gather(1, index).squeeze(1), replaced)
