"""`mentor-trl serve` and `mentor-trl health` without a server."""

import json
import os
import re
import shlex
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl.cli.main import main
from mentor_trl.cli.serve import OURS
from mentor_trl.vllm_server.keys import default_key_file, read_key, store_key
from mentor_trl.vllm_server.options import POLICY_WORKER, PROCESSOR
from server_process import free_port


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
    assert value("--middleware") == "mentor_trl.vllm_server.guard.MixedGuard"
    assert {'MENTOR_TRL_ALLOWED_HOSTS=["127.0.0.1"]', "MENTOR_TRL_ALLOWED_ORIGINS=[]"} <= set(words)


def test_other_hosts_are_warned_of(tiny_model_dir, capsys):
    model = str(tiny_model_dir)
    main(["serve", "--dry-run", "--policy", model, "--expert", model, "--host", "0.0.0.0"])
    assert "replace the weights" in capsys.readouterr().err


MODELS = {"mixed": ("--policy", "--expert"), "policy": ("--policy",), "expert": ("--expert",)}


@pytest.mark.parametrize(("kind", "option"), [(kind, option) for kind, options in OURS.items() for option in options])
def test_options_of_ours_are_refused(kind, option, capsys):
    command = ["serve", *(word for name in MODELS[kind] for word in (name, "model"))]
    for given in ([f"{option}=x"], [f"--{option[2:].replace('-', '_')}", "x"]):
        with pytest.raises(SystemExit):
            main([*command, *given])
        assert f"{option} is set by `mentor-trl serve` itself" in capsys.readouterr().err


def test_a_model_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["serve"])
    assert "--policy is required, or --expert" in capsys.readouterr().err


@pytest.mark.parametrize("cuda", [False, True])
def test_a_policy_alone(cuda, tiny_model_dir, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert main(["serve", "--dry-run", "--policy", str(tiny_model_dir), "--port", "8001", "-tp", "2"]) == 0
    words = printed_command(capsys)
    assert words[words.index("vllm") : words.index("vllm") + 3] == ["vllm", "serve", str(tiny_model_dir)]
    value = lambda name: words[words.index(name) + 1]
    assert value("--logprobs-mode") == "processed_logprobs" and value("--port") == "8001"
    assert value("--worker-extension-cls") == POLICY_WORKER and value("--generation-config") == "vllm"
    assert value("--logits-processors") == PROCESSOR and value("--tensor-parallel-size") == "2"
    assert {"VLLM_USE_V2_MODEL_RUNNER=0", "VLLM_SERVER_DEV_MODE=1"} <= set(words)
    assert not {"--speculative-config", "--additional-config", "--api-server-count"} & set(words)
    assert ("--no-enable-chunked-prefill" in words) is not cuda
    assert value("--middleware") == "mentor_trl.vllm_server.guard.PolicyGuard"


def test_adapters_are_loaded_by_one_process(tiny_model_dir, capsys):
    command = ["serve", "--dry-run", "--policy", str(tiny_model_dir), "--enable-lora", "--max-lora-rank", "32"]
    main(command)
    words = printed_command(capsys)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words and "--max-lora-rank" in words
    assert words[words.index("--api-server-count") + 1] == "1"
    with pytest.raises(SystemExit):
        main([*command, "--api-server-count", "2"])
    assert "leave --api-server-count out" in capsys.readouterr().err


def test_an_expert_alone_is_a_stock_server(tiny_expert_dir, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["serve", "--dry-run", "--expert", str(tiny_expert_dir), "--host", "0.0.0.0"]) == 0
    printed = capsys.readouterr()
    words = shlex.split(printed.out)
    value = lambda name: words[words.index(name) + 1]
    assert words[words.index("vllm") : words.index("vllm") + 3] == ["vllm", "serve", str(tiny_expert_dir)]
    assert value("--served-model-name") == str(tiny_expert_dir) and value("--generation-config") == "vllm"
    assert value("--logprobs-mode") == "processed_logprobs"
    assert value("--middleware") == "mentor_trl.vllm_server.guard.ExpertGuard"
    assert not {"--worker-extension-cls", "--logits-processors", "--weight-transfer-config"} & set(words)
    assert not any(word.startswith(("VLLM_SERVER_DEV_MODE", "VLLM_USE_V2")) for word in words)
    assert "expert_api_key_file" in printed.err and "can use it" in printed.err


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


@pytest.mark.parametrize("vllm", [True, False])
def test_health_of_other_servers(vllm, capsys):
    answers = {"/health": {}, "/v1/models": {"data": [{"id": "expert", "root": "/e", "max_model_len": 64, "x": 1}]}}
    answers |= {"/version": {"version": "0.32.0"}} if vllm else {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(answers.get(self.path, {})).encode()
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status = main(["health", f"http://127.0.0.1:{server.server_port}"])
        server.shutdown()
    printed = capsys.readouterr()
    if vllm:
        models = [{"id": "expert", "root": "/e", "max_model_len": 64}]
        assert status == 0 and json.loads(printed.out) == {"kind": "stock", "vllm": "0.32.0", "models": models}
    else:
        assert status == 1 and "not a MENTOR server" in printed.err


@pytest.fixture
def started(monkeypatch, tmp_path) -> list:
    """Command and environment of servers that would have been started."""
    commands, mask = [], os.umask(0o022)
    os.umask(mask)
    monkeypatch.setattr(os, "execve", lambda path, words, environment: commands.append((words, environment)))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("VLLM_API_KEY", "of another program")
    monkeypatch.delenv("MENTOR_TRL_API_KEY", raising=False)
    yield commands
    os.umask(mask)


def test_a_server_has_a_key_of_its_own(started, tiny_model_dir, tmp_path, monkeypatch, capsys):
    command = ["serve", "--policy", str(tiny_model_dir), "--port", str(free_port())]
    (tmp_path / "mine").write_text("key-in-file")
    (tmp_path / "mine").chmod(0o644)
    made = set()
    for _ in range(3):
        main(command)
        made.add(read_key(default_key_file(int(command[-1]))))
    assert len(made) == 3 and all(len(key) >= 32 for key in made)
    del started[1:]
    main([*command, "--api-key", "key-given"])
    main([*command, "--api-key-file", str(tmp_path / "mine")])
    assert "other users can open the key" in capsys.readouterr().err
    monkeypatch.setenv("MENTOR_TRL_API_KEY", "key-in-environment")
    main(command)
    files = [environment["MENTOR_TRL_API_KEY_FILE"] for _, environment in started]
    assert files[0] == files[1] == files[3] == str(default_key_file(int(command[-1])))
    assert files[2] == str(tmp_path / "mine")
    assert read_key(files[0]) == "key-in-environment"
    for words, environment in started:
        secrets = ("key-given", "key-in-environment", "of another program")
        assert not any(secret in word for secret in secrets for word in [*words, *environment.values()])


def test_a_dry_run_makes_no_key(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["serve", "--dry-run", "--policy", str(tiny_model_dir), "--api-key", "secret"]) == 0
    printed = capsys.readouterr()
    assert str(default_key_file(8000)) in printed.out and "secret" not in printed.out + printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-key", "two words"], "--api-key holds no key"),
        (["--api-key-file", "nowhere"], "cannot be read from .*nowhere"),
        (["--api-key", "a", "--api-key-file", "b"], "not both"),
        (["--allowed-origins", "http://x"], "'http://x' is no JSON list of origins"),
        (["--allowed-origins", '"http://x"'], "is no JSON list of origins"),
    ],
)
def test_keys_that_are_none(options, message, started, tiny_model_dir, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["serve", "--policy", str(tiny_model_dir), "--port", str(free_port()), *options])
    assert exit.value.code == 2 and re.search(message, capsys.readouterr().err) and not started


def test_a_port_that_is_taken_keeps_its_key(started, tiny_model_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        store_key("first-key", port)
        with pytest.raises(SystemExit):
            main(["serve", "--policy", str(tiny_model_dir), "--port", str(port)])
        assert read_key(default_key_file(port)) == "first-key"
    assert f"nothing can listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_training_with_a_server_that_is_none_ends_in_one_line(tmp_path, tiny_model_dir, capsys):
    from mentor_trl.cli.train import run

    with open(tmp_path / "data.jsonl", "w") as file:
        file.write(json.dumps({"prompt": "1 + 1", "solution": "2"}) + "\n")
    command = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(tmp_path / "data.jsonl")]
    command += ["--output_dir", str(tmp_path / "run"), "--use_vllm", "true", "--vllm_mode", "server"]
    command += ["--vllm_server_base_url", "http://127.0.0.1:9", "--vllm_server_timeout", "0", "--report_to", "none"]
    command += ["--reward_funcs", "accuracy_reward", "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(SystemExit) as exit:
        run(command)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and "No server answers at http://127.0.0.1:9" in last
