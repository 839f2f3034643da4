import json
import os
import re
import shlex
import subprocess
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from fake_server import serving as answering
from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig
from mentor_trl.cli import data, train
from mentor_trl.cli import serve as serving
from mentor_trl.cli.train import make_parser, resolve_reward_funcs
from served_helpers import stand_in
from stock_server import StockServer


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("**/*.yaml"))
# Configurations for accelerate itself are read by accelerate, those of other trainers by TRL.
EXPERTS = [path for path in RECIPES if path.parent.name == "expert"]
TRAINING_RECIPES = [path for path in RECIPES if "accelerate_configs" not in path.parts and path not in EXPERTS]
MODELS = ("Qwen2.5-7B", "Qwen2.5-3B", "Llama-3.1-8B")
LARGE = [path for path in TRAINING_RECIPES if path.parent.parent.name in MODELS]
SMALL = [path for path in TRAINING_RECIPES if path.parent.parent.name == "SmolLM2-135M-Instruct"]
SLURM, STOCK_SLURM = FOLDER / "slurm" / "mentor_multinode.slurm", FOLDER / "slurm" / "mentor_stock.slurm"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCKS = ["# Model arguments", "# Data arguments", "# Trainer arguments"]

# What the paper states
PAPER = {
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "generation_batch_size": 1024,
    "learning_rate": 1e-6,
    "loss_type": "dapo",
    "lr_scheduler_type": "constant",
    "max_completion_length": 8192,
    "max_grad_norm": 1.0,
    "num_generations": 8,
    "reward_funcs": ["accuracy_reward", "format_reward"],
    "temperature": 1.0,
    "weight_decay": 0.01,
}
PAPER_GUIDANCE = {
    "alpha_schedule": "cosine",
    "correction_exponent": 0.0,
    "entropy_quantile": 0.95,
    "expert_decay_steps": 120,
    "num_mixed_generations": 4,
}
PAPER_REWARDS = {"Qwen2.5-7B": [0.9, 0.1], "Qwen2.5-3B": [0.9, 0.1], "Llama-3.1-8B": [0.8, 0.2]}

# Keys of what the expert does in rollouts, which the baselines do without
GUIDANCE = {
    "guide_prompts",
    "alpha",
    "alpha_schedule",
    "correction",
    "correction_cap",
    "correction_exponent",
    "correction_level",
    "entropy_quantile",
    "entropy_threshold_min",
    "expert_decay_steps",
    "expert_model_name_or_path",
    "num_mixed_generations",
}
GROUP = {"generation_batch_size", "gradient_accumulation_steps", "num_generations"}
TO_SERVER = {
    "draft_length",
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_mode",
    "vllm_read_timeout",
    "vllm_server_base_url",
    "vllm_server_timeout",
    "vllm_weight_sync",
}
QUANTIZED = {"bnb_4bit_quant_type", "load_in_4bit", "use_bnb_nested_quant"}
LORA = {"learning_rate", "lora_alpha", "lora_r", "lora_target_modules", "use_peft"}
DEVICES = {"gradient_accumulation_steps", "num_processes"}
# An expert on a server of its own, which is asked at few positions
REMOTE = {
    "branch_rule",
    "branch_share",
    "entropy_threshold_from",
    "expert_base_url",
    "expert_model_name_or_path",
}


def declared_differences() -> dict[str, tuple[str, set[str]]]:
    """Recipe: (the recipe it is a variant of, the keys that differ beside `output_dir`)."""
    paper = "{}/mentor/config_paper.yaml"
    differences = {
        "SmolLM2-135M-Instruct/grpo/config_gsm8k.yaml": (
            "SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml",
            GUIDANCE | {"expert_dtype", "log_rollout_records"},
        ),
        "quickstart/grpo.yaml": (
            "quickstart/mentor.yaml",
            GUIDANCE | {"entropy_threshold_from", "log_rollout_records"},
        ),
        "quickstart/mentor_paper.yaml": ("quickstart/mentor.yaml", {"correction_exponent"}),
        "Qwen2.5-3B/mentor/config_paper.yaml": (paper.format("Qwen2.5-7B"), {"model_name_or_path"}),
        "Llama-3.1-8B/mentor/config_paper.yaml": (
            paper.format("Qwen2.5-7B"),
            {"dataset_name", "expert_model_name_or_path", "model_name_or_path", "reward_weights"},
        ),
        "Qwen2.5-7B/dapo/config_paper.yaml": ("Qwen2.5-7B/grpo/config_paper.yaml", {"dynamic_sampling"}),
        "Qwen2.5-3B/grpo/config_12_rollouts.yaml": ("Qwen2.5-3B/grpo/config_paper.yaml", GROUP),
        "Qwen2.5-3B/mentor/config_random.yaml": (paper.format("Qwen2.5-3B"), {"branch_rule"}),
        "Qwen2.5-3B/mentor/config_no_decay.yaml": (paper.format("Qwen2.5-3B"), {"alpha_schedule"}),
        "Qwen2.5-3B/mentor/config_adaptive.yaml": (
            "Qwen2.5-3B/mentor/config_ours.yaml",
            {"alpha_schedule", "expert_decay_steps"},
        ),
        "SmolLM2-135M-Instruct/mentor/config_adaptive.yaml": (
            "SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml",
            {"alpha_schedule", "expert_decay_steps"},
        ),
        "Qwen2.5-3B/mentor/config_1gpu_colocate.yaml": (
            paper.format("Qwen2.5-3B"),
            LORA | DEVICES | {"accelerate_config", "vllm_gpu_memory_utilization"},
        ),
        "Qwen2.5-3B/mentor/config_2gpus_server.yaml": (
            paper.format("Qwen2.5-3B"),
            TO_SERVER | DEVICES | {"accelerate_config", "dtype", "per_device_train_batch_size"},
        ),
        "Qwen2.5-7B/mentor/config_8gpus_server.yaml": (paper.format("Qwen2.5-7B"), TO_SERVER | DEVICES),
        "SmolLM2-135M-Instruct/mentor/config_remote_expert.yaml": (
            "SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml",
            REMOTE - {"entropy_threshold_from"} | {"expert_dtype"},
        ),
        "Qwen2.5-3B/mentor/config_1gpu_remote_expert.yaml": (
            "Qwen2.5-3B/mentor/config_1gpu_colocate.yaml",
            REMOTE | {"draft_length", "vllm_gpu_memory_utilization"},
        ),
        "Qwen2.5-7B/mentor/config_1gpu_qlora.yaml": (
            "Qwen2.5-3B/mentor/config_1gpu_remote_expert.yaml",
            QUANTIZED | {"model_name_or_path", "vllm_importance_sampling_correction", "vllm_weight_sync"},
        ),
        "Qwen2.5-7B/mentor/config_8gpus_stock.yaml": (
            "Qwen2.5-7B/mentor/config_8gpus_server.yaml",
            REMOTE | {"vllm_server_base_url"},
        ),
        "Llama-3.1-8B/mentor/config_multinode_stock.yaml": (
            "Llama-3.1-8B/mentor/config_multinode_server.yaml",
            REMOTE | {"vllm_server_base_url"},
        ),
        "Llama-3.1-8B/mentor/config_multinode_server.yaml": (paper.format("Llama-3.1-8B"), TO_SERVER | DEVICES),
    }
    small, large = "SmolLM2-135M-Instruct/{}/config_gsm8k.yaml", "Qwen2.5-7B/{}/config_{}.yaml"
    expert = {"distillation", "expert_model_name_or_path"}
    for method, keys in {"opd": set(), "gats": {"gats_reference"}, "distilled_rl": {"distillation_clip"}}.items():
        differences[small.format(method)] = small.format("grpo"), expert | keys | {"expert_dtype"}
        differences[large.format(method, "ours")] = (
            large.format("grpo", "paper"),
            expert | keys | {"extend_stop_tokens", "vllm_gpu_memory_utilization"},
        )
    for model in MODELS:
        mentor, grpo = paper.format(model), f"{model}/grpo/config_paper.yaml"
        trajectories = set() if model == "Llama-3.1-8B" else {"dataset_name"}  # its prompts have them anyway
        differences |= {
            f"{model}/mentor/config_ours.yaml": (
                mentor,
                {"correction_exponent", "entropy_threshold_min", "guide_prompts"},
            ),
            f"{model}/mentor/config_reference_code.yaml": (mentor, GROUP | {"entropy_threshold_min"}),
            grpo: (mentor, GUIDANCE | {"draft_length", "extend_stop_tokens", "reward_range"}),
            f"{model}/luffy/config_paper.yaml": (
                grpo,
                trajectories | {"num_trajectory_generations", "trajectory_column", "trajectory_shaping"},
            ),
            f"{model}/questa/config_paper.yaml": (grpo, trajectories | {"hint_fraction", "vllm_max_model_length"}),
        }
    return differences


def name_of(recipe: Path) -> str:
    return str(recipe.relative_to(FOLDER))


def each(recipes: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", recipes, ids=[name_of(path) for path in recipes])


def read(recipe: Path) -> dict:
    return yaml.safe_load(recipe.read_text())


def header(recipe: Path) -> str:
    return recipe.read_text().split("\n\n")[0]


def commands(text: str) -> list[list[str]]:
    """Command lines that are indented in comments."""
    lines = re.sub(r"\\\n#?\s*", "", text).splitlines()
    words = [
        shlex.split(line.strip("# "), comments=True)
        for line in lines
        if re.match(r"^#   (\w+=[\w,]* )?(mentor-trl|vllm) ", line)
    ]
    words = [line[1:] if "=" in line[0] else line for line in words]
    return [line[1:] if line[0] == "mentor-trl" else line for line in words]


def parse(recipe: Path, *flags: str):
    _, script_args = make_parser().split_launch_args(["--config", str(recipe), *flags])
    # Every machine can read a recipe, also one without a GPU that could train it.
    script_args += ["--use_cpu", "--bf16", "false"]
    return make_parser().parse_args_and_config(script_args, fail_with_unknown_args=False)


@each(TRAINING_RECIPES)
def test_values_parse(recipe):
    args, training_args, model_args, _ = parse(recipe)
    config = read(recipe)
    assert training_args.num_mixed_generations == config["num_mixed_generations"]
    assert training_args.learning_rate == float(config["learning_rate"])
    assert model_args.model_name_or_path == config["model_name_or_path"]
    assert len(resolve_reward_funcs(args.reward_funcs)) == len(training_args.reward_weights)
    expert = training_args.expert_model_name_or_path or training_args.expert_base_url
    assert bool(expert) == (training_args.num_mixed_generations > 0 or training_args.distillation != "none")


@each(TRAINING_RECIPES + EXPERTS)
def test_header_holds_the_launch_command(recipe):
    assert all(line.startswith("#") for line in header(recipe).splitlines())
    command = "trl sft" if recipe in EXPERTS else "mentor-trl train"
    assert f"{command} --config {recipe.relative_to(ROOT)}" in header(recipe)


@each(TRAINING_RECIPES + EXPERTS)
def test_paths_in_the_header_exist(recipe):
    for path in re.findall(r"(?:docs|examples|recipes)/[\w./-]+\.(?:md|py|slurm|yaml)", recipe.read_text()):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\.\./[\w./-]+\.yaml", header(recipe)):
        assert (recipe.parent / path).is_file(), path
    for path in re.findall(r"\.\./\w+(?=[,. ])", header(recipe)):
        assert (recipe.parent / path).is_dir(), path


@each(TRAINING_RECIPES + EXPERTS)
def test_three_blocks_with_sorted_keys(recipe):
    text = recipe.read_text()
    positions = [text.index(block + "\n") for block in BLOCKS]
    assert positions == sorted(positions)
    for start, end in zip(positions, [*positions[1:], len(text)]):
        keys = list(yaml.safe_load(text[start:end]))
        assert keys == sorted(keys)


def test_recipes_differ_in_the_declared_keys_alone():
    differences = declared_differences()
    first = {"SmolLM2-135M-Instruct/mentor/config_gsm8k.yaml", "quickstart/mentor.yaml"}
    first |= {"Qwen2.5-7B/mentor/config_paper.yaml"}
    assert {name_of(path) for path in TRAINING_RECIPES} == set(differences) | first
    for name, (origin, keys) in differences.items():
        here, there = read(FOLDER / name), read(FOLDER / origin)
        differing = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
        assert differing == keys | {"output_dir"}, name


def test_small_recipes_record_their_mixed_rollouts():
    small = [*FOLDER.glob("quickstart/*.yaml"), *FOLDER.glob("SmolLM2-135M-Instruct/*/*.yaml")]
    small = [yaml.safe_load(path.read_text()) for path in small]
    mixing = [recipe for recipe in small if recipe.get("num_mixed_generations")]
    assert len(mixing) == 5
    for recipe in mixing:  # all rollouts of one prompt
        assert recipe["log_rollout_records"] == recipe["num_generations"]


def test_every_recipe_has_an_output_folder_of_its_own():
    folders = [read(path)["output_dir"] for path in TRAINING_RECIPES]
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["mentor", "grpo", "luffy", "questa"])
def test_values_of_the_paper(model, method):
    config = read(FOLDER / model / method / "config_paper.yaml")
    expected = PAPER | {"reward_weights": PAPER_REWARDS[model]}
    expected |= PAPER_GUIDANCE if method == "mentor" else {"num_mixed_generations": 0}
    assert {key: config[key] for key in expected} == expected


@each(LARGE)
def test_two_optimizer_steps_a_batch_of_128_prompts(recipe, monkeypatch):
    config = read(recipe)
    processes, rows = config["num_processes"], config["num_generations"]
    monkeypatch.setattr(MentorGRPOConfig, "world_size", property(lambda self: processes))
    _, args, _, _ = parse(recipe)
    assert args.generation_batch_size == 128 * rows
    assert args.per_device_train_batch_size * processes * args.gradient_accumulation_steps == 64 * rows
    assert args.steps_per_generation * args.num_iterations == 2 * args.gradient_accumulation_steps
    # Groups lie on one process, so that no process waits for the rows of another
    assert args.generation_batch_size // processes % rows == 0
    assert args.max_steps == 2 * 200 and args.expert_decay_steps <= args.max_steps // 2
    assert args.logging_steps == 2 and args.save_steps % 2 == 0


@each(LARGE)
def test_limits_of_the_engine(recipe):
    config = read(recipe)
    assert config["use_vllm"]
    if config["vllm_mode"] == "colocate":
        assert config["vllm_max_model_length"] >= 1024 + config["max_completion_length"]
        assert config.get("vllm_tensor_parallel_size", 1) == 1
        return
    served = [serving.make_parser().parse_known_args(c[1:]) for c in commands(header(recipe)) if c[0] == "serve"]
    for _, further in served:
        assert int(further[further.index("--max-model-len") + 1]) >= 1024 + config["max_completion_length"]
    assert {options.policy for options, _ in served} - {None} == {config["model_name_or_path"]}
    if "expert_base_url" in config:
        assert not any(options.policy and options.expert for options, _ in served)
    else:
        assert [options.expert for options, _ in served] == [config["expert_model_name_or_path"]]
    assert config["ddp_timeout"] > max(config["vllm_read_timeout"], config["vllm_server_timeout"])


@each(LARGE)
def test_launch_options_are_those_of_accelerate(recipe):
    launch_args, _ = make_parser().split_launch_args(["--config", str(recipe)])
    launch_args = resolve_accelerate_config_argument(launch_args)
    assert Path(launch_args[launch_args.index("--config_file") + 1]).is_file()
    assert launch_args[launch_args.index("--num_processes") + 1] == str(read(recipe)["num_processes"])


def check_command(words: list[str]) -> None:
    """Parse a command line; that of vLLM is parsed by vLLM, which need not be installed."""
    command, *rest = words
    if command == "data":
        kind, *rest = rest
        data.make_parser(kind).parse_args_and_config(rest)
    elif command == "train":
        _, script_args = make_parser().split_launch_args(rest)
        make_parser().parse_args_and_config(
            [*script_args, "--use_cpu", "--bf16", "false"], fail_with_unknown_args=False
        )
    elif command == "serve":
        options, _ = serving.make_parser().parse_known_args(rest)
        assert options.policy or options.expert
    else:
        assert command == "vllm" and rest[0] == "serve" and not rest[1].startswith("-")
        given = dict(zip(rest, rest[1:]))
        assert given["--logprobs-mode"] == "processed_logprobs" and given["--generation-config"] == "vllm"


@each(LARGE + SMALL)
def test_commands_of_the_header_parse(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(header(recipe))
    assert found
    for words in found:
        check_command(words)


def anchors(page: Path) -> set[str]:
    text = page.read_text()
    named = re.findall(r'<a id="([^"]+)"></a>', text)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {*named, *(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src|srcset)="([^"]+)"', text):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_recipes_are_in_the_table():
    text = (ROOT / "docs" / "recipes.md").read_text()
    for recipe in [*LARGE, *SMALL, *EXPERTS]:
        assert f"](../{recipe.relative_to(ROOT)})" in text, recipe
    for path in re.findall(r"\]\(\.\./([^)]+)\)", text):
        assert (ROOT / path).exists(), path


@each(EXPERTS)
def test_recipe_of_an_expert_is_one_of_trl(recipe):
    flags = ["--config", str(recipe), "--use_cpu", "--bf16", "false"]
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script_args, args, model_args = parser.parse_args_and_config(flags, fail_with_unknown_args=True)
    known = set(vars(script_args)) | set(vars(args)) | set(vars(model_args))
    assert set(read(recipe)) <= known
    guided = [read(path) for path in recipe.parent.parent.glob("mentor/*.yaml")]
    named = [c["expert_model_name_or_path"] for c in guided if "expert_base_url" not in c]
    assert set(named) == {args.output_dir}


@each(EXPERTS)
def test_one_step_of_an_expert(recipe, tmp_path, tiny_model_dir):
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "1", "--max_length", "128"]
    flags += ["--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--save_strategy", "no"]
    _, args, _ = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(flags)
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "<think>1 and 1</think>2"}]
    rows = Dataset.from_list([{"messages": turns, "problem": "1+1=", "generations": ["2"]}] * 8)
    trainer = SFTTrainer(model=str(tiny_model_dir), args=args, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 1 and args.get_warmup_steps(100) == 10
    assert len(trainer.train_dataset) < 8  # packed


# One rollout batch of each, with tiny models


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    reply = "<think>1 and 1</think>\\boxed{2}"
    row = {"prompt": "1+1=", "question": "1+1=", "solution": "2", "answer": "#### 2", "trajectory": reply}
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    return path


def small(config: dict, tmp_path: Path, rows: Path, model: Path, expert: Path) -> list[str]:
    """Flags that leave a recipe its algorithm and take its size."""
    count = config["num_generations"]
    remote = "expert_base_url" in config
    served = config.get("vllm_mode") == "server" and not remote
    flags = {
        "model_name_or_path": model,
        "dataset_name": rows,
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": count,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "dtype": "float32",
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_vllm": str(served).lower(),
    }
    if "generation_batch_size" in config:
        flags["generation_batch_size"] = 2 * count
    if "exact_answer_reward" in config["reward_funcs"][0]:
        flags["conversational"] = "false"  # the quickstart's models have no chat template
    if remote:
        flags |= {"expert_base_url": expert, "vllm_weight_sync": "auto"}
    elif config["num_mixed_generations"] or "distillation" in config:
        flags["expert_model_name_or_path"] = "hub/tiny-expert" if served else expert
    if config.get("load_in_4bit"):
        flags["load_in_4bit"] = "false"  # bitsandbytes needs a GPU
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


@contextmanager
def serving_expert():
    """The address of a stand-in for two stock servers of an expert."""
    stock = StockServer(make_tiny_model(seed=1), make_tiny_tokenizer(), stops=(2,), positions=2048)
    with answering(stock) as first, answering(stock) as second:
        yield f"{first},{second}"


@each(TRAINING_RECIPES)
def test_one_rollout_batch(recipe, tmp_path, monkeypatch, rows_file, tiny_model_dir, tiny_expert_dir):
    config, trainers = read(recipe), []
    make_trainer = train._make_trainer
    monkeypatch.setattr(train, "_make_trainer", lambda *args: trainers.append(make_trainer(*args)) or trainers[-1])
    monkeypatch.chdir(ROOT)
    remote = "expert_base_url" in config
    with (
        stand_in() if config.get("vllm_mode") == "server" and not remote else nullcontext() as servers,
        serving_expert() if remote else nullcontext(tiny_expert_dir) as expert,
    ):
        train.main(*parse(recipe, *small(config, tmp_path, rows_file, tiny_model_dir, expert)))
    (trainer,) = trainers
    assert trainer.state.global_step == 2
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    mixed = config["num_mixed_generations"]
    assert first.get("mentor/alpha") == (config["alpha"] if mixed else None)
    assert ("mentor/mixed/reward" in first) == bool(mixed)
    assert ("mentor/trajectory/reward" in first) == ("num_trajectory_generations" in config)
    assert ("mentor/resampling/rounds" in first) == ("dynamic_sampling" in config)
    assert ("mentor/distillation/expert_tokens" in first) == ("distillation" in config)
    assert ("hint" in trainer.train_dataset.column_names) == ("hint_fraction" in config)
    if servers:
        # On-policy rows and mixed rows, of one rollout batch
        assert len(servers[0].requests) == 2
        count = config["num_generations"]
        assert [len(r.prompt_ids) for r in servers[0].requests] == [2 * (count - mixed), 2 * mixed]
    saved = "adapter_model.safetensors" if config.get("use_peft") else "model.safetensors"
    assert (tmp_path / "out" / saved).is_file()


# The Slurm script, with stand-ins for the commands of a cluster

STAND_INS = {
    "scontrol": 'printf "%s\\n" $SLURM_JOB_NODELIST',
    "srun": 'while [[ $1 == --* ]]; do echo "srun $1" >>"$LOG"; shift; done\nexport SLURM_PROCID=0\nexec "$@"',
    "ray": 'echo "ray $*" >>"$LOG"',
    "mentor-trl": 'echo "mentor-trl $*" >>"$LOG"; echo "key $MENTOR_TRL_API_KEY" >>"$LOG"\ncase $1 in\n'
    'serve) [[ -n ${BROKEN:-} ]] && exit 3; touch "$LOG.up"; exec sleep 30;;\nhealth) [[ -e $LOG.up ]];;\nesac',
    "sleep": 'exec /bin/sleep "$([[ $1 == 30 ]] && echo 30 || echo 0.05)"',
}


def run_slurm(tmp_path: Path, nodes: str, *flags: str, script: Path = SLURM, **environment: str):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": nodes,
        "LOG": str(log),
        **environment,
    }
    result = subprocess.run(["bash", str(script), *flags], env=environment, cwd=ROOT, capture_output=True, text=True)
    return result, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("script", [SLURM, STOCK_SLURM], ids=lambda path: path.stem)
def test_slurm_script_is_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_slurm_script_serves_on_one_node_and_trains_on_the_others(tmp_path):
    result, log = run_slurm(tmp_path, "a b c", "--max_steps", "4")
    assert result.returncode == 0, result.stderr
    (serve,) = [line for line in log if line.startswith("mentor-trl serve")]
    options, further = serving.make_parser().parse_known_args(shlex.split(serve)[2:])
    assert (options.tensor_parallel_size, options.host, options.port) == (8, "0.0.0.0", 8000)
    assert options.allowed_host == ["a"] and "--distributed-executor-backend" not in further
    assert len({line for line in log if line.startswith("key ") and len(line) == 4 + 64}) == 1
    (line,) = [line for line in log if line.startswith("mentor-trl train")]
    launch_args, script_args = make_parser().split_launch_args(shlex.split(line)[2:])
    given = dict(zip(launch_args[::2], launch_args[1::2]))
    assert given["--num_machines"] == "2" and given["--machine_rank"] == "0"
    assert given["--main_process_ip"] == "b"
    recipe = ROOT / script_args[script_args.index("--config") + 1]
    _, args, _, _ = parse(recipe, *script_args[2:])
    assert args.vllm_server_base_url == "http://a:8000" and args.max_steps == 4
    assert args.gradient_accumulation_steps == read(recipe)["gradient_accumulation_steps"]
    assert launch_args[-len(given) :].count("--num_processes") <= 1 and given["--num_processes"] == "16"
    assert options.policy == read(recipe)["model_name_or_path"]
    assert options.expert == read(recipe)["expert_model_name_or_path"]
    assert {"srun --nodelist=a", "srun --nodelist=b,c"} <= set(log)


def test_slurm_script_serves_on_two_nodes_with_ray(tmp_path):
    result, log = run_slurm(tmp_path, "a b c d", SERVE_NODES="2")
    assert result.returncode == 0, result.stderr
    (serve,) = [line for line in log if line.startswith("mentor-trl serve")]
    assert "--tensor-parallel-size 16" in serve and "--distributed-executor-backend ray" in serve
    assert "ray start --head --port 6379" in log
    assert {"srun --nodelist=a,b", "srun --nodelist=c,d"} <= set(log)


def test_slurm_script_serves_replicas_of_both_models(tmp_path):
    result, log = run_slurm(tmp_path, "a b c d e", "--max_steps", "4", script=STOCK_SLURM, POLICY_NODES="2")
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line)[2:] for line in log if line.startswith("mentor-trl serve")]
    served = [serving.make_parser().parse_known_args(line)[0] for line in lines]
    assert {options.tensor_parallel_size for options in served} == {4}
    where = lambda name: sorted((o.allowed_host[0], o.port) for o in served if getattr(o, name))
    assert where("policy") == [("a", 8000), ("a", 8004), ("b", 8000), ("b", 8004)]
    assert where("expert") == [("c", 8000), ("c", 8004)]
    (line,) = [line for line in log if line.startswith("mentor-trl train")]
    launch_args, script_args = make_parser().split_launch_args(shlex.split(line)[2:])
    assert dict(zip(launch_args[::2], launch_args[1::2]))["--num_machines"] == "2"
    recipe = ROOT / script_args[script_args.index("--config") + 1]
    _, args, _, _ = parse(recipe, *script_args[2:])
    assert args.vllm_server_base_url == "http://a:8000,http://a:8004,http://b:8000,http://b:8004"
    assert args.expert_base_url == "http://c:8000,http://c:8004" and args.max_steps == 4
    assert args.gradient_accumulation_steps == read(recipe)["gradient_accumulation_steps"]
    assert {options.policy for options in served} - {None} == {read(recipe)["model_name_or_path"]}


@pytest.mark.parametrize(
    ("script", "nodes", "environment", "code", "part"),
    [
        (SLURM, "a", {}, 2, "No node is left to train on"),
        (SLURM, "a b c d", {}, 2, "ROWS_PER_STEP=512 is no multiple of ROWS_PER_GPU=2 x 24 GPUs"),
        (SLURM, "a b", {"BROKEN": "1"}, 1, "The server at http://a:8000 did not come up"),
        (STOCK_SLURM, "a b", {}, 2, "No node is left to train on: 2 nodes, of which 2 serve"),
        (STOCK_SLURM, "a b c d e", {}, 2, "ROWS_PER_STEP=512 is no multiple of ROWS_PER_GPU=2 x 24 GPUs"),
        (STOCK_SLURM, "a b c", {"BROKEN": "1"}, 1, "The server at http://a:8000, or another one, did not come up"),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_slurm_script_says_what_is_wrong(tmp_path, script, nodes, environment, code, part):
    result, log = run_slurm(tmp_path, nodes, script=script, **environment)
    assert result.returncode == code and part in result.stderr
    assert not any(line.startswith("mentor-trl train") for line in log)
