"""Groups of which nothing is learned are sampled again with other prompts."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import IterableDataset

from helpers import make_tiny_model
from mentor_trl import MentorGRPOConfig, MentorGRPOTrainer
from mentor_trl.connection.failures import ServerError
from mentor_trl.errors import SetupError
from mentor_trl.training.resampling import Resampling, Round, merged, silent_groups
from mentor_trl.training.rollout_log import read_records
from served_helpers import make_served_trainer, stand_in
from trainer_helpers import advantages_by_hand, history, make_trainer, prompts, same_weights, weights


NAN = math.nan
GRPO = {"num_mixed_generations": 0, "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 3}
GRPO |= {"gradient_accumulation_steps": 2, "max_completion_length": 12}
MIXED = {"num_generations": 4, "num_mixed_generations": 2, "per_device_train_batch_size": 8, "max_steps": 2}
MIXED |= {"gradient_accumulation_steps": 2, "max_completion_length": 10, "dynamic_sampling": 3}


def number(prompt: str) -> int:
    return int(prompt.split("+")[0])


def reward(prompts, completions, log_extra=None, **kwargs) -> list[float]:
    """A third of the prompts has one reward, whatever is said; elsewhere rewards hardly ever agree."""
    rows = list(zip(prompts, completions))
    if log_extra is not None:
        log_extra("text", [p + c for p, c in rows])
    return [0.9 if number(p) % 3 == 0 else sum(map(ord, c)) % 101 / 101 for p, c in rows]


class Rounds(MentorGRPOTrainer):
    """Keeps all rounds of each batch, and what was made of them."""

    def __init__(self, *args, **kwargs):
        self.rounds, self.outputs, self.seeds = [], [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        self.rounds.append([])
        self.outputs.append(super()._generate_and_score_completions(inputs))
        return self.outputs[-1]

    def _sample(self, inputs, attempt=0):
        self.rounds[-1].append(super()._sample(inputs, attempt))
        if self.args.num_mixed_generations:
            mentor = getattr(self.algorithm, "inner", self.algorithm)
            self.seeds += [mentor.seed(source) for source in (0, 1)]
        return self.rounds[-1][-1]


def groups(output, size: int) -> list[str]:
    """What the loss takes of each group, without what fills it up."""
    rows = []
    for row, mask in enumerate(output["completion_mask"].bool()):
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
        values = output["advantages"][row]
        values = values[mask].tolist() if values.dim() else values.item()
        rows.append(
            (prompt, output["completion_ids"][row][mask].tolist(), values, output["mentor_source"][row].item())
        )
    return [str(rows[first : first + size]) for first in range(0, len(rows), size)]


def logs_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def logs_without_times(trainer) -> list[dict]:
    return [entry for entry in history(trainer) if "loss" in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resampling")
    trainer = make_trainer(folder, cls=Rounds, reward_funcs=reward, dynamic_sampling=5, log_completions=True, **GRPO)
    trainer.train()
    return trainer, folder


def test_silent_groups_by_hand():
    guided = torch.tensor([False, False, True])

    def silent(*rows, guided=guided):
        rewards, advantages = torch.tensor([list(row) for row in zip(*rows)])
        return silent_groups(rewards, guided.repeat(len(rows) // 3), advantages, 3).tolist()

    # on-policy rewards that differ; equal ones, the other row not above, above, and equal but for rounding
    assert silent((1, 0.7), (0, -0.7), (0, 0)) == [False]
    assert silent((0.9, 0), (0.9, 0), (0.2, 0)) == [True]
    assert silent((0.9, 0), (0.9, 0), (1.0, 0.1)) == [False]
    assert silent((0.9, 1e-4), (0.9, 1e-4), (0.9, 1e-4)) == [True]
    # undefined rewards
    assert silent((NAN, 0), (1, 0), (NAN, 0)) == [True] and silent((NAN, 0), (NAN, 0), (1, 0)) == [True]
    # mixed rows only
    alone = torch.ones(3, dtype=torch.bool)
    assert silent((0.9, 1e-4), (0.9, 1e-4), (0.9, 1e-4), guided=alone) == [True]
    assert silent((0.9, 0), (0.9, 0), (1.0, 0.1), guided=alone) == [False]
    # each group by itself
    assert silent(*[(1, 0)] * 3, (1, 0.7), (0, -0.7), (0, 0)) == [True, False]


def test_every_group_has_an_advantage(trained):
    trainer, _ = trained
    assert max(len(rounds) for rounds in trainer.rounds) > 1
    for rounds, output in zip(trainer.rounds, trainer.outputs):
        assert (output["advantages"].view(-1, 4) != 0.0).any(dim=1).all()
        first, *further = [groups(part.output, 4) for part in rounds]
        made, spare = groups(output, 4), [group for part in further for group in part]
        silent = [number(row["prompt"]) % 3 == 0 for row in rounds[0].inputs[::4]]
        for here, before, was_silent in zip(made, first, silent):
            assert here in spare if was_silent else here == before
        assert len(set(made)) == 4


def test_a_round_has_as_many_groups_as_are_open(trained):
    for rounds in trained[0].rounds:
        still = 4
        for part in rounds:
            assert len(part.inputs) == 4 * still
            still -= sum(number(row["prompt"]) % 3 > 0 for row in part.inputs[::4])
        assert still == 0


def test_prompts_are_others(trained):
    for rounds in trained[0].rounds:
        numbers = [number(row["prompt"]) for part in rounds for row in part.inputs[::4]]
        assert len(numbers) == len(set(numbers))


def test_the_loss_is_normalized_by_the_tokens_of_the_batch(trained):
    for output in trained[0].outputs:
        assert output["num_items_in_batch"] == output["completion_mask"].sum()


def test_metrics_are_of_what_was_sampled_first(trained):
    for rounds, entry in zip(trained[0].rounds, logs_of(trained[0])):
        rewards = rounds[0].scored.rewards_N
        silent = [number(row["prompt"]) % 3 == 0 for row in rounds[0].inputs[::4]]
        assert entry["reward"] == entry["mentor/on_policy/reward"] == pytest.approx(rewards.mean().item())
        assert entry["frac_reward_zero_std"] == entry["mentor/resampling/silent"] == sum(silent) / 4
        assert entry["mentor/resampling/rounds"] == len(rounds) - 1 and entry["mentor/resampling/left"] == 0.0
        assert entry["mentor/resampling/rows"] == sum(len(part.inputs) for part in rounds)
    lengths = [len(ids) for rounds in trained[0].rounds for part in rounds for ids in part.batch.completion_ids]
    lengths += [len(ids) for rounds in trained[0].rounds for part in rounds for ids in part.batch.prompt_ids]
    assert logs_of(trained[0])[-1]["num_tokens"] == sum(lengths)


def test_the_table_has_the_rows_of_the_loss(trained):
    trainer, folder = trained
    for step, output in enumerate(trainer.outputs, start=1):
        table = pd.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
        assert len(table) == 16 and (table["text"] == table["prompt"] + table["completion"]).all()
        rewards = reward(table["prompt"], table["completion"])
        assert table["reward"].tolist() == pytest.approx(rewards) and set(table["source"]) == {"on_policy"}
        assert table["advantage"].tolist() == output["advantages"].tolist()
        assert table["advantage"].tolist() == pytest.approx(advantages_by_hand(rewards, 4, 0, 0.0), abs=1e-4)


def test_groups_with_an_advantage_leave_a_run_as_it_is(tmp_path):
    different = lambda completions, **kwargs: [sum(map(ord, c)) + i / 100 for i, c in enumerate(completions)]
    runs = []
    for rounds in (0, 2):
        runs.append(make_trainer(tmp_path / str(rounds), reward_funcs=different, dynamic_sampling=rounds, max_steps=2))
        runs[-1].train()
    drop = [name for name in logs_of(runs[1])[0] if name.startswith("mentor/resampling/")]
    assert len(drop) == 4 and history(runs[0], (*drop, "train_loss")) == history(runs[1], (*drop, "train_loss"))
    assert same_weights(weights(runs[0]), weights(runs[1])) and runs[1].resampling.drawn == 0


def test_what_is_left_when_no_prompt_helps(tmp_path):
    trainer = make_trainer(
        tmp_path,
        cls=Rounds,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        train_dataset=prompts(4),
        **{**GRPO, "max_steps": 1, "dynamic_sampling": 2},
    )
    trainer.train()
    ((first, *further),) = trainer.rounds
    (entry,) = logs_of(trainer)
    assert [len(part.inputs) for part in further] == [16, 16]
    assert [entry[f"mentor/resampling/{name}"] for name in ("rounds", "rows", "silent", "left")] == [2, 48, 1, 1]
    assert groups(trainer.outputs[0], 4) == groups(first.output, 4)
    assert trainer.resampling.drawn == 2 * (4 + 4)  # all four are seen, and passed over once a round


@pytest.mark.parametrize("step", [4, 6])  # rollout batches of four optimizer steps: between two, and inside one
@pytest.mark.parametrize("mixed", [0, 2])
def test_resuming_repeats_the_run(step, mixed, tmp_path):
    settings = {**GRPO, "gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2}
    settings |= {"num_mixed_generations": mixed, "max_steps": 11, "save_strategy": "steps", "save_steps": step}
    settings |= {"dynamic_sampling": 2, "reward_funcs": reward, "log_completions": True}
    whole, resumed = (make_trainer(tmp_path / name, cls=Rounds, **settings) for name in ("whole", "resumed"))
    whole.train()
    assert sum(map(len, whole.rounds)) > 3 and 0 < whole.resampling.drawn
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert len(resumed.outputs) == (2 if step == 4 else 1)
    assert history(resumed, ("train_loss",)) == history(whole, ("train_loss",))
    assert same_weights(weights(resumed), weights(whole))
    assert resumed.resampling.drawn == whole.resampling.drawn
    for table in (tmp_path / "resumed" / "completions").iterdir():
        assert table.read_bytes() == (tmp_path / "whole" / "completions" / table.name).read_bytes()


def test_a_server_that_dies_in_a_further_round_leaves_a_checkpoint(tmp_path):
    settings = {**MIXED, "max_steps": 3, "seed": 7, "reward_funcs": reward, "log_completions": True}
    with stand_in():
        whole = make_served_trainer(tmp_path / "whole", cls=Rounds, **settings)
        whole.train()
    counts = [len(rounds) for rounds in whole.rounds]
    assert counts[-1] > 1
    with stand_in({2 * sum(counts): ServerError}):  # the very last request
        broken = make_served_trainer(tmp_path / "broken", cls=Rounds, **settings)
        with pytest.raises(ServerError, match="is gone"), pytest.warns(UserWarning, match="Resume it from .*-2"):
            broken.train()
    with stand_in():
        resumed = make_served_trainer(tmp_path / "broken", cls=Rounds, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert same_weights(weights(whole), weights(resumed))
    assert logs_without_times(whole)[-1] == logs_without_times(resumed)[-1]
    name = "completions/completions_00003.parquet"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


# Mixed rollouts and trajectories


def test_mixed_rows(tmp_path):
    trainer = make_trainer(tmp_path, cls=Rounds, reward_funcs=reward, log_rollout_records=10, **MIXED)
    trainer.train()
    assert any(len(rounds) > 1 for rounds in trainer.rounds)
    assert len(trainer.seeds) == len(set(trainer.seeds))
    assert trainer.algorithm.guidance.batches == 2 and trainer.batch is trainer.rounds[-1][0].batch
    for step, (rounds, output) in enumerate(zip(trainer.rounds, trainer.outputs), start=1):
        made = groups(output, 4)
        found = {group: (part, place) for part in rounds for place, group in enumerate(groups(part.output, 4))}
        records = read_records(tmp_path, step)
        assert [record.row for record in records] == list(range(10))
        for record in records:
            part, place = found[made[record.row // 4]]
            row = 4 * place + record.row % 4
            assert record.prompt == part.inputs[row]["prompt"]
            assert record.token_ids == part.batch.completion_ids[row]
            assert record.source == part.batch.source_names()[row] == ("on_policy", "mixed")[record.row % 4 // 2]
            assert record.reward == pytest.approx(part.scored.rewards_N[row].item())
            assert record.advantage == pytest.approx(part.credit.advantages_N[row].item())
        # gamma and share stay those of the rows first sampled
        assert output["mentor_source"].tolist() == [0, 0, 1, 1] * 4


def test_a_mixed_success_of_an_unsolved_prompt_is_kept(tmp_path):
    only_mixed = lambda completions, **kwargs: [float(i % 4 == 3) for i in range(len(completions))]
    trainer = make_trainer(tmp_path, cls=Rounds, reward_funcs=only_mixed, **MIXED)
    trainer.train()
    assert [len(rounds) for rounds in trainer.rounds] == [1, 1]


def test_the_guidance_goes_on_from_the_rows_first_sampled(tmp_path):
    runs = []
    for rounds in (0, 3):
        settings = {**MIXED, "dynamic_sampling": rounds, "max_steps": 1}
        runs.append(make_trainer(tmp_path / str(rounds), cls=Rounds, reward_funcs=reward, **settings))
        runs[-1].train()
    assert len(runs[1].rounds[0]) > 1
    assert runs[0].algorithm.state_dict() == runs[1].algorithm.state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_schedule": "adaptive", "guide_prompts": "failing", "success_reward": 0.3},
        {"alpha_schedule": "adaptive", "entropy_threshold_from": "previous", "num_mixed_generations": 2},
        {"entropy_threshold_from": "previous", "num_mixed_generations": 4},
        {"distillation": "gats"},
        {"distillation": "distilled_rl"},
        {"distillation": "opd", "distillation_reward": True, "num_iterations": 1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_methods_that_go_with_it(settings, tmp_path):
    """Each row of the loss is one of a round, with its advantages, and no two requests have one seed."""
    trainer = make_trainer(tmp_path, cls=Rounds, reward_funcs=reward, **{**MIXED, **settings})
    trainer.train()
    assert sum(map(len, trainer.rounds)) > 2 and len(trainer.seeds) == len(set(trainer.seeds))
    for rounds, output in zip(trainer.rounds, trainer.outputs):
        silent = [number(row["prompt"]) % 3 == 0 for row in rounds[0].inputs[::4]]
        first, *further = [groups(part.output, 4) for part in rounds]
        spare = [group for part in further for group in part]
        for here, before, was_silent in zip(groups(output, 4), first, silent):
            assert here == before if not was_silent else here in spare


def test_trajectories(tmp_path):
    settings = {**GRPO, "num_trajectory_generations": 1, "dynamic_sampling": 3, "max_steps": 2}
    data = prompts(40).add_column("trajectory", [f"so {2 * i}" for i in range(40)])
    trainer = make_trainer(tmp_path, cls=Rounds, reward_funcs=reward, train_dataset=data, **settings)
    trainer.train()
    assert any(len(rounds) > 1 for rounds in trainer.rounds)
    for output in trainer.outputs:
        assert output["mentor_source"].tolist() == [0, 0, 0, 1] * 4
        texts = trainer.processing_class.batch_decode(output["completion_ids"][3::4], skip_special_tokens=True)
        asked = trainer.processing_class.batch_decode(output["prompt_ids"][3::4], skip_special_tokens=True)
        assert texts == [f"so {2 * number(prompt)}" for prompt in asked]


# Parts


class Alone:
    """Processes of a run that has one."""

    count, index = 1, 0
    gather = staticmethod(lambda values: values)
    local = staticmethod(lambda rows: slice(0, rows))


def test_rows_of_different_length_by_hand():
    def part(prompt, completion, advantages):
        output = {
            "prompt_ids": torch.tensor(prompt),
            "prompt_mask": (torch.tensor(prompt) != 9).long(),
            "completion_ids": torch.tensor(completion),
            "completion_mask": (torch.tensor(completion) != 9).long(),
            "advantages": torch.tensor(advantages),
            "num_items_in_batch": torch.tensor(-1),
        }
        return Round([{}] * len(prompt), output, None, None, None)

    parts = [part([[1], [2]], [[3, 4, 5], [6, 9, 9]], [[0.1] * 3] * 2), part([[7, 8]], [[5, 6]], [[0.2] * 2])]
    output = merged(parts, [(1, 0), (0, 1)], 9, Alone)
    assert output["prompt_ids"].tolist() == [[7, 8], [9, 2]] and output["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert output["completion_ids"].tolist() == [[5, 6, 9], [6, 9, 9]]
    assert output["completion_mask"].tolist() == [[1, 1, 0], [1, 0, 0]] and output["num_items_in_batch"] == 3
    torch.testing.assert_close(output["advantages"], torch.tensor([[0.2, 0.2, 0.0], [0.1, 0.1, 0.1]]))


def test_prompts_are_drawn_without_replacement_and_go_on_where_they_were():
    args = SimpleNamespace(dynamic_sampling=1, num_generations=2, seed=3)
    make = lambda **changes: Resampling(SimpleNamespace(**vars(args) | changes), prompts(10), Alone, 0)
    draw = lambda source, count: [number(row["prompt"]) for row in source._draw(count, set(), ["prompt"])]
    source = make()
    order = draw(source, 10)
    assert order[::2] == order[1::2] and sorted(order[::2]) == list(range(10)) and order[::2] != list(range(10))
    assert draw(source, 10) not in (order, list(range(10)))  # another order in the second pass
    later = make()
    later.drawn = 4
    assert draw(later, 6) == order[8:] and draw(make(seed=4), 10) != order


# What is refused


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"dynamic_sampling": -1}, "`dynamic_sampling` is -1; set it to 0"),
        ({"scale_rewards": "batch"}, "`scale_rewards='batch'` makes advantages of a whole batch.*to 'group', or"),
        ({"distillation": "opd"}, "without `distillation_reward` learns nothing from rewards"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation='normalize_then_sum'`.*to 'sum_then_normalize'",
        ),
    ],
)
def test_refused_settings(settings, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        MentorGRPOConfig(str(tmp_path), **{**GRPO, "use_cpu": True, "bf16": False, "dynamic_sampling": 2, **settings})


def test_groups_that_lie_across_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(MentorGRPOConfig, "world_size", property(lambda self: 4))
    settings = {**GRPO, "use_cpu": True, "bf16": False, "per_device_train_batch_size": 3, "num_generations": 8}
    with pytest.raises(ValueError, match="on each process, which has 6 rows.*no multiple of `num_generations=8`"):
        MentorGRPOConfig(str(tmp_path), **settings, dynamic_sampling=1)


def test_refused_data_and_components(tmp_path):
    settings = {**GRPO, "dynamic_sampling": 1, "model": make_tiny_model()}
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "1+1="}]))
    with pytest.raises(SetupError, match="an? IterableDataset, which has no rows by number"):
        make_trainer(tmp_path, train_dataset=stream, **settings)
    with pytest.raises(SetupError, match="column `image`, and rows that are sampled again are text only"):
        make_trainer(tmp_path, train_dataset=prompts(4).add_column("image", [None] * 4), **settings)
    with pytest.raises(SetupError, match="`tools` is not supported with dynamic sampling"):
        make_trainer(tmp_path, trainer_kwargs={"tools": [print]}, **settings)
