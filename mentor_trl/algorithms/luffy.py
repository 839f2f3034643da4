"""
Expert trajectories of a dataset in the place of rollouts: the baseline [LUFFY](https://huggingface.co/papers/2504.14945).

Here: which rows they take, their tokens, and what their tokens are worth in the loss.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from trl.data_utils import is_conversational

from ..errors import SetupError
from ..objective import fold_correction, shaping_weights
from ..rewards.accuracy import THINK_START
from ..rollout import mixed_rows


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrajectoryRows:
    """
    The rows of rollout batches that are expert trajectories: the last `per_group` of each group, wherever groups
    begin, as far as their prompt has a trajectory.

    A trajectory becomes a completion as the policy itself would have written it behind the tokens of its prompt: the
    tokens of its text alone, and the token that ends a reply. The prompt is the one of the other rows of its group.

    Args:
        column (`str`):
            Column of the dataset with the text of the replies; `None` or empty where there is none.
        per_group (`int`):
            Rows of a group.
        num_generations (`int`):
            All rows of a group.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        stop_ids (`Sequence[int]`):
            Ids that end a completion.
        reply_end_id (`int`, *optional*):
            The one of them that ends a reply in a conversation; see [`end_of_reply`]. Behind a prompt that is plain
            text, and if not set, the tokenizer's end of sequence ends a trajectory.
        max_length (`int`, *optional*):
            Length limit of a completion, in tokens. A longer trajectory is cut, and has no end.
    """

    def __init__(
        self,
        column: str,
        per_group: int,
        num_generations: int,
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Sequence[int],
        reply_end_id: int | None = None,
        max_length: int | None = None,
    ):
        self.column, self.per_group, self.num_generations = column, per_group, num_generations
        self.tokenizer, self.stop_ids, self.max_length = tokenizer, set(stop_ids), max_length
        self.end_id, self.reply_end_id = tokenizer.eos_token_id, reply_end_id
        self.stop_texts = [str(added) for id, added in tokenizer.added_tokens_decoder.items() if id in self.stop_ids]
        self.texts: dict[int, str] = {}
        self.conversational = False

    def begin(self, inputs: Sequence[dict[str, Any]], first: int) -> None:
        """Take the trajectories of a process's rows, of which `first` is the global index of the first."""
        due = mixed_rows(first, len(inputs), self.num_generations, self.per_group).nonzero().flatten().tolist()
        texts = {row: self._text(inputs[row]) for row in due}
        self.texts = {row: text for row, text in texts.items() if text}
        self.conversational = is_conversational({"prompt": inputs[0]["prompt"]})

    def end(self) -> None:
        """From now on no row is a trajectory."""
        self.texts = {}

    def mask(self, count: int) -> torch.Tensor:
        """Which of a process's rows are trajectories, `(count,)` `bool`."""
        return torch.tensor([row in self.texts for row in range(count)], dtype=torch.bool)

    def missing(self, trajectory_N: torch.Tensor) -> float:
        """Share of the places, in a batch of N rows, that no trajectory filled."""
        places = len(trajectory_N) // self.num_generations * self.per_group
        return 1.0 - trajectory_N.sum().item() / places

    def place(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        logps: list[list[float | None]] | None,
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """
        Put the trajectories where rollouts were.

        Args:
            prompt_ids, completion_ids (`list[list[int]]`):
                Token ids of a process's rows.
            logps (`list[list[float | None]]`, *optional*):
                Log-probabilities of the completions under the engine that sampled them.

        Returns:
            `tuple` of completions and log-probabilities, `None` for the tokens of trajectories: no engine drew them.
        """
        completion_ids = list(completion_ids)
        logps = None if logps is None else list(logps)
        for row, text in self.texts.items():
            completion_ids[row] = self.completion(text, prompt_ids[row])
            if logps is not None:
                logps[row] = [None] * len(completion_ids[row])
        return completion_ids, logps

    def completion(self, text: str, prompt_ids: list[int]) -> list[int]:
        """
        Token ids of a trajectory behind a prompt. What a chat template has opened in the prompt (`<think>`) is not
        opened again.
        """
        opened = self.tokenizer.decode(prompt_ids[-8:])
        if opened.rstrip().endswith(THINK_START) and text.lstrip().startswith(THINK_START):
            text = text.lstrip().removeprefix(THINK_START).removeprefix(opened[len(opened.rstrip()) :])
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not self.stop_ids.isdisjoint(ids):
            self._refuse(text, f"the end token {self.tokenizer.convert_ids_to_tokens(list(self.stop_ids & set(ids)))}")
        end = self.reply_end_id if self.conversational and self.reply_end_id is not None else self.end_id
        return [*ids, end][: self.max_length]

    def check(self, dataset) -> None:
        """
        Look at every trajectory of a dataset, before training.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Training set. A stream is looked at batch by batch.

        Raises:
            `ValueError`: if there is no trajectory at all, or one that is not the text of a reply.
        """
        if not hasattr(dataset, "__len__"):
            return
        texts = [self._text({self.column: value}) is not None for value in dataset[self.column]]
        if not any(texts):
            raise SetupError(
                f"No row of `train_dataset` has a trajectory in the column `{self.column}`. `mentor-trl data "
                "trajectories` makes them; or set `num_trajectory_generations=0`."
            )

    def _text(self, row: dict[str, Any]) -> str | None:
        if self.column not in row:
            raise SetupError(
                f"A row of `train_dataset` has no column `{self.column}`, only {', '.join(row)}. Set "
                "`trajectory_column` to the one with the trajectories."
            )
        text = row[self.column]
        if text is None or text == "":
            return None
        if not isinstance(text, str):
            self._refuse(text, f"a {type(text).__name__} instead of the text of a reply")
        for token in self.stop_texts:
            if token in text:
                self._refuse(text, f"the end token {token!r}")
        return text

    def _refuse(self, trajectory: Any, what: str) -> None:
        raise SetupError(
            f"A trajectory (column `{self.column}`) holds {what}; it must be the text of a reply as it follows the "
            f"generation prompt, without the chat template around it. It begins with {trajectory!r:.80}."
        )


def end_of_reply(tokenizer: "PreTrainedTokenizerBase", stop_ids: Sequence[int], **template) -> int:
    """
    The token that ends a reply: the one that the chat template writes there if completions may end with it, otherwise
    (or without a template) the tokenizer's end of sequence.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        stop_ids (`Sequence[int]`):
            Ids that end a completion; the tokenizer's end of sequence is one of them.
        template:
            Keyword arguments of `apply_chat_template`.
    """
    if not (template.get("chat_template") or tokenizer.chat_template):
        return tokenizer.eos_token_id
    user, reply = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
    render = {"tokenize": True, "return_dict": False, **template}
    before = tokenizer.apply_chat_template([user], add_generation_prompt=True, **render)
    whole = tokenizer.apply_chat_template([user, reply], **render)
    same = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), len(before))
    return next((id for id in whole[same:] if id in stop_ids), tokenizer.eos_token_id)


def shape_rows(inputs: dict[str, Any], logps_B_T: torch.Tensor, constant: float) -> torch.Tensor:
    """
    Make TRL's loss that of LUFFY on the rows that are trajectories: their ratio is 1, so that nothing is clipped, and
    their advantages carry the weights of [`~mentor_trl.objective.shaping_weights`] under the current policy.

    Args:
        inputs (`dict[str, Any]`):
            Batch of B rows that the loss is about to read, with `mentor_trajectory` `(B,)` `bool`. Its `advantages`
            become `(B, T)`.
        logps_B_T (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the loss's own forward pass, detached.
        constant (`float`):
            c.

    Returns:
        `torch.Tensor` of shape `(B, T)`: the weights, 1 on other rows.
    """
    rows = inputs["mentor_trajectory"].unsqueeze(1)
    weights = shaping_weights(logps_B_T, constant)
    weights = torch.where(rows, weights, torch.ones_like(weights))
    inputs["advantages"] = fold_correction(inputs["advantages"], weights)
    if inputs.get("old_per_token_logps") is not None:
        inputs["old_per_token_logps"] = torch.where(rows, logps_B_T, inputs["old_per_token_logps"])
    return weights
