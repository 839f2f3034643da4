"""The recipes with an expert on a server, each for a step: tiny models, real servers of the policy, one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fake_server import serving
from helpers import make_tiny_tokenizer
from stock_server import StockServer
from trainer_helpers import tiny


pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# What asks for devices, or for more than a step
DROPPED = ("accelerate_config", "num_processes", "dataset_config", "load_in_4bit", "bnb_4bit_quant_type")
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "max_steps": 1,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "generation_batch_size": 8,
    "max_completion_length": 8,
    "vllm_max_model_length": 64,
    "vllm_gpu_memory_utilization": 0.05,
    "vllm_enable_sleep_mode": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "branch_share": 0.5,
    "system_prompt": None,
}
RECIPES = [
    "SmolLM2-135M-Instruct/mentor/config_remote_expert.yaml",
    "Qwen2.5-3B/mentor/config_1gpu_remote_expert.yaml",
    "Qwen2.5-7B/mentor/config_1gpu_qlora.yaml",
    "Qwen2.5-7B/mentor/config_8gpus_stock.yaml",
    "Llama-3.1-8B/mentor/config_multinode_stock.yaml",
]


@pytest.fixture(scope="module")
def expert():
    with serving(StockServer(tiny(1), make_tiny_tokenizer(), stops=(2,))) as url:
        yield url


@pytest.fixture
def dataset(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = lambda i: {"question": f"{i}+1?", "answer": f"so #### {i + 1}", "prompt": f"{i}+1?", "solution": f"{i + 1}"}
    rows = [row(i) for i in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_every_recipe_with_an_expert_on_a_server_is_here():
    found = [path for path in (ROOT / "recipes").rglob("*.yaml") if "expert_base_url" in path.read_text()]
    assert sorted(str(path.relative_to(ROOT / "recipes")) for path in found) == sorted(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step(recipe, folders, servers, expert, dataset, tmp_path):
    config = yaml.safe_load((ROOT / "recipes" / recipe).read_text())
    served = config.get("vllm_mode") == "server"
    places = {
        "model_name_or_path": folders[0],
        "dataset_name": dataset,
        "output_dir": str(tmp_path / "out"),
        "expert_base_url": servers[2].url if served else expert,
    }
    if served:
        places["vllm_server_base_url"] = f"{servers[0].url},{servers[1].url}"
    config = {name: value for name, value in config.items() if name not in DROPPED} | SMALL | places
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in config.items() if value is not None}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "mentor_trl" / "cli" / "train.py"), "--config", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert '"mentor/branch_rate"' in (tmp_path / "out" / "log.jsonl").read_text()
    assert (tmp_path / "out" / "recipe.yaml").exists()
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    assert adapter.exists() == bool(config.get("use_peft"))
