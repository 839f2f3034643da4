"""Expert trajectories in the place of rollouts (LUFFY): groups, tokens, gradients."""

import math

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer

from helpers import make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig
from mentor_trl.algorithms import Rollouts
from mentor_trl.algorithms.luffy import Trajectories, end_of_reply
from mentor_trl.data import add_hints
from trainer_helpers import SETTINGS, RecordingTrainer, history, letters_reward, make_trainer, same_weights, weights


EOS, LUFFY = 2, {"num_mixed_generations": 0, "num_trajectory_generations": 1}
TEXTS = ["so it is abc", "<think>2</think>4", "no", "a+b=c"]
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def problems(texts=TEXTS, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(len(texts))], "trajectory": texts, **columns})


def conversation(row: dict) -> dict:
    return {"prompt": [{"role": "user", "content": row["prompt"]}]}


def make_luffy(folder, cls=RecordingTrainer, **settings):
    settings = {"max_completion_length": 24, "train_dataset": problems(), **LUFFY, **settings}
    return make_trainer(folder, cls=cls, **settings)


def completions(batch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"])]


def make_bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that merges much of what it sees here, and begins texts with a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["assistant\n", "user\n", "<think>\n", "</think>\n\n", "The answer is 4."] * 20, trainer
    )
    begin = "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


# Groups


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("conversational", [False, True])
def test_the_last_rows_of_each_group_are_the_trajectories(conversational, count, tmp_path):
    dataset = problems().map(conversation) if conversational else problems()
    trainer = make_luffy(
        tmp_path,
        train_dataset=dataset,
        num_trajectory_generations=count,
        per_device_train_batch_size=16,
        log_completions=True,
    )
    tokenizer = trainer.processing_class
    trainer.train()
    texts = dict(zip((tokenizer.decode(tokenizer(p)["input_ids"]) for p in problems()["prompt"]), TEXTS))
    for batch in trainer.batches:
        assert batch["guided"].tolist() == ([False] * (8 - count) + [True] * count) * 2
        for first in (0, 8):
            prompts = [ids[mask.bool()] for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"])]
            assert all(torch.equal(ids, prompts[first]) for ids in prompts[first : first + 8])
            question = tokenizer.decode(prompts[first], skip_special_tokens=True)
            expected = [*tokenizer(texts[question])["input_ids"], EOS]
            rows = completions(batch)[first : first + 8]
            assert [ids == expected for ids in rows] == [False] * (8 - count) + [True] * count
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table["source"].tolist() == (["on_policy"] * (8 - count) + ["trajectory"] * count) * 2


def test_other_rows_are_those_of_plain_grpo(tmp_path):
    """TRL draws all rows; the trajectories then take their places. Advantages are TRL's, over the whole group."""
    batches = []
    for count in (1, 0):
        trainer = make_luffy(tmp_path / str(count), max_steps=1, num_trajectory_generations=count)
        trainer.train()
        batches += trainer.batches
    ours, theirs = batches
    assert completions(ours)[:7] == completions(theirs)[:7] and completions(ours)[7] != completions(theirs)[7]
    rewards = ours["rewards"]
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert ours["row_advantages"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert 0.0 < rewards.mean() < 1.0


def test_rows_without_a_trajectory_stay_on_policy(tmp_path):
    trainer = make_luffy(tmp_path, train_dataset=problems([TEXTS[0], None, "", None]), num_generations=4)
    trainer.train()
    shares = [entry["mentor/trajectory/missing"] for entry in history(trainer) if "loss" in entry]
    rows = [batch["guided"] for batch in trainer.batches]
    assert sorted(int(r.sum()) for r in rows) == [0, 1]
    assert shares == [1.0 - r.sum().item() / 2 for r in rows]
    for batch in trainer.batches:
        found = completions(batch)
        for row in (3, 7):
            assert (found[row][-1] == EOS and len(found[row]) == 13) == batch["guided"][row].item()


def test_long_trajectories_are_cut_and_counted(tmp_path):
    trainer = make_luffy(tmp_path, train_dataset=problems(["abcdefgh", "abcd"]), max_completion_length=5, max_steps=2)
    trainer.train()
    by_length = {len(set(completions(b)[7]) - {EOS}): completions(b)[7] for b in trainer.batches}
    tokenizer = trainer.processing_class
    assert by_length == {5: tokenizer("abcde")["input_ids"], 4: [*tokenizer("abcd")["input_ids"], EOS]}
    shares = [entry["mentor/trajectory/truncated"] for entry in history(trainer) if "loss" in entry]
    assert sorted(shares) == [0.0, 1.0]


def test_rewards_see_the_trajectories_and_evaluation_does_not(tmp_path):
    seen = []

    def reward(completions, **kwargs):
        seen.append(completions)
        return letters_reward(completions)

    trainer = make_luffy(
        tmp_path,
        reward_funcs=reward,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        log_completions=True,
        trainer_kwargs={"eval_dataset": problems()},
    )
    trainer.train()
    assert [completions[-1] in TEXTS for completions in seen] == [True] + [False] * (len(seen) - 1) and len(seen) > 1
    table = pd.read_parquet(tmp_path / "completions" / "completions_eval_00001.parquet")
    assert set(table["source"]) == {"eval"}


def test_a_stream(tmp_path):
    rows = list(problems())
    stream = IterableDataset.from_generator(lambda: iter(rows * 10))
    trainer = make_luffy(tmp_path, train_dataset=stream)
    trainer.train()
    assert all(batch["guided"].sum() == 1 for batch in trainer.batches)
    nameless = IterableDataset.from_generator(lambda: iter([{"prompt": "1+1="}] * 40))
    with pytest.raises(ValueError, match="no column `trajectory`, only prompt. Set `trajectory_column`"):
        make_luffy(tmp_path, train_dataset=nameless).train()


# Tokens


REPLIES = ["The answer is 4.", "<think>\n2 + 2\n</think>\n\nThe answer is 4.", "4\n", " four?", "é→4"]
SYSTEM = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize("messages", [SYSTEM, SYSTEM[1:], [*SYSTEM, {"role": "assistant", "content": "?"}, SYSTEM[1]]])
@pytest.mark.parametrize("make", [make_tiny_tokenizer, make_bpe_tokenizer])
def test_tokens_are_those_of_the_chat_template(make, messages):
    """The prompt's tokens and the trajectory's are the rendered conversation, up to the token that ends the reply."""
    tokenizer = make()
    stop = [tokenizer.eos_token_id]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    rows = Trajectories("trajectory", tokenizer, stop, end_of_reply(tokenizer, stop))
    for reply in REPLIES:
        conversation = [*messages, {"role": "assistant", "content": reply}]
        rendered = tokenizer.apply_chat_template(conversation, return_dict=False)
        ids = prompt + rows.tokens(reply, prompt, conversational=True)
        assert ids == rendered[: len(ids)] and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in rendered[len(ids) :]


def test_the_token_that_ends_a_reply():
    tokenizer = make_bpe_tokenizer()
    im_end, endoftext = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert end_of_reply(tokenizer, [im_end, endoftext]) == im_end
    # A base model with a template: its completions do not end with the template's token
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_reply(tokenizer, [endoftext]) == endoftext
    assert end_of_reply(tokenizer, [endoftext, im_end]) == im_end
    assert end_of_reply(tokenizer, [endoftext, im_end], chat_template="{{ messages[-1]['content'] }}") == endoftext
    rows = Trajectories("trajectory", tokenizer, [endoftext, im_end], im_end)
    assert rows.tokens("4", [5]) == [*tokenizer.convert_tokens_to_ids(["4"]), endoftext]
    tokenizer.chat_template = None
    assert end_of_reply(tokenizer, [endoftext, im_end]) == endoftext


@pytest.mark.parametrize("opening", ["<think>\n", "<think>"])
def test_what_the_template_opens_is_not_opened_again(opening):
    tokenizer = make_bpe_tokenizer()
    tokenizer.chat_template = CHATML.replace("'<|im_start|>assistant\n'", f"'<|im_start|>assistant\n{opening}'")
    messages = [{"role": "user", "content": "2 + 2?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    rows = Trajectories("trajectory", tokenizer, [tokenizer.eos_token_id])
    text = tokenizer.decode(prompt + rows.tokens("<think>\nso\n</think>\n\n4", prompt))
    assert text.endswith("assistant\n<think>\nso\n</think>\n\n4<|im_end|>")


def test_no_log_probabilities_of_tokens_that_no_engine_drew(tmp_path):
    trainer = make_luffy(tmp_path)
    tokenizer, inputs = trainer.processing_class, [{"prompt": "1", "trajectory": "ab"}] * 8
    batch = trainer.algorithm.plan(inputs, first=7)  # the last row of a group comes first
    assert batch.source_names() == ["trajectory", *["on_policy"] * 7]
    for engine_logps in ([[-0.5, -0.6]] * 8, None):
        rollouts = Rollouts(lambda logps=engine_logps: ([[9, 9]] * 8, logps), None, None, None)
        sampled = trainer.algorithm.rollout([[5]] * 8, batch, rollouts)
        assert sampled.completion_ids == [[*tokenizer("ab")["input_ids"], EOS], *[[9, 9]] * 7]
        assert sampled.engine_logps == (engine_logps and [[None] * 3, *[[-0.5, -0.6]] * 7])


def test_corrections_of_the_engine_leave_trajectories_alone(tmp_path, monkeypatch):
    """With log-probabilities as an engine gives them, far from the policy's."""
    trainer = make_luffy(tmp_path, max_steps=1)
    sample = GRPOTrainer._generate_single_turn

    def with_logps(self, *args, **kwargs):
        self.use_vllm = False
        ids, _ = sample(self, *args, **kwargs)
        self.use_vllm = True
        return ids, [[-0.1] * len(row) for row in ids]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", with_logps)
    trainer.use_vllm = True
    trainer.train()
    (batch,) = trainer.batches
    ratio, rows = batch["importance_sampling_ratio"], batch["guided"]
    assert (ratio[rows] == 1.0).all() and (ratio[~rows] != 1.0).all()


# Gradients


class GradientTrainer(RecordingTrainer):
    """At every step, the gradient of the loss beside that of a hand computation."""

    def __init__(self, *args, **kwargs):
        self.gradients = []
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        loss = super()._compute_loss(model, inputs)
        assert all(torch.equal(inputs[name], value) for name, value in before.items())
        parameters = list(model.parameters())
        gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected = torch.autograd.grad(self.by_hand(model, inputs), parameters)
        self.gradients.append([torch.cat([g.flatten() for g in grads]) for grads in (gradient, expected)])
        return loss

    def by_hand(self, model, inputs):
        """Row by row: the clipped ratio of GRPO, and f(p) A of a trajectory. Tokens are averaged (dapo)."""
        total, tokens = 0.0, int(inputs["num_items_in_batch"])
        for i, source in enumerate(inputs["mentor_source"].tolist()):
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
            reply = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
            logits = model(input_ids=torch.cat([prompt, reply])[None]).logits[0, len(prompt) - 1 : -1]
            logps = (logits / self.temperature).log_softmax(-1)[range(len(reply)), reply]
            advantage = inputs["advantages"][i]
            if self.algorithm.sources[source] == "trajectory":
                p = logps.exp()
                total = total + (advantage * p / (p + self.args.trajectory_shaping)).sum()
                continue
            old = inputs["old_per_token_logps"][i][: len(reply)] if "old_per_token_logps" in inputs else logps.detach()
            ratio = (logps - old).exp()
            clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
            total = total + torch.min(ratio * advantage, clipped * advantage).sum()
        # `num_items_in_batch` is of the rollout batch, and the loss of one of its parts
        return -total / (tokens / self.args.steps_per_generation * self.current_gradient_accumulation_steps)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 2},
        {"num_iterations": 3, "max_steps": 6, "temperature": 0.7},
        {"steps_per_generation": 4, "max_steps": 4, "trajectory_shaping": 0.02, "num_trajectory_generations": 2},
    ],
    ids=["on_policy", "several_iterations", "several_steps"],
)
def test_gradients_are_those_of_the_shaped_probabilities(settings, tmp_path):
    """Also at steps after the first, however far the policy has moved: nothing of a trajectory is clipped."""
    trainer = make_luffy(tmp_path, cls=GradientTrainer, learning_rate=0.03, **settings)
    trainer.train()
    # A part of a batch may hold one group whose rewards are all equal
    norms = [expected.norm().item() for _, expected in trainer.gradients]
    assert sum(norm > 1e-3 for norm in norms) >= len(norms) / 2
    for gradient, expected in trainer.gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-6)


def test_hinted_prompts_are_trained_as_plain_grpo(tmp_path):
    """QuestA: every row of a group is on-policy behind the prompt with the hint."""
    hinted = add_hints(problems(["abcdef"] * 4), 0.5)
    settings = {"num_trajectory_generations": 0, "num_iterations": 2, "max_completion_length": 8}
    trainer = make_luffy(tmp_path, cls=GradientTrainer, train_dataset=hinted, **settings)
    trainer.train()
    for batch in trainer.batches:
        (text,) = set(trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True))
        assert text[0].isdigit() and text.endswith("\n\nabc")
        assert not batch["guided"].any()
    for gradient, expected in trainer.gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-6)
        assert expected.norm() > 1e-3


def test_the_policy_moves_far_between_those_steps(tmp_path):
    """So that the case above tells shaping under the current policy from shaping under the one that sampled."""
    trainer = make_luffy(tmp_path, num_iterations=3, max_steps=3, learning_rate=0.03)
    kept = []
    compute = trainer._compute_loss

    def keep(model, inputs):
        loss = compute(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logps = trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))[0]
        moved = (logps - inputs["old_per_token_logps"])[inputs["mentor_source"] == 1]
        kept.append(moved.abs().max().item())
        return loss

    trainer._compute_loss = keep
    trainer.train()
    assert kept[0] < 1e-5 and kept[1] > math.log(1.3)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "sapo", "luspo", "vespo"])
def test_every_loss_gives_a_trajectory_its_weight(loss_type, tmp_path):
    """A row in the place of a rollout weighs w A grad log p, whatever the loss does to ratios."""
    from mentor_trl.objective import shaping_weights

    trainer = make_luffy(tmp_path, loss_type=loss_type, max_steps=1, num_iterations=2)
    compute, found = trainer._compute_loss, []

    def gradients(model, inputs):
        leaf, forward = {}, GRPOTrainer._get_per_token_logps_and_entropies

        def with_leaf(self, *args, **kwargs):
            logps, *rest = forward(self, *args, **kwargs)
            leaf["logps"] = logps.detach().requires_grad_()
            return leaf["logps"], *rest

        GRPOTrainer._get_per_token_logps_and_entropies = with_leaf
        try:
            loss = compute(model, inputs)
        finally:
            GRPOTrainer._get_per_token_logps_and_entropies = forward
        (gradient,) = torch.autograd.grad(loss, leaf["logps"])
        found.append((gradient, leaf["logps"].detach(), inputs))
        return compute(model, inputs)

    trainer._compute_loss = gradients
    trainer.train()
    ((gradient, logps, inputs),) = found
    mask, rows = inputs["completion_mask"].bool(), (inputs["mentor_source"] == 1)
    per_token = gradient / inputs["advantages"][:, None]
    assert (inputs["advantages"] != 0.0).all()
    # What a token of an on-policy row weighs: the loss's normalization, which may depend on the row's length
    length = mask.sum(1) if loss_type in ("grpo", "sapo") else torch.ones(len(mask))
    unit = (per_token * length[:, None])[~rows][mask[~rows]]
    torch.testing.assert_close(unit, unit[0].expand_as(unit), rtol=1e-4, atol=1e-7)
    mine = (per_token * length[:, None])[rows][mask[rows]]
    torch.testing.assert_close(mine, unit[0] * shaping_weights(logps[rows][mask[rows]]), rtol=1e-4, atol=1e-7)


def test_every_parameter_is_trained_and_resuming_repeats_the_run(tmp_path):
    settings = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 7, "save_strategy": "steps"}
    settings |= {"save_steps": 6, "log_completions": True}
    whole = make_luffy(tmp_path / "whole", **settings)
    start = weights(whole)
    whole.train()
    end = weights(whole)
    assert [name for name in start if torch.equal(start[name], end[name])] == []
    resumed = make_luffy(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert same_weights(weights(resumed), end)
    # The mean loss of the run is over the steps since the restart
    assert history(resumed, without=("train_loss",)) == history(whole, without=("train_loss",))


def test_model_card(tmp_path):
    trainer = make_luffy(tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "2504.14945" in card and "LUFFY" in card and "- luffy" in card and "2510.04140" not in card


# What is refused


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"num_mixed_generations": 4}, r"`num_trajectory_generations=1` and `num_mixed_generations=4`.*Set one of"),
        ({"num_trajectory_generations": -1}, "is -1; set it to 0"),
        ({"num_trajectory_generations": 7}, r"leaves 1 of `num_generations=8`.*to 6 or less"),
        ({"trajectory_shaping": 0.0}, r"`trajectory_shaping` is 0.0; it must be positive"),
        ({"importance_sampling_level": "sequence"}, "Set it to 'token'"),
        ({"remove_unused_columns": True}, "removes the column `trajectory`.*Set it to False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configuration(settings, fix):
    with pytest.raises(ValueError, match=fix):
        MentorGRPOConfig("unused", **{**SETTINGS, **LUFFY, **settings})


@pytest.mark.parametrize(
    ("dataset", "fix"),
    [
        (problems().rename_column("trajectory", "steps"), r"no column `trajectory`.*it has prompt, steps. Set"),
        (problems([None, "", None]), r"No row of `train_dataset` has a trajectory.*`mentor-trl data trajectories`"),
        (problems(["a<eos>"]), r"holds the end token '<eos>'; it must be the text.*begins with 'a<eos>'"),
        (problems([["a"], ["b"]]), "holds a list instead of the text"),
        (problems(images=[None] * 4), r"has the column `images`, and trajectories are text only"),
    ],
)
def test_datasets(dataset, fix, tmp_path):
    with pytest.raises(ValueError, match=fix):
        make_luffy(tmp_path, train_dataset=dataset)


def test_another_column(tmp_path):
    dataset = problems().rename_column("trajectory", "steps")
    trainer = make_luffy(tmp_path, train_dataset=dataset, trajectory_column="steps", max_steps=1)
    trainer.train()
    assert trainer.batches[0]["guided"].sum() == 1


@pytest.mark.parametrize(
    "kwargs", [{"tools": [lambda x: x]}, {"rollout_func": lambda p, t: {}}, {"environment_factory": object}]
)
def test_tools_and_environments(kwargs, tmp_path):
    with pytest.raises(ValueError, match=rf"`{next(iter(kwargs))}` is not supported with expert trajectories"):
        make_luffy(tmp_path, trainer_kwargs=kwargs)


def test_the_kl_term_is_warned_of(tmp_path, tiny_model_dir):
    with pytest.warns(UserWarning, match="biased on trajectory rollouts.*`mentor/trajectory/kl`"):
        trainer = make_luffy(tmp_path, beta=0.1, max_steps=1, model=str(tiny_model_dir))
    trainer.train()
    assert any("mentor/trajectory/kl" in entry for entry in trainer.state.log_history)
