import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_decoder import SAMPLED, VOCABULARY, make_model, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

from mentor_trl.rollout import LocalSampler, MixedRequest
from mentor_trl.rollout.local import decoder as decoder_module
from mentor_trl.rollout.local import in_process
from mentor_trl.rollout.local.decoder import text_model
from mentor_trl.rollout.local.decoding_check import check_decoding
from mentor_trl.rollout.local.drafting import best_draft_length
from statistics_helpers import Tree, forward_logps, make_peaked_model, misfit, sample_local, sequences


INF, NAN = math.inf, math.nan
RAGGED = [[5, 1, 3], [7], [2, 4, 6, 8, 10, 1, 3, 5, 7], [9, 9], [3, 8, 1, 1, 6]]


def make_request(prompts=RAGGED, gamma=1.5, max_new_tokens=8, **options):
    gammas = gamma if isinstance(gamma, list) else [gamma] * len(prompts)
    return MixedRequest(
        [list(prompt) for prompt in prompts], gammas, max_new_tokens, **{"stop_token_ids": (), **options}
    )


def rows_of(model, request, rollout, num_tokens=None, size=None):
    """Log-probabilities `(T, V)` before each token of each row, by the model's own forward pass."""
    found = []
    for prompt, ids in zip(request.prompt_ids, rollout.completion_ids):
        inputs = torch.tensor([[*prompt, *ids]]).clamp(max=text_model(model).get_input_embeddings().num_embeddings - 1)
        with torch.no_grad():
            logits = model(input_ids=inputs, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        if size is not None:
            logits = logits[:, : min(size, num_tokens)]
            logits = torch.cat([logits, torch.full((len(ids), size - logits.size(1)), -INF)], 1)
        found.append((logits / request.temperature).log_softmax(-1))
    return found


def check_records(policy, expert, request, rollout, num_tokens=None, size=None, atol=1e-4):
    """Every record against plain forward passes of both models in the state they are in."""
    P = rows_of(policy, request, rollout)
    S = rows_of(expert, request, rollout, num_tokens, size)
    close = lambda actual, expected: torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)
    for row, ids in enumerate(rollout.completion_ids):
        T, index = len(ids), torch.tensor(ids).unsqueeze(1)
        entropy = torch.special.entr(P[row].exp()).sum(-1)
        w = (entropy / request.gamma[row]).clamp(max=1.0)
        logp, logs = P[row].gather(1, index)[:, 0], S[row].gather(1, index)[:, 0]
        logm = ((1 - w) * logp.exp() + w * logs.exp()).log()
        branch = rollout.branch[row, :T]
        asked = (w > 0.0) if request.score_all else branch
        close(rollout.entropies[row, :T], entropy)
        close(rollout.weights[row, :T], w)
        close(rollout.logps[row, :T], logp)
        close(rollout.expert_logps[row, :T][asked], logs[asked])
        assert rollout.expert_logps[row, :T][~asked].isnan().all()
        known = asked | (w == 0.0)
        close(rollout.mixed_logps[row, :T][known], logm[known])
        assert rollout.mixed_logps[row, :T][~known].isnan().all()
        assert not branch[w == 0.0].any()
        assert (rollout.replaced[row, :T] <= branch).all()
        for name in ("entropies", "weights", "logps", "expert_logps", "mixed_logps"):
            assert getattr(rollout, name)[row, T:].isnan().all()


def watch(module, shapes=None):
    """Shapes `(rows, tokens)` of the ids that a model reads."""
    shapes = [] if shapes is None else shapes
    check_decoding(module, "model")  # measured once, and not watched
    text_model(module).base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def positions_of(shapes):
    return sum(rows * tokens for rows, tokens in shapes)


# Records


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", SAMPLED)
def test_records_equal_plain_forward_passes(name, attention):
    """Several architectures, ragged prompts, sequences longer than the sliding window of 4, refilled slots."""
    policy, expert = make_model(name, 0, attention), make_model(name, 1, attention)
    prompts = RAGGED + RAGGED[::-1]
    for score_all in (False, True):
        request = make_request(prompts, [1.5, 3.0, INF, 1.0, 2.0] * 2, 10, score_all=score_all, temperature=1.2)
        rollout = sample_local(policy, expert, request, rollout_batch_size=4, draft_length=3)
        check_records(policy, expert, request, rollout)
        assert rollout.branch.any() and rollout.replaced.any() and (~rollout.branch & rollout.mask).any()


def test_records_of_different_architectures():
    policy, expert = make_model("qwen2", 0), make_model("gemma2", 1)
    request = make_request(score_all=True)
    check_records(policy, expert, request, sample_local(policy, expert, request))


@pytest.mark.parametrize("rule", ["threshold", "random", "always"])
def test_rules_set_the_weights(rule):
    policy, expert = make_model("llama", 0), make_model("llama", 1)
    request = make_request(gamma=[1.5] * 4 + [INF], branch_rule=rule, share=0.3)
    rollout = sample_local(policy, expert, request)
    weights = rollout.weights[:4]
    if rule == "threshold":
        assert torch.equal(weights, (rollout.entropies[:4] >= 1.5).float()) and 0.0 < weights.mean() < 1.0
    else:
        assert weights.eq(0.3 if rule == "random" else 1.0).all()
    assert rollout.weights[4].eq(0.0).all() and not rollout.branch[4].any()
    if rule != "random":
        assert torch.equal(rollout.branch[:4], weights == 1.0)


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6), (6, 6)])
def test_padded_vocabularies(sizes):
    """Five tokens; the embeddings of policy and expert are padded differently."""
    policy = make_peaked_model(0, vocab_size=sizes[0])
    expert = make_peaked_model(1, vocab_size=sizes[1])
    request = make_request([[1, 2], [4, 4, 3]] * 100, gamma=2.0, max_new_tokens=6, score_all=True)
    rollout = sample_local(policy, expert, request, num_tokens=5)
    check_records(policy, expert, request, rollout, num_tokens=5, size=sizes[0])
    tokens = torch.tensor(rollout.completion_ids)
    assert (tokens[rollout.branch] < 5).all()
    # the policy's own padding is the policy's business; the expert gives it no probability
    assert (tokens >= 5).any() and rollout.expert_logps[tokens >= 5].eq(-INF).all()


def test_expert_without_padding_follows_its_renormalized_distribution():
    policy, expert = make_peaked_model(0, vocab_size=5), make_peaked_model(1, vocab_size=9)
    request = make_request([[1, 2, 3]] * 3000, gamma=1e-6, max_new_tokens=1)
    tokens = [ids[0] for ids in sample_local(policy, expert, request, num_tokens=5).completion_ids]
    full = forward_logps(expert, torch.tensor([[1, 2, 3]]))[0, -1].exp()
    assert full[5:].sum() > 0.1
    assert misfit([(tokens, dict(enumerate((full[:5] / full[:5].sum()).tolist())))]) <= 1.0


def test_bfloat16_models_give_normalized_float32_records():
    policy, expert = make_model("llama", 0).bfloat16(), make_model("llama", 1).bfloat16()
    request = make_request(score_all=True)
    rollout = sample_local(policy, expert, request)
    assert rollout.logps.dtype == rollout.entropies.dtype == rollout.mixed_logps.dtype == torch.float32
    # one rounding of a bfloat16 logit of up to 16 is .06; logits of both passes and their normalizers are rounded
    check_records(policy, expert, request, rollout, atol=0.25)
    # normalized in float32: H and log p are no multiples of bfloat16's steps
    assert not torch.equal(rollout.logps[rollout.mask], rollout.logps[rollout.mask].bfloat16().float())


def test_autocast_is_used():
    policy, expert = make_model("llama", 0), make_model("llama", 1)
    autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    request = make_request(gamma=INF)
    with LocalSampler(expert).session(policy, autocast) as session:
        rollout = session.sample(request)
    P = rows_of(policy, request, rollout)
    with autocast():
        A = rows_of(policy, request, rollout)
    full, cast = (
        max(
            (rollout.logps[row].double() - logps.gather(1, torch.tensor(ids).unsqueeze(1))[:, 0]).abs().max().item()
            for row, (logps, ids) in enumerate(zip(model, rollout.completion_ids))
        )
        for model in (P, A)
    )
    assert cast < 0.25 and full > 1e-3


# Modes of the modules


def test_dropout_is_off_and_modes_are_restored():
    policy = make_model("gpt2", 0, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    expert = make_model("gpt2", 1, resid_pdrop=0.5).train()
    policy.transformer.h[1].eval()
    former = [{name: module.training for name, module in model.named_modules()} for model in (policy, expert)]
    request = make_request()
    rollout = sample_local(policy, expert, request)
    for model, modes in zip((policy, expert), former):
        assert {name: module.training for name, module in model.named_modules()} == modes
    check_records(policy.eval(), expert.eval(), request, rollout)


def test_gradient_checkpointing_and_gradients_are_left_alone():
    policy, expert = make_model("llama", 0), make_model("llama", 1)
    policy.gradient_checkpointing_enable()
    policy.train()
    request = make_request()
    rollout = sample_local(policy, expert, request)
    assert policy.is_gradient_checkpointing and policy.training and torch.is_grad_enabled()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in policy.parameters())
    check_records(policy.eval(), expert, request, rollout)


def test_peft_policy_and_expert():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
        policy, expert = (get_peft_model(make_model("qwen2", seed), config) for seed in (0, 1))
    policy.train()
    request = make_request(score_all=True)
    rollout = sample_local(policy, expert, request)
    assert policy.training
    check_records(policy.eval(), expert.eval(), request, rollout)


def test_attention_implementation_is_restored():
    policy, expert = make_model("llama", 0), make_model("llama", 1)
    policy.config._attn_implementation = "flash_attention_2"  # not installed: sampling must not call it
    sample_local(policy, expert, make_request())
    assert policy.config._attn_implementation == "flash_attention_2"
    assert expert.config._attn_implementation == "sdpa"


# Ends of rows


@pytest.mark.parametrize("draft_length", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("gamma", [INF, 1.5, 1e-6])
def test_length_limit_is_exact(draft_length, gamma):
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    for limit in (1, 2, 5, 9):
        for size in (2, 64):
            request = make_request(gamma=gamma, max_new_tokens=limit)
            rollout = sample_local(policy, expert, request, draft_length=draft_length, rollout_batch_size=size)
            assert [len(ids) for ids in rollout.completion_ids] == [limit] * len(RAGGED)


@pytest.mark.parametrize("draft_length", [1, 3, 8])
def test_stop_token_is_last(draft_length):
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    request = make_request(RAGGED * 20, max_new_tokens=12, stop_token_ids=(3, 7))
    rollout = sample_local(policy, expert, request, draft_length=draft_length, rollout_batch_size=16)
    stopped = 0
    for ids in rollout.completion_ids:
        assert not {3, 7} & set(ids[:-1])
        assert len(ids) == 12 or ids[-1] in (3, 7)
        stopped += ids[-1] in (3, 7)
    assert 0 < stopped
    lengths = torch.tensor([len(ids) for ids in rollout.completion_ids])
    assert len(lengths.unique()) > 3
    assert torch.equal(rollout.mask.sum(1), lengths) and rollout.mask.size(1) == lengths.max()
    assert rollout.stats["tokens"] == lengths.sum()
    check_records(policy, expert, request, rollout)


def test_prompts_of_one_token():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    request = make_request([[3], [4], [3]], score_all=True)
    check_records(policy, expert, request, sample_local(policy, expert, request))


def test_empty_request():
    rollout = sample_local(make_peaked_model(0), make_peaked_model(1), make_request([]))
    assert rollout.completion_ids == [] and rollout.entropies.shape == (0, 0)


# The expert catches up


@pytest.mark.parametrize("draft_length", [1, 4])
def test_rarely_asked_expert_reads_in_chunks(monkeypatch, draft_length):
    monkeypatch.setattr(in_process, "MAX_CATCH_UP", 8)
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    shapes = watch(expert)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (30, 1, 7, 50, 30)]
    request = make_request(prompts, [60.0, 40.0, INF, 150.0, 60.0], 80)
    rollout = sample_local(policy, expert, request, draft_length=draft_length, rollout_batch_size=3)
    lengths = {len(prompt) - 1 for prompt in prompts}
    chunks = [tokens for _, tokens in shapes if tokens not in lengths]
    assert 8 in chunks and max(chunks) <= 8 + draft_length
    assert 3 <= rollout.branch.sum() <= 20
    check_records(policy, expert, request, rollout)


def test_rarely_asked_expert_with_long_rows():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (100, 3)]
    request = make_request(prompts, 500.0, 400, seed=13)
    rollout = sample_local(policy, expert, request)
    # more than one chunk is missing when the expert is first asked
    assert rollout.branch.any() and rollout.branch.any(0).int().argmax() > in_process.MAX_CATCH_UP
    check_records(policy, expert, request, rollout)


# Who computes what


def test_plain_rows_never_run_the_expert():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    shapes = watch(expert)
    request = make_request(gamma=INF)
    rollout = sample_local(policy, expert, request)
    assert shapes == [] and rollout.stats["expert_rounds"] == 0
    check_records(policy, expert, request, rollout)
    # and need none
    alone = sample_local(policy, None, request)
    assert alone.completion_ids == rollout.completion_ids


@pytest.mark.parametrize("draft_length, rule", [(1, "entropy"), (8, "entropy"), (8, "always")])
def test_expert_head_sees_branch_points_only(draft_length, rule):
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    rows = []
    check_decoding(expert, "expert")
    expert.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    request = make_request(RAGGED * 4, 4.0, 16, branch_rule=rule)
    rollout = sample_local(policy, expert, request, draft_length=draft_length)
    branches, drafted = int(rollout.branch.sum()), rollout.stats["drafted"]
    if draft_length == 1:
        assert sum(rows) == branches < drafted == rollout.stats["tokens"]
    elif rule == "always":
        # all drafts are branch points, and all of a round are examined at once
        assert sum(rows) == drafted > rollout.stats["tokens"]
    else:
        assert branches <= sum(rows) < 0.7 * drafted


def test_a_prompt_is_computed_once():
    """3 prompts of 5 tokens, 8 rows each: 3 x 4 positions are prefilled, and each token of a row is read once."""
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    read, asked = watch(policy), watch(expert)
    prompts = [list(prompt) for prompt in random_ids(3, 5).tolist() for _ in range(8)]
    for size in (24, 6):
        read.clear(), asked.clear()
        request = make_request(prompts, 1e-6, 7)
        rollout = sample_local(policy, expert, request, draft_length=1, rollout_batch_size=size)
        for shapes in (read, asked):
            assert positions_of(shape for shape in shapes if shape[1] > 1) == 3 * 4
            assert positions_of(shape for shape in shapes if shape[1] == 1) == 24 * 7
        check_records(policy, expert, request, rollout)


def test_a_second_request_of_a_session_prefills_nothing():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    read, asked = watch(policy), watch(expert)
    prompts = [list(prompt) for prompt in random_ids(4, 5).tolist()]
    with LocalSampler(expert, draft_length=1).session(policy) as session:
        first = session.sample(make_request(prompts, 1e-6, 6))
        assert positions_of(shape for shape in read if shape[1] > 1) == 4 * 4
        assert positions_of(shape for shape in asked if shape[1] > 1) == 4 * 4
        read.clear(), asked.clear()
        request = make_request(prompts[::-1], 1e-6, 6, seed=1)
        second = session.sample(request)
    assert {tokens for _, tokens in read} == {tokens for _, tokens in asked} == {1}
    assert first.completion_ids != second.completion_ids
    check_records(policy, expert, request, second)


def test_requests_of_a_session_do_not_disturb_each_other():
    """
    Rows that end early move others to their slots, while the expert's cache may still hold prompts of an earlier
    request there.
    """
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    # inside a session the models attend as it needs them to; other ones tell what is right
    models = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    long = [random_ids(1, 20, seed=seed)[0].tolist() for seed in range(6)]
    generator = torch.Generator().manual_seed(0)
    with LocalSampler(expert, rollout_batch_size=4, draft_length=3).session(policy) as session:
        for turn in range(12):
            chosen = torch.randint(6, (6,), generator=generator).tolist()
            request = make_request([long[i] for i in chosen], 1.0, 5, stop_token_ids=(3,), seed=turn, score_all=True)
            check_records(*models, request, session.sample(request))
            # short rows that the expert never or rarely reads, of which some end early
            gamma = INF if turn % 2 else 60.0
            request = make_request([[1], [2, 5], [4], [6]], gamma, 8, stop_token_ids=(3, 5, 7, 9), seed=turn)
            check_records(*models, request, session.sample(request))


def test_seeds():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    first = sample_local(policy, expert, make_request(seed=4))
    again = sample_local(policy, expert, make_request(seed=4))
    other = sample_local(policy, expert, make_request(seed=5))
    assert first.completion_ids == again.completion_ids != other.completion_ids
    for name in ("logps", "expert_logps"):
        torch.testing.assert_close(getattr(first, name), getattr(again, name), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(first.branch, again.branch)
    # the global generator is neither read nor moved
    state = torch.random.get_rng_state()
    torch.manual_seed(123)
    assert sample_local(policy, expert, make_request(seed=4)).completion_ids == first.completion_ids
    torch.random.set_rng_state(state)
    sample_local(policy, expert, make_request(seed=4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rows_of_equal_prompts_differ():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    rows = sequences(sample_local(policy, expert, make_request([[1, 2, 3]] * 50, 3.0)))
    assert len(set(rows)) > 40


# Draft length


def test_best_draft_length_by_hand():
    # a = .5, e = 1: 1/2, 1.5/3, 1.75/4: the first of equals
    assert best_draft_length(0.5, 8, 1.0) == 1
    # a = 0: every draft behind the first is lost
    assert best_draft_length(0.0, 8, 1.0) == 1
    # a = 1: K / (K + e) grows with K
    assert best_draft_length(1.0, 8, 1.0) == 8
    # a = .8, e = 2: 1/3, 1.8/4, 2.44/5, 2.952/6, 3.3616/7, ... = .333, .45, .488, .492, .480
    assert best_draft_length(0.8, 8, 2.0) == 4
    assert best_draft_length(0.8, 3, 2.0) == 3


def test_adaptive_draft_length_follows_the_acceptance():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    request = make_request(RAGGED * 4, 1.0, 40)
    fixed = sample_local(policy, expert, request, draft_length=8)
    adaptive = sample_local(policy, expert, request, draft_length=8, adaptive_draft_length=True)
    assert 1.0 - fixed.stats["replaced"] / fixed.stats["tokens"] < 0.8
    assert adaptive.stats["drafted"] < 0.6 * fixed.stats["drafted"]
    check_records(policy, expert, request, adaptive)
    # an expert that agrees keeps the drafts long: 8 tokens a round
    agreed = sample_local(policy, policy, request, draft_length=8, adaptive_draft_length=True)
    assert agreed.stats["drafted"] == agreed.stats["tokens"] == 20 * 40
    assert agreed.stats["batch_rounds"] == 5


# Errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gamma": [1.0]}, "5 prompts and 1 values of gamma"),
        ({"prompts": [[1], []], "gamma": [1.0, 1.0]}, "prompt of row 1 has no tokens"),
        ({"gamma": [1.0, 0.0, 1.0, 1.0, 1.0]}, "gamma of row 1 is 0.0; it must be positive"),
        ({"gamma": -1.0}, "gamma of row 0 is -1.0"),
        ({"gamma": NAN}, "gamma of row 0 is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": NAN}, "temperature is nan"),
    ],
)
def test_bad_requests(changes, message):
    with pytest.raises(ValueError, match=message):
        make_request(**changes)


def test_mixed_rows_need_an_expert():
    with pytest.raises(ValueError, match="the sampler has no expert"):
        sample_local(make_peaked_model(0, vocab_size=12), None, make_request(gamma=[INF] * 4 + [1.0]))


def test_plain_rows_take_no_place_in_the_experts_cache():
    """Mixed rows among plain ones, in few slots: rows of both kinds end early, move, and are replaced by either."""
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    gammas = (([INF] * 4 + [1.5, INF, 2.0]) * 5)[:30]
    request = make_request(RAGGED * 6, gammas, 12, stop_token_ids=(3, 7), score_all=True)
    mixed = sum(gamma < INF for gamma in request.gamma)
    for size in (4, 12, 64):
        with LocalSampler(expert, rollout_batch_size=size, draft_length=3).session(policy) as session:
            rollout = session.sample(request)
            assert session.expert.decoder.cache.slots == min(mixed, size)
            assert session.policy.cache.slots == min(30, size)
        check_records(policy, expert, request, rollout)
        assert rollout.branch.any(1).sum() > mixed // 2


def test_progress_counts_rows_and_tokens():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    calls = []
    with LocalSampler(expert, rollout_batch_size=3).session(policy) as session:
        rollout = session.sample(make_request(stop_token_ids=(3,)), lambda *counts: calls.append(counts))
    assert tuple(map(sum, zip(*calls))) == (len(RAGGED), rollout.stats["tokens"])
    assert len(calls) == rollout.stats["batch_rounds"]


def test_unknown_rule():
    with pytest.raises(ValueError, match="Unknown branch rule 'sometimes'"):
        sample_local(make_peaked_model(0, 12), make_peaked_model(1, 12), make_request(branch_rule="sometimes"))


@pytest.mark.parametrize("broken", ["policy", "expert"])
def test_nan_logits(broken):
    models = {"policy": make_peaked_model(0, vocab_size=12), "expert": make_peaked_model(1, vocab_size=12)}
    with torch.no_grad():
        models[broken].model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=f"The {broken}'s logits are NaN"):
        sample_local(models["policy"], models["expert"], make_request(gamma=1e-6))
    assert models["policy"].config._attn_implementation == "sdpa"


def test_context_limits():
    short = {"vocab_size": 12, "max_position_embeddings": 16}
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, **short)
    # the longest prompt has 9 tokens
    request = make_request(max_new_tokens=7)
    check_records(policy, expert, request, sample_local(policy, expert, request))
    with pytest.raises(
        ValueError, match=r"9 tokens \(row 2\).* the expert's context of 16 tokens.*more than 8 tokens"
    ):
        sample_local(policy, expert, make_request(max_new_tokens=8))
    with pytest.raises(ValueError, match="the policy's context of 16 tokens"):
        sample_local(expert, policy, make_request(max_new_tokens=8))
    # the expert's context does not matter to plain rows
    sample_local(policy, expert, make_request(max_new_tokens=8, gamma=INF))


def test_learned_positions_up_to_the_last():
    policy, expert = make_model("gpt2", 0), make_model("gpt2", 1)
    request = make_request([[1] * 60, [2], [3] * 30], 1.5, 4)
    for draft_length in (1, 3, 8):
        check_records(policy, expert, request, sample_local(policy, expert, request, draft_length=draft_length))


# Memory


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor, and the most rows of a new tensor whose last dimension is `vocabulary`."""

    def __init__(self, vocabulary, *models):
        super().__init__()
        self.vocabulary, self.numel, self.rows = vocabulary, 0, 0
        self.weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.numel = max(self.numel, tensor.numel())
                if tensor.dim() and tensor.size(-1) == self.vocabulary:
                    self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("gamma", [8.0, 1e-6])
def test_no_logits_of_whole_rollouts(monkeypatch, gamma):
    V, R, T = 1009, 24, 16
    policy, expert = make_peaked_model(0, vocab_size=V), make_peaked_model(1, vocab_size=V)
    request = make_request([[1, 2, 3]] * R, gamma, T, score_all=True)
    with Largest(V, policy, expert) as largest:
        sample_local(policy, expert, request, rollout_batch_size=R)
    # a round's drafts at most
    assert largest.rows <= R * 8
    monkeypatch.setattr(decoder_module, "MAX_LOGITS", 5 * V + 7)
    with Largest(V, policy, expert) as largest:
        rollout = sample_local(policy, expert, request, rollout_batch_size=R)
    assert largest.rows == 5
    assert largest.numel < R * T * V / 10
    check_records(policy, expert, request, rollout)
    monkeypatch.setattr(decoder_module, "MAX_LOGITS", 1)
    with Largest(V, policy, expert) as largest:
        sample_local(policy, expert, make_request([[1, 2, 3]] * 3, gamma, 4))
    assert largest.rows == 1


def test_chunked_sampling_is_exact(monkeypatch):
    monkeypatch.setattr(decoder_module, "MAX_LOGITS", 4 * 100)
    policy, expert = make_peaked_model(0), make_peaked_model(1)
    request = make_request([[3, 1, 2]] * 2000, 2.0, 3, stop_token_ids=(0,))
    rollout = sample_local(policy, expert, request, draft_length=2)
    assert misfit([(sequences(rollout), Tree(policy, expert, request).mixed())]) <= 1.0


def test_vocabulary_of_the_builders():
    assert max(max(prompt) for prompt in RAGGED) < VOCABULARY
