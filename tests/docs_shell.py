"""A shell for the commands of the documentation: it makes them small, and runs them in this process."""

import glob
import importlib
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from publishing.test_hub import Hub
from test_quickstart import TINY as QUICKSTART

from docs_world import ROOT, problem
from fake_server import FakeServer
from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import MixedRequest, RemoteExpert
from mentor_trl.cli import main as cli
from mentor_trl.cli.train import make_parser as train_parser
from policy_server import PolicyStandIn
from served_helpers import StandIn
from trainer_helpers import SETTINGS


TINY = {**SETTINGS, "max_steps": 1, "max_completion_length": 4}
SMALL = {"max_completion_length": 4, "gradient_accumulation_steps": 1, "logging_steps": 1, "dtype": "float32"}
SMALL |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
MAKEFILE = (ROOT / "Makefile").read_text()
PARTS = ("run", "prepare", "report")  # of the quickstart
# In a snippet: what takes long, what a stand-in does not do, and a folder that is not ours
REPLACED = {"max_new_tokens=256": "max_new_tokens=8", "top_p=0.95": "top_p=1.0", '"/shared/': '"shared/'}


class Shell:
    """Runs the commands and snippets of a page in the folder where it is made."""

    def __init__(self, text: str, servers: dict[str, list[str]], hub: Hub, quickstart: Path):
        self.text, self.servers, self.hub, self.quickstart = text, servers, hub, quickstart
        self.colocated: dict[str, Any] = {"use_vllm": False}
        self.served: dict[str, str] = {}  # kind of server by the address that the page gives it

    def run(self, words: list[str]) -> None:
        words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
        if words[0] == "python":
            return self.python(words[1:])
        doors = {"mentor-trl": self.ours, "vllm": self.vllm, "make": self.make, "hf": self.upload}
        assert words[0] in doors, f"{words} is neither run nor one of EXCEPTIONS"
        doors[words[0]](words[1:])

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
        curve = re.search(f"plot training.* {given['output_dir']} ", self.text)
        tiny = SMALL | {"per_device_train_batch_size": count}
        tiny["max_steps"] = 2 if curve or "resume_from_checkpoint" in given else 1
        tiny |= {"save_steps": 1} if "save_strategy" in given else {"save_strategy": "no"}
        changes = {"generation_batch_size": count, "load_in_4bit": False}  # bitsandbytes needs a GPU
        tiny |= {name: value for name, value in changes.items() if name in given}
        if given.get("vllm_mode") == "colocate":
            tiny |= self.colocated
        policy = "policy" if "expert_base_url" in given else "mixed"
        kinds = {"expert_base_url": "expert", "vllm_server_base_url": policy, "vllm_policy_server_base_url": "policy"}
        tiny |= {name: self.addresses(given[name], kind) for name, kind in kinds.items() if name in given}
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

    def addresses(self, urls: str, kind: str) -> str:
        """Stand-ins in place of a page's servers, which it must have started if they are on this machine."""
        urls = [url.strip() for url in urls.split(",")]
        for url in urls:
            assert "127.0.0.1" not in url or self.served.get(url) == kind, (url, kind, self.served)
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
        """The first time, the quickstart runs; what it has left is there again each further time."""
        assert words == ["quickstart"], f"make {words} is neither run nor one of EXCEPTIONS"
        if self.quickstart.exists():
            shutil.copytree(self.quickstart, "outputs/quickstart", dirs_exist_ok=True)
        else:
            self.run_quickstart()
            shutil.copytree("outputs/quickstart", self.quickstart)

    def run_quickstart(self) -> None:
        assert "\n\t$(BIN)/python examples/quickstart/run.py\n" in MAKEFILE
        run, prepare, report = (
            importlib.import_module(f"examples.quickstart.{n}") for n in ("run", "prepare", "report")
        )
        more = "--save_strategy steps --max_steps 3 --save_steps 3 --steps_per_generation 1".split()

        def start(command: list[str], **kwargs: Any) -> SimpleNamespace:
            assert command[1:3] == ["-m", "mentor_trl.cli"]
            return SimpleNamespace(poll=lambda: cli.main(self.tiny_train(command[3:]) + more))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "set_up", lambda: None)
            patch.setattr(run, "subprocess", SimpleNamespace(Popen=start, STDOUT=None))
            patch.setattr(run, "time", SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0))
            patch.setattr(prepare, "Settings", lambda: QUICKSTART)
            patch.setattr(report, "COMPARED_STEP", 3)
            patch.setattr(sys, "argv", ["run.py", "--seeds", "1", "2"])
            assert run.main() == 0 and Path("outputs/quickstart/report.md").is_file()

    def upload(self, words: list[str]) -> None:
        from huggingface_hub.cli.hf import app

        before = len(self.hub.pushes)
        app(words, standalone_mode=False)
        assert len(self.hub.pushes) == before + 1


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


def names_of(servers: dict[str, list[str]]) -> dict[str, Any]:
    """What the snippets take for granted."""
    tokenizer, prompt_ids = make_tiny_tokenizer(), [[1, 9, 20, 31]]
    return {
        "tokenizer": tokenizer,
        "model": make_tiny_model(seed=0),
        "policy": make_tiny_model(seed=0),
        "expert": RemoteExpert(servers["expert"][0], tokenizer),
        "sampler": StandIn("http://127.0.0.1:8000", 64, None),
        "request": MixedRequest(prompt_ids, [0.5], 8, (2,)),
        "prompt_ids": prompt_ids,
        "eos": 2,
        "train_dataset": Dataset.from_list([problem(i) for i in range(8)]),
    }


def run_snippet(text: str, names: dict[str, Any]) -> None:
    """Run Python, among names that it takes for granted; a trainer has then made a step."""
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    exec(compile(text, "snippet", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 1
        assert Path(names["trainer"].args.output_dir, "recipe.yaml").is_file()
