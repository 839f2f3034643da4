"""`mentor-trl serve` and `mentor-trl health` without a server."""

import json
import shlex

import pytest

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl.cli.main import main
from mentor_trl.cli.serve import OURS
from mentor_trl.vllm_plugin.options import WORKER_EXTENSION


def printed_command(capsys) -> list[str]:
    return shlex.split(capsys.readouterr().out)


def test_the_equivalent_line(tiny_model_dir, tiny_expert_dir, capsys):
    policy, expert = str(tiny_model_dir), str(tiny_expert_dir)
    options = ["--draft-length", "5", "-tp", "2", "--max-model-len", "512", "--distributed-executor-backend", "ray"]
    assert main(["serve", "--dry-run", "--policy", policy, "--expert", expert, *options]) == 0
    words = printed_command(capsys)
    assert {"VLLM_USE_V2_MODEL_RUNNER=0", "VLLM_SERVER_DEV_MODE=1"} <= set(words)
    assert words[words.index("vllm") : words.index("vllm") + 3] == ["vllm", "serve", expert]
    value = lambda name: words[words.index(name) + 1]
    speculative = json.loads(value("--speculative-config"))
    assert speculative == {
        "method": "draft_model",
        "model": policy,
        "num_speculative_tokens": 5,
        "draft_sample_method": "probabilistic",
        "draft_tensor_parallel_size": 2,
    }
    vocabulary = make_tiny_tokenizer().get_vocab()
    assert json.loads(value("--additional-config")) == {"mentor_trl": {"num_tokens": max(vocabulary.values()) + 1}}
    assert value("--host") == "127.0.0.1" and value("--generation-config") == "vllm"
    assert value("--tensor-parallel-size") == "2" and value("--max-model-len") == "512"
    assert value("--distributed-executor-backend") == "ray" and "--no-async-scheduling" in words


def test_other_hosts_are_warned_of(tiny_model_dir, capsys):
    model = str(tiny_model_dir)
    main(["serve", "--dry-run", "--policy", model, "--expert", model, "--host", "0.0.0.0"])
    assert "replace the weights" in capsys.readouterr().err


@pytest.mark.parametrize("option", OURS)
def test_options_of_ours_are_refused(option, tiny_model_dir, capsys):
    model = str(tiny_model_dir)
    with pytest.raises(SystemExit):
        main(["serve", "--policy", model, "--expert", model, f"{option}=x"])
    assert f"{option} is set by `mentor-trl serve` itself" in capsys.readouterr().err


def test_a_policy_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--expert", "e"])
    assert "--policy is required" in capsys.readouterr().err


def test_a_policy_alone(tiny_model_dir, capsys):
    assert main(["serve", "--dry-run", "--policy", str(tiny_model_dir), "--port", "8001"]) == 0
    words = printed_command(capsys)
    assert words[words.index("vllm") : words.index("vllm") + 3] == ["vllm", "serve", str(tiny_model_dir)]
    value = lambda name: words[words.index(name) + 1]
    assert value("--logprobs-mode") == "processed_logprobs" and value("--port") == "8001"
    assert value("--worker-extension-cls") == WORKER_EXTENSION and value("--generation-config") == "vllm"
    assert "--speculative-config" not in words and "--additional-config" not in words


@pytest.mark.parametrize("expert", [True, False])
def test_weights_come_over_nccl_where_there_is_cuda(expert, tiny_model_dir, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    model = str(tiny_model_dir)
    command = ["serve", "--dry-run", "--policy", model, *(["--expert", model] if expert else [])]
    main(command)
    words = printed_command(capsys)
    assert json.loads(words[words.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}
    main([*command, "--weight-transfer-config", "{}"])
    assert printed_command(capsys).count("--weight-transfer-config") == 1


def test_different_tokens_are_refused(tiny_model_dir, tmp_path, capsys):
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    make_tiny_model(seed=1).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["serve", "--policy", str(tiny_model_dir), "--expert", str(tmp_path)])
    assert "different vocabularies" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["health"], ["serve", "--check"]])
def test_nothing_answers(command, capsys):
    assert main([*command, "http://127.0.0.1:9"]) == 1
    assert "No server answers" in capsys.readouterr().err
