"""
The processor under both of vLLM's model runners: the V2 runner, which has none for CPUs, as far as its own interface
goes.
"""

from types import SimpleNamespace

import pytest
import torch

from branching_helpers import BRANCH, END, NUM_TOKENS, PADDED, TOKEN_OPTIONS, sampling
from mentor_trl.errors import EngineError, SetupError


pytestmark = pytest.mark.vllm


def config(**given):
    return SimpleNamespace(
        **{"additional_config": TOKEN_OPTIONS, "speculative_config": None, "model_config": SimpleNamespace(), **given}
    )


def rows_of_a_batch(count: int = 40):
    """Parameters and prefixes (prompt, output) of rows of every rule; every fifth row is plain."""
    rules = ["entropy", "threshold", "random", "sentence"]
    rows = []
    for seed in range(count):
        plain = {"extra_args": None} if seed % 5 == 0 else {}
        params = sampling(seed, gamma=1.2, rule=rules[seed % 4], span=1 + seed % 3, temperature=0.8, **plain)
        ids = torch.randint(0, 4, (3 + seed % 7,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows.append((params, ids[: 1 + seed % 3], ids[1 + seed % 3 :]))
    return rows


def batch_logits(count: int = 40) -> torch.Tensor:
    return torch.randn(count, PADDED, generator=torch.Generator().manual_seed(1)) * 2


def first_runner(rows, logits, device="cpu"):
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    from mentor_trl.vllm_server.branching import BranchingProcessor

    processor = BranchingProcessor(config(), torch.device(device), False)
    added = [(index, params, prompt, output) for index, (params, prompt, output) in enumerate(rows)]
    processor.update_state(BatchUpdate(len(rows), removed=[], added=added, moved=[]))
    return processor, processor.apply(logits.clone())


def test_both_runners_have_the_same_coins():
    interface = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor.interface")
    from mentor_trl.vllm_server.branching import BranchingProcessor

    rows, logits = rows_of_a_batch(), batch_logits()
    _, expected = first_runner(rows, logits)
    branches = (expected[:, BRANCH] == 0.0).tolist()
    assert 5 < sum(branches) < 35 and not any(branches[::5])

    assert issubclass(BranchingProcessor, interface.LogitsProcessor)
    all_ids = torch.zeros(64, 32, dtype=torch.int32)
    states = SimpleNamespace(
        device=torch.device("cpu"), max_num_reqs=64, vocab_size=PADDED, all_token_ids=SimpleNamespace(gpu=all_ids)
    )
    processor = BranchingProcessor(config(), states)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:40]
    # The slots' earlier requests leave nothing behind
    for slot in slots.tolist():
        assert processor.add_request(slot, sampling(slot, gamma=0.1, rule="always"))
    for slot, (params, prompt, output) in zip(slots.tolist(), rows):
        assert processor.add_request(slot, params)
        all_ids[slot, : len(prompt + output)] = torch.tensor(prompt + output, dtype=torch.int32)
    for order in (torch.arange(40), torch.arange(39, -1, -1), torch.arange(0, 40, 3)):
        lengths = torch.tensor([len(rows[at][1] + rows[at][2]) for at in order.tolist()])
        context = SimpleNamespace(
            idx_mapping=slots[order],
            expanded_idx_mapping=slots[order],
            idx_mapping_np=slots[order].numpy(),
            pos=lengths - 1,
        )
        processor.apply_staged_writes()
        assert torch.equal(processor.apply(logits[order].clone(), context), expected[order])


def test_rows_that_move_and_leave_take_their_coins_along():
    from vllm.v1.sample.logits_processor import MoveDirectionality
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    rows, logits = rows_of_a_batch(), batch_logits()
    processor, expected = first_runner(rows, logits)
    order = list(range(40))
    order[3], order[17] = order[17], order[3]
    moved = [(3, 17, MoveDirectionality.SWAP), (39, 8, MoveDirectionality.UNIDIRECTIONAL)]
    order[8] = order.pop()
    processor.update_state(BatchUpdate(39, removed=[8], added=[], moved=moved))
    assert torch.equal(processor.apply(logits[order].clone()), expected[order])


def test_outputs_grow_without_an_update():
    rows, logits = rows_of_a_batch(), batch_logits()
    processor, _ = first_runner(rows, logits)
    longer = [(params, prompt, [*output, END]) for params, prompt, output in rows]
    for _, _, output in rows:
        output.append(END)
    processor.update_state(None)
    assert torch.equal(processor.apply(logits.clone()), first_runner(longer, logits)[1])


def test_ids_that_vllm_has_not_read_yet():
    params = sampling(1, rule="sentence")
    with pytest.raises(EngineError, match="--no-async-scheduling"):
        first_runner([(params, [1], [2, -1])], batch_logits(1))


def test_no_value_is_read_off_the_device():
    """A tensor without data stands in for one whose values would have to be waited for."""
    _, found = first_runner(rows_of_a_batch(), batch_logits().to("meta"), "meta")
    assert found.shape == (40, PADDED)
    with pytest.raises(RuntimeError, match="meta"):
        found.isinf().any().item()


def test_every_row_is_masked():
    _, found = first_runner([(sampling(0, extra_args=None), [1], [])] * 3, batch_logits(3))
    assert torch.equal(found.isinf(), (torch.arange(PADDED) >= NUM_TOKENS).expand(3, -1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config": SimpleNamespace(enable_prompt_embeds=True)}, "enable-prompt-embeds"),
        ({"watermark_config": object()}, "watermarks"),
    ],
)
def test_engines_that_could_not_branch_exactly(given, message):
    from mentor_trl.vllm_server.branching import BranchingProcessor

    with pytest.raises(SetupError, match=message):
        BranchingProcessor(config(**given), torch.device("cpu"), False)


@pytest.mark.shared_engine
def test_engines_of_both_kinds_may_share_a_process():
    """vLLM adds an extension to the worker class of its process, and no second one of the same methods."""
    from mentor_trl.vllm_plugin.worker import MentorWorkerExtension
    from mentor_trl.vllm_server.policy_worker import PolicyWorkerExtension

    assert MentorWorkerExtension is PolicyWorkerExtension
