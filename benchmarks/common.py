"""What the benchmarks share: models of random weights, a server for them, and the name of the machine."""

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_policy(hidden: int, layers: int, vocab: int, dtype: str, device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        num_key_value_heads=max(hidden // 128, 1),
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(device, getattr(torch, dtype)).eval()
    # Entropies of about two nats instead of the log of the vocabulary
    model.model.norm.weight.data *= 10.0
    return model


def add_noise(model: LlamaForCausalLM, noise: float) -> None:
    """Noise on the LM head, in its own deviations: the more of it, the less an expert agrees with the policy."""
    weight = model.lm_head.weight.data
    generator = torch.Generator(weight.device).manual_seed(1)
    weight += noise * weight.std() * torch.randn(weight.shape, generator=generator, device=weight.device).to(weight)


def save_models(root: str, noise: float, **shape) -> dict[str, str]:
    """Folders of a random policy and of its expert, the policy with noise."""
    folders = {name: os.path.join(root, name) for name in ("policy", "expert")}
    model = random_policy(**shape)
    model.save_pretrained(folders["policy"])
    add_noise(model, noise)
    model.save_pretrained(folders["expert"])
    return folders


def device_name(cuda: bool) -> str:
    if cuda:
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


@contextmanager
def serving(policy: str, expert: str, log: Path, *options: str, seconds: float = 600.0) -> Iterator[str]:
    """URL of a `mentor-trl serve` of one's own, which has ended with all that it started when this is left."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "mentor_trl.cli", "serve", "--policy", policy, "--expert", expert]
    command += ["--port", str(port), *options]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log, seconds)
        yield url
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"The server did not come up. The end of its log:\n{log.read_text(errors='replace')[-4000:]}")
