"""
Every command and every snippet of the documentation is run: page by page, in order, in a folder where the Hub's names
are tiny models and data. A command goes through the door that a shell would use, in this process.
"""

import contextlib
import glob
import importlib
import re
import runpy
import shlex
import sys
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from docs_world import PAGES, ROOT, make_world, problem
from huggingface_hub import HfApi
from publishing.test_hub import Hub

import mentor_trl
from fake_server import FakeServer, serving
from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig, MixedRequest, PolicyReplicas, RemoteExpert
from mentor_trl.cli import main as cli
from mentor_trl.cli.train import make_parser as train_parser
from policy_server import PolicyStandIn
from served_helpers import StandIn, stand_in
from stock_server import StockServer
from trainer_helpers import SETTINGS


sys.path.insert(0, str(ROOT))

from study.study_run import TINY as STUDY  # noqa: E402
from test_quickstart import TINY as QUICKSTART  # noqa: E402

from benchmarks.study import prepare as study  # noqa: E402


TINY = {**SETTINGS, "max_steps": 1, "max_completion_length": 4}
CLASSES = {"expert": RemoteExpert, "policy": PolicyReplicas}
MAKEFILE = (ROOT / "Makefile").read_text()
PARTS = ("run", "prepare", "report")  # of the quickstart
# Of a snippet
REPLACED = {"max_new_tokens=256": "max_new_tokens=8", "top_p=0.95": "top_p=1.0", '"/shared/': '"shared/'}

# What no test can run, with the reason; as far as it can be checked, `check_exception` does
EXCEPTIONS = {
    "pip install": "changes the environment that runs the tests",
    "make lint": "is a run of its own in continuous integration",
    "make dist": "is a run of its own in continuous integration",
    "make docs": "is a run of its own in continuous integration",
    "make test": "is this run",
    "make test-slow": "is a run of its own in continuous integration",
    "make test-vllm": "is a run of its own in continuous integration",
}
# What becomes of a command beside its size. vLLM is started by the tests that are named.
CHANGED = {
    "mentor-trl serve": "prints what it would start: tests/vllm_plugin, tests/vllm_server and tests/vllm_expert do",
    "vllm serve": "is parsed by vLLM: tests/vllm_plugin/test_serve.py starts it",
    "--backend vllm": "is hf: lm-eval's class of vLLM is not ours, and wants the distribution called vllm",
    "vllm_mode: colocate": "samples in process: tests/vllm_trainer/test_{colocate,stock}* trains so",
    "--num_processes N": "is read by accelerate's parser, and one process runs: tests/training/distributed*",
    "--push_to_hub, --push_results, hf upload": "meet the stand-in of tests/publishing",
}
# What a page takes for granted that commands have made: they run first
BEFORE = {
    "docs/plots.md": [
        "make quickstart",
        "mentor-trl eval --model outputs/mentor --tasks math500 aime24 aime25 amc23 --output_dir results/grpo",
        "mentor-trl eval --model outputs/mentor --tasks math500 aime24 aime25 amc23 --output_dir results/mentor",
        "mentor-trl train --config recipes/SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml --output_dir RUN",
    ],
    "docs/recipes.md": [
        "mentor-trl eval --model outputs/mentor --tasks math500 aime24 --output_dir results/grpo",
        "mentor-trl eval --model outputs/mentor --tasks math500 aime24 --output_dir results/luffy",
        "mentor-trl eval --model outputs/mentor --tasks math500 aime24 --output_dir results/questa",
    ],
    "docs/resuming.md": [
        "mentor-trl train --config recipes/SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml --save_strategy steps"
    ],
    "examples/space/README.md": ["mentor-trl train --config recipes/SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml --output_dir RUN"],
}


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(str(page.relative_to(ROOT)), *block) for block in found]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block, without settings of the environment."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", "").splitlines()]
    return [line[1:] if re.match(r"\w+=", line[0]) else line for line in lines if line]


class Shell:
    """Runs the commands and snippets of a page in the folder where it is made."""

    def __init__(self, servers: dict[str, list[str]], hub: Hub):
        self.servers, self.hub = servers, hub
        self.served: dict[str, str] = {}  # kind of server by the address that the page gives it
        self.ran: list[str] = []

    def run(self, words: list[str]) -> None:
        words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
        if words[0] == "python":
            return self.python(words[1:])
        run = {"mentor-trl": self.ours, "vllm": self.vllm, "make": self.make, "hf": self.upload}[words[0]]
        run(words[1:])

    def ours(self, words: list[str]) -> None:
        name = words[0]
        assert name in cli.COMMANDS
        words = getattr(self, f"tiny_{name}", lambda words: words)(words)
        files = sorted(Path().rglob("*"))
        assert cli.main(words) == 0, words
        if "--dry_run" in words:
            assert sorted(Path().rglob("*")) == files
        elif name == "train":
            folder = Path(self.given(words[1:])["output_dir"])
            assert (folder / "recipe.yaml").is_file() and list(folder.glob("*.safetensors")), folder
        for option in {"-o", "--output", "--output_dir", "--html", "--svg"} & set(words):
            made = Path(words[words.index(option) + 1])
            assert list(made.iterdir()) if made.is_dir() else made.stat().st_size, made

    def given(self, words: list[str]) -> dict[str, Any]:
        """What a command of training sets, in its config file or behind it."""
        return train_parser(light=True).given_options(words)

    def tiny_train(self, words: list[str]) -> list[str]:
        given = self.given(words[1:])
        count = int(given.get("num_generations", 8))
        tiny = {**TINY, "per_device_train_batch_size": count, "gradient_accumulation_steps": 1, "dtype": "float32"}
        tiny |= {name: 1 for name in ("save_steps",) if given.get("save_strategy") == "steps"}
        del tiny["num_generations"], tiny["seed"], tiny["learning_rate"], tiny["report_to"]
        if "save_strategy" in given:
            del tiny["save_strategy"]
        if "resume_from_checkpoint" in given:
            tiny["max_steps"] = 2
        if "generation_batch_size" in given:
            tiny["generation_batch_size"] = count
        if "load_in_4bit" in given:
            tiny["load_in_4bit"] = False  # bitsandbytes needs a GPU
        stock = "expert_base_url" in given
        served = given.get("vllm_mode") == "server"
        tiny["use_vllm"] = served
        kinds = {"expert_base_url": "expert", "vllm_server_base_url": "policy" if stock else "mixed"}
        kinds["vllm_policy_server_base_url"] = "policy"
        for name, kind in kinds.items():
            if name in given:
                tiny[name] = self.addresses(given[name], kind, check=f"--{name}" in words or name != "expert_base_url")
        if stock:
            tiny["vllm_weight_sync"] = "auto" if served else "adapter"
        return words + [text for name, value in tiny.items() for text in (f"--{name}", str(value).lower())]

    def tiny_eval(self, words: list[str]) -> list[str]:
        words = ["hf" if word == "vllm" else word for word in words]
        if "--base_url" in words:
            place = words.index("--base_url") + 1
            words[place] = self.servers["openai"][0] + "/v1"
        return [*words, "--max_new_tokens", "4", "--num_samples", "8", "--temperature", "1"]

    def tiny_data(self, words: list[str]) -> list[str]:
        # A tiny model ends a reply at some time, and is never right
        more = ["--keep_correct", "false", "--max_new_tokens", "300", "--dtype", "float32"]
        return [*words, *more] if words[1] == "trajectories" else words

    def tiny_init(self, words: list[str]) -> list[str]:
        return [*words, "--gpus", "0"]

    def tiny_plot(self, words: list[str]) -> list[str]:
        if "--step" in words:  # a tiny run has one
            words[words.index("--step") + 1] = "1"
        return words

    def tiny_serve(self, words: list[str]) -> list[str]:
        kind = "mixed" if {"--policy", "--expert"} <= set(words) else words[1].strip("-")
        port = words[words.index("--port") + 1] if "--port" in words else "8000"
        self.served[f"http://127.0.0.1:{port}"] = kind
        return [*words, "--dry-run"]

    def tiny_health(self, words: list[str]) -> list[str]:
        return ["health", self.addresses(words[1], "mixed")]

    def vllm(self, words: list[str]) -> None:
        given = dict(zip(words, words[1:]))
        assert words[0] == "serve" and Path(words[1]).is_dir()
        assert given["--logprobs-mode"] == "processed_logprobs" and given["--generation-config"] == "vllm"
        self.served[f"http://127.0.0.1:{given.get('--port', 8000)}"] = "expert"

    def addresses(self, urls: str, kind: str, check: bool = True) -> str:
        """Stand-ins in place of a page's servers, which it must have started if they are on this machine."""
        urls = [url.strip() for url in urls.split(",")]
        for url in urls:
            assert not check or "127.0.0.1" not in url or self.served.get(url) == kind, (url, kind, self.served)
        return ",".join(self.servers[kind][: len(urls)])

    def python(self, words: list[str]) -> None:
        more = {"make_expert.py": ["--max_steps", "1"], "branch_points.py": ["--limit", "2", "--tokens", "2"]}
        if words[0] == "-m":
            module = importlib.import_module(words[1])
            sys.argv = words[1:]
            assert module.main() == 0
            return
        sys.argv = [*words, *more[Path(words[0]).name]]
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code

    def make(self, words: list[str]) -> None:
        assert words == ["quickstart"] and "\n\t$(BIN)/python examples/quickstart/run.py\n" in MAKEFILE
        run, prepare, report = (
            importlib.import_module(f"examples.quickstart.{n}") for n in ("run", "prepare", "report")
        )
        more = "--save_strategy steps --max_steps 2 --save_steps 2".split()

        def start(command: list[str], **kwargs: Any) -> SimpleNamespace:
            assert command[1:3] == ["-m", "mentor_trl.cli"]
            return SimpleNamespace(poll=lambda: cli.main(self.tiny_train(command[3:]) + more))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "set_up", lambda: None)
            patch.setattr(run, "subprocess", SimpleNamespace(Popen=start, STDOUT=None))
            patch.setattr(run, "time", SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0))
            patch.setattr(prepare, "Settings", lambda: QUICKSTART)
            patch.setattr(report, "COMPARED_STEP", 2)
            patch.setattr(sys, "argv", ["run.py"])
            assert run.main() == 0 and Path("outputs/quickstart/report.md").is_file()

    def upload(self, words: list[str]) -> None:
        from huggingface_hub.cli.hf import app

        before = len(self.hub.pushes)
        app(words, standalone_mode=False)
        assert len(self.hub.pushes) == before + 1

    def snippet(self, text: str, names: dict[str, Any]) -> None:
        for old, new in REPLACED.items():
            text = text.replace(old, new)
        exec(compile(text, "snippet", "exec"), names)
        if "trainer" in names:
            assert names["trainer"].state.global_step == 1
            assert Path(names["trainer"].args.output_dir, "recipe.yaml").is_file()


def launch(name: str, launch_args: list[str], script_args: list[str]) -> int:
    """What `accelerate launch` would start, in this process."""
    launch_command_parser().parse_args([*launch_args, name, *script_args])
    return importlib.import_module(f"mentor_trl.cli.{name[:-3]}").run(script_args)


class MixedStandIn(PolicyStandIn):
    """What a server of policy and expert says of itself."""

    def info(self) -> dict[str, Any]:
        return {**super().info(), "kind": "mixed", "expert": "expert", "expert_stop_ids": [2]}


class ChatServer(FakeServer):
    """A server of OpenAI's API that says 2."""

    def answer(self, path: str, body: dict) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "my-model"}]}
        if path == "/tokenize":
            return {"count": 9, "max_model_len": 2048}
        return {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "\\boxed{2}"}}]}


@pytest.fixture(scope="module")
def servers():
    """Addresses of stand-ins by kind; two of the experts and policies, as a page may name several."""
    model, expert, tokenizer = make_tiny_model(seed=0), make_tiny_model(seed=1), make_tiny_tokenizer()
    fakes = {
        "expert": [StockServer(expert, tokenizer, stops=(2,), positions=2048) for _ in range(2)],
        "policy": [PolicyStandIn.of_tokenizer(model, tokenizer) for _ in range(2)],
        "mixed": [MixedStandIn.of_tokenizer(model, tokenizer)],
        "openai": [ChatServer()],
    }
    with contextlib.ExitStack() as stack:
        yield {kind: [stack.enter_context(serving(fake)) for fake in found] for kind, found in fakes.items()}


@pytest.fixture
def make_shell(tmp_path, monkeypatch, servers, tiny_model_dir, tiny_expert_dir):
    """`make_shell(text)`: a shell in a folder that a page of this text needs."""
    hub = Hub()
    call = lambda api, name, *args, **kwargs: getattr(hub, name)(api, *args, **kwargs)
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, partialmethod(call, name))
    monkeypatch.setattr("mentor_trl.publishing.model_index.push_card", lambda *args: hub.pushes.append(args) or "url")
    monkeypatch.setattr(cli, "launch_script", launch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(study, "Settings", lambda: STUDY)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    with stand_in():
        monkeypatch.setattr(StandIn, "expert_name", "open-r1/OpenR1-Qwen-7B")

        def make(text: str) -> Shell:
            make_world(tmp_path, text, tiny_model_dir, tiny_expert_dir)
            return Shell(servers, hub)

        yield make


def names_of(shell: Shell) -> dict[str, Any]:
    """What the snippets take for granted."""
    tokenizer, prompt_ids = make_tiny_tokenizer(), [[1, 9, 20, 31]]
    return {
        "tokenizer": tokenizer,
        "model": make_tiny_model(seed=0),
        "policy": make_tiny_model(seed=0),
        "expert": RemoteExpert(shell.servers["expert"][0], tokenizer),
        "sampler": StandIn("http://127.0.0.1:8000", 64, None),
        "request": MixedRequest(prompt_ids, [0.5], 8, (2,)),
        "prompt_ids": prompt_ids,
        "eos": 2,
        "train_dataset": Dataset.from_list([problem(i) for i in range(8)]),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, make_shell, monkeypatch):
    name, found = str(page.relative_to(ROOT)), blocks(page)
    if not found:
        return
    shell = make_shell(page.read_text())
    names = names_of(shell)
    at = lambda kind: lambda urls, *args, **kwargs: CLASSES[kind](shell.addresses(urls, kind), *args, **kwargs)
    monkeypatch.setattr(mentor_trl, "RemoteExpert", at("expert"))
    monkeypatch.setattr(mentor_trl, "PolicyReplicas", at("policy"))
    monkeypatch.setattr(mentor_trl, "ServerSampler", lambda url: StandIn(url, None, None))
    monkeypatch.setattr(mentor_trl, "ColocateSampler", lambda *folders: StandIn(folders, None, None))
    monkeypatch.setattr(mentor_trl, "PolicyLLM", lambda *args, **options: PolicyReplicas(shell.servers["policy"][0]))
    monkeypatch.setattr(mentor_trl, "MentorGRPOConfig", partial(MentorGRPOConfig, **TINY))
    for command in BEFORE.get(name, []):
        shell.run(shlex.split(command))
    for block in found:
        if block.language == "python":
            shell.snippet(block.text, names)
            continue
        for words in commands(block.text):
            if exception(words) is None:
                shell.run(words)


def exception(words: list[str]) -> str | None:
    return next((key for key in EXCEPTIONS if words[:2] == key.split()), None)


def test_exceptions_are_commands_of_the_pages():
    found = [
        words for page in PAGES for block in blocks(page) if block.language == "bash" for words in commands(block.text)
    ]
    used = {exception(words): words for words in found}
    assert used.keys() - {None} == EXCEPTIONS.keys()
    for words in found:
        if exception(words) is not None:
            check_exception(words)
    assert BEFORE.keys() <= {str(page.relative_to(ROOT)) for page in PAGES if blocks(page)}


def check_exception(words: list[str]) -> None:
    if words[0] == "make":
        assert f"\n{words[1]}: " in MAKEFILE
    else:
        extras = re.findall(r"\w+", words[-1].strip("."))
        assert all(f"\n{name} = [" in (ROOT / "pyproject.toml").read_text() for name in extras)
        assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()


@pytest.mark.vllm
def test_vllm_reads_the_serving_commands(make_shell, capsys):
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, count = FlexibleArgumentParser(prog="vllm"), 0
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    shell = make_shell("")
    for page in PAGES:
        for block in blocks(page):
            for words in commands(block.text) if block.language == "bash" else []:
                if words[:2] == ["mentor-trl", "serve"]:
                    capsys.readouterr()
                    shell.run(words)
                    words = shlex.split(capsys.readouterr().out.split(" vllm ")[1])
                elif words[0] == "vllm":
                    words = words[1:]
                else:
                    continue
                args = parser.parse_args(words)
                count += args.max_model_len == 9216
    assert count > 10
