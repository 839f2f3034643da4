"""`mentor-trl eval` on tiny models and a server in this process."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl.cli import eval as script
from mentor_trl.cli import main as cli
from mentor_trl.data import MENTOR_SYSTEM_PROMPT
from mentor_trl.errors import SetupError
from mentor_trl.evaluation import PAPER_TASKS, TASKS, harness, token_limit
from mentor_trl.evaluation.harness import Settings, generation_kwargs


pytest.importorskip("lm_eval")

PROBLEMS = [{"problem": f"what is {i}+{i}?", "answer": str(2 * i)} for i in range(4)]
CHOICES = {"question": "which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}


@pytest.fixture
def data_dir(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("math500", "aime24"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    (folder / "arc_challenge.jsonl").write_text(json.dumps(CHOICES) + "\n")
    return folder


def evaluate(tmp_path: Path, data_dir: Path, *options: str, model: str | Path) -> tuple[dict, dict[str, list]]:
    output = tmp_path / "results"
    argv = ["eval", "--model", str(model), "--data_dir", str(data_dir), "--output_dir", str(output), *options]
    assert cli.main(argv) == 0
    results = json.loads((output / "results.json").read_text())
    return results, {name: rows_of(output / f"samples_{name}.jsonl") for name in results["tasks"]}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", *argv])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_hf(tmp_path, data_dir, tiny_model_dir):
    options = "--tasks math500 aime24 arc_challenge --num_samples 3 --max_new_tokens 8 --limit 2".split()
    results, samples = evaluate(tmp_path, data_dir, *options, model=tiny_model_dir)
    assert results["tasks"]["aime24"]["metric"] == "avg@3" and results["tasks"]["aime24"]["temperature"] == 0.6
    assert [len(rows) for rows in samples.values()] == [2, 2, 1]
    row = samples["math500"][1]
    names = "doc_id task prompt completions truncated correct answer verdicts math_verify"
    assert set(row) == set(names.split())
    assert (row["doc_id"], row["task"], row["answer"]) == (1, "math500", "2")
    assert row["prompt"] == f"<bos><sys>{MENTOR_SYSTEM_PROMPT}<user>what is 1+1?<bot>"
    assert len(set(row["completions"])) == 3 and len(row["correct"]) == len(row["verdicts"]) == 3
    assert (tmp_path / "results" / "results.md").read_text().startswith("# Evaluation of")


def test_greedy_is_the_models_own_and_seeds_repeat(tmp_path, data_dir, tiny_model_dir):
    greedy = evaluate(tmp_path, data_dir, "--tasks", "math500", "--max_new_tokens", "8", model=tiny_model_dir)[1]
    row = greedy["math500"][0]
    tokenizer, model = make_tiny_tokenizer(), make_tiny_model(seed=0)
    ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
    own = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert row["completions"] == [tokenizer.decode(own, skip_special_tokens=True)]

    options = "--tasks aime24 --max_new_tokens 8 --num_samples 2 --overwrite_output_dir --seed".split()
    runs = [evaluate(tmp_path, data_dir, *options, seed, model=tiny_model_dir)[1] for seed in "112"]
    texts = [[row["completions"] for row in samples["aime24"]] for samples in runs]
    assert texts[0] == texts[1] != texts[2]


def test_generation_config_of_the_model_has_no_say(tmp_path, data_dir, tiny_model_dir):
    other = tmp_path / "other"
    model = make_tiny_model(seed=0)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=3.0)
    model.save_pretrained(other)
    make_tiny_tokenizer().save_pretrained(other)
    options = "--tasks math500 aime24 --max_new_tokens 8 --num_samples 2 --overwrite_output_dir".split()
    first, second = (evaluate(tmp_path, data_dir, *options, model=path)[1] for path in (tiny_model_dir, other))
    assert [row["completions"] for row in first["aime24"]] == [row["completions"] for row in second["aime24"]]
    assert any(len(set(row["completions"])) == 2 for row in second["math500"])


def test_without_chat_template(tmp_path, data_dir, capsys):
    folder = tmp_path / "base"
    make_tiny_model().save_pretrained(folder)
    make_tiny_tokenizer(chat_template=False).save_pretrained(folder)
    options = "--tasks math500 --limit 1 --max_new_tokens 4".split()
    samples = evaluate(tmp_path, data_dir, *options, model=folder)[1]
    assert samples["math500"][0]["prompt"] == f"{MENTOR_SYSTEM_PROMPT}\n\nwhat is 0+0?"
    assert "has no chat template: prompts are text" in capsys.readouterr().out
    message = error_of(capsys, "--model", str(folder), "--apply_chat_template", "true")
    assert "has no chat template; set it to false" in message


def test_prompts_are_not_cut(data_dir, tiny_model_dir, tmp_path, capsys):
    argv = f"--tasks math500 --max_new_tokens 1800 --data_dir {data_dir} --output_dir {tmp_path / 'out'}".split()
    message = error_of(capsys, "--model", str(tiny_model_dir), *argv)
    assert "`max_new_tokens` 1800 exceeds the model's 2048 positions; set `max_new_tokens` to" in message


def test_limit_fits_the_model_by_default(tmp_path, data_dir, capsys):
    short_model(tmp_path / "short", 400)
    results, samples = evaluate(tmp_path, data_dir, "--tasks", "math500", model=tmp_path / "short")
    found, (row, *_) = results["tasks"]["math500"], samples["math500"]
    prompt = len(make_tiny_tokenizer()(row["prompt"], add_special_tokens=False).input_ids)
    assert found["max_new_tokens"] == found["room"] == 400 - prompt
    assert f"at most {400 - prompt} new tokens" in capsys.readouterr().out
    argv = f"--data_dir {data_dir} --tasks math500 --output_dir {tmp_path / 'none'} --model"
    short_model(tmp_path / "shorter", prompt)
    assert "leaves no room for a completion" in error_of(capsys, *argv.split(), str(tmp_path / "shorter"))


def short_model(folder: Path, positions: int) -> None:
    model = make_tiny_model()
    model.config.max_position_embeddings = positions
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)


def test_cut_completions_are_those_without_an_end(tmp_path, data_dir, tiny_model_dir):
    options = "--tasks aime24 --num_samples 8 --temperature 5 --max_new_tokens 60".split()
    results, samples = evaluate(tmp_path, data_dir, *options, model=tiny_model_dir)
    cut = [(text, flag) for row in samples["aime24"] for text, flag in zip(row["completions"], row["truncated"])]
    assert results["tasks"]["aime24"]["truncated"] == sum(flag for _, flag in cut) / 32
    lengths = {flag: [len(text) for text, one in cut if one == flag] for flag in (0, 1)}
    assert lengths[0] and lengths[1] and max(lengths[0]) < max(lengths[1])


def test_cut_rows_of_a_batch():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 5]))
    lm = SimpleNamespace(model=model, eot_token_id=3)
    rows = torch.tensor([[2, 9, 7, 7], [2, 9, 7, 5], [2, 9, 3, 0], [2, 9, 2, 0]])
    options = {"context": rows[:, :2], "max_length": 4}
    assert token_limit._cut_rows(lm, rows, options) == [True, False, False, False]
    assert token_limit._cut_rows(lm, rows, {**options, "max_length": 5}) == [False] * 4
    ends = [SimpleNamespace(outputs=[SimpleNamespace(finish_reason=end)]) for end in ("stop", "length")]
    assert token_limit._cut_rows(lm, ends, {}) == [False, True]


class _Server(ThreadingHTTPServer):
    """Answers `\\boxed{seed mod 2}` and keeps the requests, as a server that honours seeds would."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.positions: int | None = None  # of the model, if it tells
        self.requests: list[tuple[str, dict]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._reply({"data": [{"id": "served"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            if self.server.positions is None:
                return self.send_error(404)
            return self._reply({"count": len(request["messages"]) + 8, "max_model_len": self.server.positions})
        self.server.requests.append((self.path, request))
        if request["max_tokens"] > 1000:
            return self.send_error(400, "too long")
        answer = rf"\boxed{{{request['seed'] % 2}}}"
        message = {"role": "assistant", "reasoning_content": "hm", "content": answer}
        choice = {"message": message} if "chat" in self.path else {"text": answer}
        end = "length" if request["seed"] % 4 == 0 else "stop"
        self._reply({"choices": [{"index": 0, "finish_reason": end, **choice}]})

    def _reply(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("concurrent", [1, 8])
def test_server_gets_a_seed_for_each_sample(tmp_path, data_dir, server, concurrent):
    options = f"--backend server --base_url {server.url} --tasks aime24 --num_samples 4 --max_new_tokens 5 --seed 10"
    results, samples = evaluate(
        tmp_path, data_dir, *options.split(), "--model_args", f"num_concurrent={concurrent}", model="served"
    )
    seeds = Counter((request["messages"][1]["content"], request["seed"]) for _, request in server.requests)
    assert seeds == Counter({(row["problem"], seed): 1 for row in PROBLEMS for seed in range(10, 14)})
    path, request = server.requests[0]
    assert path == "/v1/chat/completions" and request["messages"][0]["content"] == MENTOR_SYSTEM_PROMPT
    assert (request["temperature"], request["top_p"], request["top_k"], request["max_tokens"]) == (0.6, 1.0, -1, 5)
    assert request["repetition_penalty"] == 1.0 and request["stop"] == []
    assert sorted(samples["aime24"][0]["completions"])[0] == r"<think>hm</think>\boxed{0}"
    assert [sum(row["truncated"]) for row in samples["aime24"]] == [1] * 4  # of seeds 10 to 13, that of 12
    assert results["tasks"]["aime24"]["truncated"] == 0.25
    # The answers are 0, 2, 4 and 6; half of the samples say 0
    assert [sum(row["correct"]) for row in samples["aime24"]] == [2, 0, 0, 0]
    assert results["tasks"]["aime24"]["pass_at_k"]["4"]["value"] == 0.25


def test_limit_fits_what_a_server_tells(tmp_path, data_dir, server, capsys):
    server.positions = 100  # the prompt of two messages takes 10
    options = f"--backend server --base_url {server.url} --tasks math500".split()
    results, _ = evaluate(tmp_path, data_dir, *options, model="served")
    assert {request["max_tokens"] for _, request in server.requests} == {90}
    assert results["tasks"]["math500"]["max_new_tokens"] == results["tasks"]["math500"]["room"] == 90
    assert "MATH500: at most 90 new tokens a completion; the longest prompt takes 10 of" in capsys.readouterr().out


def test_server_with_text_prompts(tmp_path, data_dir, server):
    options = f"--backend server --base_url {server.url}/v1/ --tasks math500 --apply_chat_template false".split()
    options += ["--max_new_tokens", "8"]
    evaluate(tmp_path, data_dir, *options, model="served")
    assert {path for path, _ in server.requests} == {"/v1/completions"}
    prompts = {request["prompt"] for _, request in server.requests}
    assert f"{MENTOR_SYSTEM_PROMPT}\n\n{PROBLEMS[0]['problem']}" in prompts


def test_server_errors(capsys, server, data_dir, tmp_path):
    common = f"--backend server --tasks math500 --data_dir {data_dir} --output_dir {tmp_path / 'out'}".split()
    url = ("--base_url", server.url)
    assert "needs the server's address" in error_of(capsys, "--model", "served", *common)
    assert "serves served, not 'other'" in error_of(capsys, "--model", "other", *common, *url)
    assert "give an address as" in error_of(capsys, "--model", "served", *common, "--base_url", "localhost:1")
    assert "No server answers" in error_of(capsys, "--model", "served", *common, "--base_url", "http://127.0.0.1:9")


@pytest.mark.parametrize("concurrent", [1, 8])
def test_server_refuses(capsys, server, data_dir, tmp_path, concurrent):
    argv = f"--model served --backend server --base_url {server.url} --tasks math500 --limit 2 --data_dir {data_dir}"
    options = f"--output_dir {tmp_path / 'out'} --model_args max_retries=1,num_concurrent={concurrent}"
    message = error_of(capsys, *argv.split(), *options.split())
    assert "The server refuses" in message and "400" in message and "`max_new_tokens`" in message


def test_options_are_checked_before_the_model_is_loaded(capsys, data_dir, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "make_model", lambda *args, **kwargs: pytest.fail("the model is loaded"))
    model = ("--model", str(tiny_model_dir), "--data_dir", str(data_dir), "--output_dir", str(tmp_path))
    assert "No model is given" in error_of(capsys)
    assert "There is no set 'math'" in error_of(capsys, *model, "--tasks", "math")
    assert "holds no mmlu_pro" in error_of(capsys, *model, "--tasks", "mmlu_pro")
    greedy = "--tasks math500 --num_samples 4 --temperature 0".split()
    assert "which are all the same" in error_of(capsys, *model, *greedy)
    assert "`limit` is 0" in error_of(capsys, *model, "--limit", "0")
    assert "no result for a model card" in error_of(capsys, *model, "--limit", "5", "--push_results", "org/model")
    assert "write it as key=value" in error_of(capsys, *model, "--model_args", "dtype")
    assert "did you mean 'num_samples'" in error_of(capsys, *model, "--num_sample", "4")
    assert "cannot be loaded" in error_of(capsys, "--model", str(tmp_path / "none"))
    monkeypatch.undo()
    unknown = ("--output_dir", str(tmp_path / "out"), "--tasks", "math500", "--model_args", "colour=1")
    assert "cannot be loaded: " in error_of(capsys, *model[:4], *unknown)
    (tmp_path / "results.json").write_text("{}")
    assert "already holds results" in error_of(capsys, *model, "--tasks", "math500")


def test_missing_packages(capsys, monkeypatch, tiny_model_dir):
    with monkeypatch.context() as patch:
        patch.setattr(harness.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'mentor-trl[eval]'" in error_of(capsys, "--model", str(tiny_model_dir))
    with pytest.raises(SetupError, match=r"pip install 'mentor-trl\[vllm\]'"):
        harness.make_model("vllm", str(tiny_model_dir))


def test_defaults_are_the_papers():
    tasks = {name: yaml_of(name) for name in TASKS}
    sampled = {name for name, config in tasks.items() if config["repeats"] > 1}
    assert sampled == {"aime24", "aime25", "amc23"}
    for name, config in tasks.items():
        assert config["description"] == MENTOR_SYSTEM_PROMPT
        num_samples, temperature = Settings().resolve(config["repeats"])
        assert (num_samples, temperature) == ((32, 0.6) if name in sampled else (1, 0.0))
        kwargs = generation_kwargs("vllm", Settings(), temperature)
        assert kwargs | config["generation_kwargs"] == kwargs  # what lm-eval's own command line would use
    assert len(PAPER_TASKS) == 9 and token_limit.MAX_NEW_TOKENS == 8192


def yaml_of(name: str) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(harness.TASK_FOLDER / f"{name}.yaml", resolve_func=False)


def test_adapters(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert harness._weights("hf", str(tmp_path)) == {"pretrained": "org/base", "peft": str(tmp_path)}
    assert harness._weights("vllm", str(tmp_path)) == {"pretrained": "org/base", "lora_local_path": str(tmp_path)}
    assert harness._weights("hf", "org/model") == {"pretrained": "org/model"}


def test_launch_options_go_through_accelerate(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "launch_script", lambda *args: calls.append(args) or 0)
    assert cli.main("eval --model m --num_processes 2 --limit 3".split()) == 0
    assert calls == [("eval.py", ["--num_processes", "2"], ["--model", "m", "--limit", "3"])]


def test_results_go_to_the_card(tmp_path, data_dir, tiny_model_dir, monkeypatch):
    pushed = []
    monkeypatch.setattr("mentor_trl.publishing.model_index.push_card", lambda *args: pushed.append(args) or "url")
    card = tmp_path / "card"
    card.mkdir()
    options = f"--tasks math500 --max_new_tokens 4 --model_card {card} --push_results org/model".split()
    evaluate(tmp_path, data_dir, *options, model=tiny_model_dir)
    text = (card / "README.md").read_text()
    assert "HuggingFaceH4/MATH-500" in text and "| MATH500 | pass@1 | 0.00 |" in text
    ((repo_id, entries),) = pushed
    assert repo_id == "org/model" and [entry.dataset_name for entry in entries] == ["MATH500"]


def test_config_file(tmp_path, data_dir, tiny_model_dir):
    config = tmp_path / "eval.yaml"
    config.write_text("tasks: [math500]\nlimit: 1\nmax_new_tokens: 4\nsystem_prompt: none\n")
    samples = evaluate(tmp_path, data_dir, "--config", str(config), model=tiny_model_dir)[1]
    assert samples["math500"][0]["prompt"] == "<bos><user>what is 0+0?<bot>"


def test_help_has_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for dataclass in (script.EvalModelArguments, script.EvalDataArguments, script.EvalReportArguments):
        for name in dataclass.__dataclass_fields__:
            assert f"--{name} " in text


def test_device_without_gpu(monkeypatch, tiny_model_dir):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert harness.make_model("hf", str(tiny_model_dir)).device.type == "cpu"
