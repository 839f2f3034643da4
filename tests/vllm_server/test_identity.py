"""Digests that tell models apart, and whose files are trusted."""

import os
import stat

import pytest
import torch

from helpers import make_tiny_model
from mentor_trl.vllm_server.identity import CHUNK, distrust, files_digest, weights_digest


def test_one_changed_weight_is_another_model():
    model = make_tiny_model(seed=0)
    first = weights_digest(model)
    assert weights_digest(make_tiny_model(seed=0)) == first != weights_digest(make_tiny_model(seed=1))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert weights_digest(model) != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_order_counts_and_every_size_is_read(dtype):
    values = torch.arange(2 * CHUNK + 3).remainder(100)
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(values.to(dtype), requires_grad=False)
    first = weights_digest(holder)
    for places in ([0, 1], [0, CHUNK + 1], [5, 2 * CHUNK + 2]):
        changed = values.clone()
        changed[places] = changed[places].flip(0)
        holder.weight.data = changed.to(dtype)
        assert weights_digest(holder) != first
    holder.weight.data = values.to(dtype)
    assert weights_digest(holder) == first


def test_folders_of_other_weights_differ(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tiny_model(seed=seed).save_pretrained(tmp_path / name)
    (tmp_path / "b" / "config.json").unlink()
    a, b, c = (files_digest(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert files_digest(str(tmp_path)) is files_digest("org/model") is None


@pytest.mark.parametrize(
    ("mode", "user", "reason"),
    [
        (0o700, os.geteuid(), None),
        (0o755, 0, None),
        (0o700, os.geteuid() + 1, "belongs to user"),
        (0o702, os.geteuid(), "can be written"),
        (0o770, os.geteuid(), "can be written"),
    ],
)
def test_what_others_may_have_written_is_not_trusted(mode, user, reason):
    found = distrust(os.stat_result((stat.S_IFDIR | mode, 1, 1, 1, user, 0, 0, 0, 0, 0)))
    assert found is None if reason is None else reason in found
