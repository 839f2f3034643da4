"""
[LUFFY](https://huggingface.co/papers/2504.14945): whole expert trajectories of the dataset in the place of some
rollouts. A trajectory's tokens have the ratio 1 and are weighed by policy shaping.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from ..config import MentorGRPOConfig
from ..errors import SetupError
from ..objective import shaping_weights
from ..rewards import THINK_START
from ..rollout.types import mixed_rows
from ..training.batch import Credit, Reweighed, RolloutBatch, Scored
from ..training.metrics import PREFIX
from .base import Algorithm, Context, Rollouts
from .papers import LUFFY_PAPER
from .requirements import refuse_components, refuse_multimodal, warn_of_kl


PLAIN = "or set `num_trajectory_generations=0` for plain GRPO"


class Luffy(Algorithm):
    """LUFFY; see [`Algorithm`]. The payload of a batch holds the texts of its trajectories by row."""

    name = "LUFFY"
    tags = ["trl", "luffy"]
    paper = LUFFY_PAPER
    sources = ("on_policy", "trajectory")
    text_only = "trajectories"

    def __init__(self, args: MentorGRPOConfig):
        super().__init__(args)
        self.trajectories: Trajectories | None = None

    @classmethod
    def chosen(cls, args: MentorGRPOConfig) -> bool:
        return args.num_trajectory_generations > 0

    def check(self, train_dataset, eval_dataset, **components) -> None:
        refuse_components(components, "expert trajectories", PLAIN)
        columns = getattr(train_dataset, "column_names", None)
        if isinstance(columns, list) and self.args.trajectory_column not in columns:
            raise SetupError(
                f"`train_dataset` has no column `{self.args.trajectory_column}` with expert trajectories; it has "
                f"{', '.join(columns)}. Set `trajectory_column`, make the column with `mentor-trl data trajectories`, "
                f"{PLAIN}."
            )
        super().check(train_dataset, eval_dataset, **components)

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        refuse_multimodal(context.multimodal, "num_trajectory_generations")
        warn_of_kl(self.args.beta, "trajectory")
        self.trajectories = Trajectories(
            self.args.trajectory_column,
            context.tokenizer,
            context.stop_token_ids,
            end_of_reply(context.tokenizer, context.stop_token_ids, **context.template),
            self.args.max_completion_length,
        )
        self.trajectories.check(context.train_dataset)

    def plan(self, inputs: list[dict[str, Any]], first: int) -> RolloutBatch:
        due = mixed_rows(first, len(inputs), self.args.num_generations, self.args.num_trajectory_generations)
        texts = {row: self.trajectories.text(inputs[row]) for row in due.nonzero().flatten().tolist()}
        texts = {row: text for row, text in texts.items() if text}
        source_B = torch.tensor([int(row in texts) for row in range(len(inputs))])
        conversational = is_conversational({"prompt": inputs[0]["prompt"]})
        return RolloutBatch(self.sources, source_B, payload={"texts": texts, "conversational": conversational})

    def rollout(self, prompt_ids: list[list[int]], batch: RolloutBatch, rollouts: Rollouts) -> RolloutBatch:
        # All rows are sampled, as TRL's engines assign groups by position; those of trajectories are thrown away
        completion_ids, logps = rollouts.generate()
        completion_ids, logps = list(completion_ids), None if logps is None else list(logps)
        for row, text in batch.payload["texts"].items():
            completion_ids[row] = self.trajectories.tokens(text, prompt_ids[row], batch.payload["conversational"])
            if logps is not None:  # no engine drew them
                logps[row] = [None] * len(completion_ids[row])
        return batch.sampled(prompt_ids, completion_ids, logps)

    def credit(self, batch: RolloutBatch, scored: Scored) -> Credit:
        places = len(scored.source_N) // self.args.num_generations * self.args.num_trajectory_generations
        missing = 1.0 - (scored.source_N == 1).sum().item() / places
        return super().credit(batch, scored)._replace(metrics={f"{PREFIX}trajectory/missing": missing})

    def reweigh(self, inputs: dict[str, Any], logps_B_T: torch.Tensor) -> Reweighed:
        """Policy shaping under the current policy, see [`~mentor_trl.objective.shaping_weights`]."""
        rows_B = inputs["mentor_source"] == 1
        weights = shaping_weights(logps_B_T, self.args.trajectory_shaping)
        weights = torch.where(rows_B.unsqueeze(1), weights, torch.ones_like(weights))
        return Reweighed(weights, rows_B, "shaping")


class Trajectories:
    """
    Expert trajectories as completions: what the policy itself would have written behind the tokens of its prompt, the
    tokens of the text alone and the token that ends a reply.

    Args:
        column (`str`):
            Column of the dataset with the text of the replies; `None` or empty where there is none.
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
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        reply_end_id: int | None = None,
        max_length: int | None = None,
    ):
        self.column, self.tokenizer = column, tokenizer
        self.stop_ids, self.max_length = set(stop_ids), max_length
        self.end_id, self.reply_end_id = tokenizer.eos_token_id, reply_end_id
        self.stop_texts = [str(added) for id, added in tokenizer.added_tokens_decoder.items() if id in self.stop_ids]

    def tokens(self, text: str, prompt_ids: list[int], conversational: bool = False) -> list[int]:
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
        end = self.reply_end_id if conversational and self.reply_end_id is not None else self.end_id
        return [*ids, end][: self.max_length]

    def check(self, dataset) -> None:
        """
        Look at every trajectory of a dataset, before training.

        Raises:
            [`SetupError`]: if there is no trajectory at all, or one that is not the text of a reply.
        """
        if not hasattr(dataset, "__len__"):
            return
        texts = [self.text({self.column: value}) is not None for value in dataset[self.column]]
        if not any(texts):
            raise SetupError(
                f"No row of `train_dataset` has a trajectory in the column `{self.column}`. `mentor-trl data "
                "trajectories` makes them; or set `num_trajectory_generations=0`."
            )

    def text(self, row: dict[str, Any]) -> str | None:
        """Trajectory of a row of the dataset, if it has one."""
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


def end_of_reply(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], **template) -> int:
    """
    The token that ends a reply: the one that the chat template writes there if completions may end with it, otherwise
    (or without a template) the tokenizer's end of sequence.
    """
    if not (template.get("chat_template") or tokenizer.chat_template):
        return tokenizer.eos_token_id
    user, reply = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
    render = {"tokenize": True, "return_dict": False, **template}
    before = tokenizer.apply_chat_template([user], add_generation_prompt=True, **render)
    whole = tokenizer.apply_chat_template([user, reply], **render)
    same = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), len(before))
    return next((id for id in whole[same:] if id in stop_ids), tokenizer.eos_token_id)
