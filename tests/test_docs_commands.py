"""
Every command and every snippet of the documentation is run: page by page, in order, in a folder where the Hub's names
are tiny models and data. A command goes through the door that a shell would use, in this process.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from functools import partial, partialmethod
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from publishing.test_hub import Hub
from study.study_run import TINY as STUDY

import mentor_trl
from benchmarks.study import prepare
from docs_shell import MAKEFILE, TINY, ChatServer, MixedStandIn, Shell, launch, names_of, run_snippet
from docs_world import PAGES, ROOT, make_world
from fake_server import serving
from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import ColocateSampler, MentorGRPOConfig, PolicyLLM, PolicyReplicas, RemoteExpert
from mentor_trl.cli import main as cli
from policy_server import PolicyStandIn
from served_helpers import StandIn, stand_in
from stock_llm_helpers import ENGINE_OPTIONS, KEPT
from stock_server import StockServer
from trainer_helpers import tiny


CLASSES = {"expert": RemoteExpert, "policy": PolicyReplicas}

# What no test can run, with the reason; that the target or the extra exists is checked
EXCEPTIONS = {
    "git clone": "needs a network",
    "pip install": "changes the environment that runs the tests",
    "make lint": "is a run of its own in continuous integration",
    "make dist": "is a run of its own in continuous integration",
    "make docs": "is a run of its own in continuous integration",
    "make test": "is this run",
    "make test-slow": "is a run of its own in continuous integration",
    "make test-vllm": "is a run of its own in continuous integration",
}
# What else is changed in a command than its size, and the test that runs it as it is
CHANGED = {
    "mentor-trl serve": ("says what it would start", "vllm_plugin/test_serve.py"),
    "mentor-trl serve --policy": ("says what it would start", "vllm_server/test_policy_server.py"),
    "mentor-trl serve --expert": ("says what it would start", "vllm_expert/test_expert_server.py"),
    "vllm serve": ("is read by the parser of vLLM", "vllm_plugin/test_serve.py"),
    "vllm_mode: colocate": ("samples without vLLM", "test_docs_commands.py"),
    "config_1gpu_remote_expert.yaml": ("samples without vLLM", "vllm_trainer/test_stock_training_recipes.py"),
    "config_1gpu_qlora.yaml": ("has no bitsandbytes", "vllm_trainer/test_stock_training_recipes.py"),
    "--num_processes": ("is read by the parser of accelerate; one process runs", "cli/test_cli.py"),
    "--report_to": ("writes to a folder", "training/test_trackers.py"),
    "--push_to_hub": ("meets a stand-in of the Hub", "publishing/test_hub.py"),
    "hf upload": ("meets a stand-in of the Hub", "publishing/test_hub.py"),
    "--push_results": ("meets a stand-in of the Hub", "publishing/test_model_index.py"),
    "--backend server": ("meets a stand-in of a server", "evaluation/test_harness.py"),
    # lm-eval's class of vLLM asks for the distribution called vllm, which the build for the CPU is not
    "--backend vllm": ("is hf", "evaluation/test_harness.py"),
}
EVAL = "mentor-trl eval --model outputs/mentor --tasks math500 aime24 aime25 amc23 --output_dir"
GSM8K = "mentor-trl train --config recipes/SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml"
# What a page takes for granted that commands have made: they run first
BEFORE = {
    "docs/plots.md": [
        "make quickstart",
        f"{EVAL} results/grpo",
        f"{EVAL} results/mentor",
        f"{GSM8K} --output_dir RUN",
    ],
    "docs/recipes.md": [
        f"{EVAL} results/grpo",
        f"{EVAL} results/luffy",
        f"{EVAL} results/questa",
    ],
    "docs/resuming.md": [f"{GSM8K} --save_strategy steps"],
    "examples/space/README.md": [f"{GSM8K} --output_dir RUN"],
}
# What the names of a page's snippets give
GIVES = {
    "docs/algorithms.md": lambda names: any("winners" in entry for entry in names["trainer"].state.log_history),
    "docs/training.md": lambda names: names["short_answer_reward"](["It is 7", "no"], answer="77") == [1.0, 0.0],
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block that is run."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert {language for _, language, _ in found} <= {"bash", "python", "json", "yaml", "bibtex", ""}, page
    return [(language, textwrap.dedent(text)) for _, language, text in found if language in ("bash", "python")]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block, without settings of the environment."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", "").splitlines()]
    return [line[1:] if re.match(r"\w+=", line[0]) else line for line in lines if line]


def all_commands() -> list[list[str]]:
    found = [text for page in PAGES for language, text in blocks(page) if language == "bash"]
    return [words for text in found for words in commands(text)]


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


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "outputs"


@pytest.fixture
def make_shell(tmp_path, monkeypatch, servers, quickstart, tiny_model_dir, tiny_expert_dir):
    """`make_shell(text)`: a shell in a folder that a page of this text needs."""
    hub = Hub()
    call = lambda api, name, *args, **kwargs: getattr(hub, name)(api, *args, **kwargs)
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, partialmethod(call, name))
    monkeypatch.setattr("mentor_trl.publishing.model_index.push_card", lambda *args: hub.pushes.append(args) or "url")
    monkeypatch.setattr(cli, "launch_script", launch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(prepare, "Settings", lambda: STUDY)
    monkeypatch.setattr(prepare, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    with stand_in():
        monkeypatch.setattr(StandIn, "expert_name", "open-r1/OpenR1-Qwen-7B")

        def make(text: str, policy: Path = tiny_model_dir, expert: Path = tiny_expert_dir) -> Shell:
            make_world(tmp_path, text, policy, expert)
            return Shell(text, servers, hub, quickstart)

        yield make


@pytest.mark.parametrize("page", list(filter(blocks, PAGES)), ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, make_shell, servers, monkeypatch):
    name, shell = str(page.relative_to(ROOT)), make_shell(page.read_text())
    names = names_of(servers)
    at = lambda kind: lambda urls, *args, **kwargs: CLASSES[kind](shell.addresses(urls, kind), *args, **kwargs)
    monkeypatch.setattr(mentor_trl, "RemoteExpert", at("expert"))
    monkeypatch.setattr(mentor_trl, "PolicyReplicas", at("policy"))
    monkeypatch.setattr(mentor_trl, "ServerSampler", lambda url: StandIn(url, None, None))
    monkeypatch.setattr(mentor_trl, "ColocateSampler", lambda *folders: StandIn(folders, None, None))
    monkeypatch.setattr(mentor_trl, "PolicyLLM", lambda *args, **options: PolicyReplicas(servers["policy"][0]))
    monkeypatch.setattr(mentor_trl, "MentorGRPOConfig", partial(MentorGRPOConfig, **TINY))
    for command in BEFORE.get(name, []):
        shell.run(shlex.split(command))
    for language, text in blocks(page):
        if language == "python":
            run_snippet(text, names)
            continue
        for words in commands(text):
            if exception(words) is None:
                shell.run(words)
    assert name not in GIVES or GIVES[name](names)


def exception(words: list[str]) -> str | None:
    """The key of `EXCEPTIONS` that a command falls under."""
    return next((key for key in EXCEPTIONS if words[:2] == key.split()), None)


def test_exceptions_are_commands_of_the_pages():
    found = [words for words in all_commands() if exception(words)]
    assert {exception(words) for words in found} == EXCEPTIONS.keys()
    for words in found:
        if words[0] == "make":
            assert f"\n{words[1]}: " in MAKEFILE
        elif words[0] == "pip":
            check_extras(words)
            assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()


def check_extras(words: list[str]) -> None:
    extras = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", " ".join(words))))
    assert all(f"\n{name} = [" in (ROOT / "pyproject.toml").read_text() for name in extras), words


def test_tables_name_what_there_is():
    assert BEFORE.keys() | GIVES.keys() <= {str(page.relative_to(ROOT)) for page in PAGES if blocks(page)}
    lines = [" ".join(words) for words in all_commands()]
    recipes = {name for line in lines for name in re.findall(r"recipes/\S+\.yaml", line)}
    texts = "\n".join([*lines, *((ROOT / name).read_text() for name in recipes)])
    for name, (_, test) in CHANGED.items():
        assert name in texts and (ROOT / "tests" / test).is_file(), name


def in_sentences() -> set[tuple[str, ...]]:
    """The words of commands that sentences name, up to a pipe or a placeholder."""
    texts = [re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL) for page in PAGES]
    found = {line for text in texts for line in re.findall(r"`((?:make|mentor-trl|pip|python) [^`|]*)[^`]*`", text)}
    return {tuple(word for word in shlex.split(line) if word != "..." and not word.isupper()) for line in found}


def test_commands_in_sentences_name_what_there_is(capsys):
    helps: dict[tuple[str, ...], str] = {}
    for first, *words in in_sentences():
        if first == "mentor-trl":
            name = tuple(words[:2] if words[0] in ("data", "plot") and words[1:] else words[:1])
            if name not in helps:
                with contextlib.suppress(SystemExit):
                    cli.main([*name, "--help"])
                helps[name] = capsys.readouterr().out
            assert helps[name], name
            assert all(f"{word} " in helps[name] for word in {*words} - {"--help"} if word.startswith("--")), words
        elif first == "python":
            file = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
            assert all(f'"{word}"' in (ROOT / file).read_text() for word in words if word.startswith("--")), words
        elif first == "make":
            assert all("=" in word or f"\n{word}: " in MAKEFILE for word in words), words
        else:
            check_extras(words)


@pytest.mark.vllm
def test_vllm_reads_the_serving_commands(make_shell, capsys):
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, shell = FlexibleArgumentParser(prog="vllm"), make_shell("")
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    found = [words for words in all_commands() if words[1] == "serve"]
    assert len(found) > 10
    for words in found:
        if words[0] == "mentor-trl":
            capsys.readouterr()
            shell.run(words)
            words = shlex.split(capsys.readouterr().out.split(" vllm ", 1)[1])
        else:
            words = words[1:]
        assert parser.parse_args(words).max_model_len == 9216


@pytest.fixture
def large_shell(make_shell, tmp_path):
    """A shell with models of heads that the kernels of vLLM know."""
    for seed, name in enumerate(("policy", "expert")):
        tiny(seed).save_pretrained(tmp_path / name)
        make_tiny_tokenizer().save_pretrained(tmp_path / name)
    return make_shell("", tmp_path / "policy", tmp_path / "expert")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param("shared", marks=pytest.mark.shared_engine), "colocated"])
def test_snippets_with_engines(page, large_shell, servers, monkeypatch):
    """The engines that [`test_page`] replaces."""
    options = {**ENGINE_OPTIONS, "skip_tokenizer_init": False, "max_num_seqs": 8}
    names = names_of(servers)
    for engine in (ColocateSampler, PolicyLLM):
        monkeypatch.setattr(mentor_trl, engine.__name__, partial(engine, **options))
    monkeypatch.setattr(mentor_trl, "ServerSampler", lambda url: StandIn(url, None, None))
    page = ROOT / "docs" / "engines" / f"{page}.md"
    (snippet,) = [text for language, text in blocks(page) if language == "python"]
    run_snippet(snippet.replace("9216", "64"), names)
    KEPT.append(names["sampler"])
    with names["sampler"].session() as session:
        assert session.sample(names["request"]).completion_ids[0]


def colocated() -> dict[str, list[str]]:
    """
    The first command that trains by each recipe with an engine of policy and expert in the trainer's process. The
    engines of the baselines are TRL's, which give no weights to vLLM's build for the CPU, and those with an expert at
    an address run in tests/vllm_trainer.
    """
    found = [words for words in all_commands() if "train" in words and "/mentor/" in " ".join(words)]
    recipes = {words[words.index("--config") + 1]: words for words in reversed(found)}
    texts = {name: (ROOT / name).read_text() for name in recipes}
    ours = lambda text: "vllm_mode: colocate" in text and "expert_base_url" not in text
    return {name: recipes[name] for name, text in texts.items() if ours(text)}


@pytest.mark.vllm
@pytest.mark.shared_engine
@pytest.mark.slow
@pytest.mark.parametrize("words", colocated().values(), ids=colocated())
def test_training_with_engines(words, large_shell, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}

    def start(name: str, launch_args: list[str], script_args: list[str]) -> int:
        command = [sys.executable, str(ROOT / "mentor_trl" / "cli" / name), *script_args]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.returncode

    monkeypatch.setattr(cli, "launch_script", start)
    large_shell.colocated = {"vllm_gpu_memory_utilization": 0.05, "vllm_max_model_length": 1024}
    large_shell.colocated |= {"use_vllm": True, "vllm_enable_sleep_mode": False}
    large_shell.run(words)
