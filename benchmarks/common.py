"""What the benchmarks share: random models, servers for them, processes that take turns, the name of the machine."""

import math
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


PAD, EOS, STARTS, PADDING = 0, 1, range(2, 18), 8  # ids of `long_tailed`; its vocabulary ends in padding


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


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words; the share of them that end a sentence is about that of a text's tokens."""
    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}" + "." * (i % 25 == 24): i for i in range(2, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def long_tailed(model: LlamaForCausalLM, mean: float, long: float, spread: float = 2.0) -> None:
    """
    Weights by which most completions end after `mean` tokens on average, and a share `long` of them never does.

    The layers cost what they cost and add nothing, so that a token follows from the one before. The first dimension
    says whether a row is long (1) or short (-1), which a prompt's last token (one of `STARTS`) leaves open; the second
    is 1.
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.norm.weight.data.fill_(1.0)
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    vocab, hidden = head.shape
    generator = torch.Generator().manual_seed(2)
    ids = torch.arange(vocab)
    lasting, leaving = 6.0, 10.0
    signs = torch.randint(0, 2, (vocab, hidden), generator=generator) * 2.0 - 1.0
    signs[:, 0], signs[:, 1] = (ids % 2) * 2.0 - 1.0, 1.0
    signs[STARTS, 0] = math.log(long / (1.0 - long)) / (2.0 * lasting)
    weights = torch.randn(vocab, hidden, generator=generator) * spread / hidden**0.5
    weights[:, 0], weights[:, 1] = lasting * signs[:, 0], 0.0
    never = [PAD, EOS, *STARTS, *range(vocab - PADDING, vocab)]
    weights[never] = 0.0
    weights[never, 1] = -30.0
    weights[EOS, 0] = -leaving
    weights[EOS, 1] = math.log(vocab / 2 / mean) + lasting + spread**2 / 2 - leaving
    embedding.copy_(signs)
    head.copy_(weights)
    model.config.eos_token_id = model.generation_config.eos_token_id = EOS
    model.config.pad_token_id = model.generation_config.pad_token_id = PAD


def save_long_tailed(root: str, noise: float, mean: float, long: float, **shape) -> dict[str, str]:
    """Folders of a policy and of its expert with [`long_tailed`] completions, and their tokenizer."""
    folders = {name: os.path.join(root, name) for name in ("policy", "expert")}
    model, tokenizer = random_policy(**shape), word_tokenizer(shape["vocab"] - PADDING)
    long_tailed(model, mean, long)
    for name, folder in folders.items():
        if name == "expert":
            add_noise(model, noise)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def random_prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Ids of prompts that leave open how long a completion will be."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(STARTS.stop, vocab - PADDING, (count, length), generator=generator)
    ids[:, -1] = torch.randint(STARTS.start, STARTS.stop, (count,), generator=generator)
    return ids.tolist()


def markdown_table(headings: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are no numbers."""
    rules = ["---" if at < texts else "---:" for at in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows))


def device_name(cuda: bool) -> str:
    if cuda:
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


class Server(NamedTuple):
    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of its processes so far."""
        parent = psutil.Process(self.pid)
        times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
        return sum(each.user + each.system for each in times)


@contextmanager
def server(log: Path, *arguments: str, seconds: float = 600.0) -> Iterator[Server]:
    """A `mentor-trl serve` of one's own, which has ended with all that it started when this is left."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "mentor_trl.cli", "serve", "--port", str(port), *arguments]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log, seconds)
        yield Server(url, process.pid)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


@contextmanager
def serving(policy: str, expert: str, log: Path, *options: str, seconds: float = 600.0) -> Iterator[str]:
    """URL of a [`server`] of both models."""
    with server(log, "--policy", policy, "--expert", expert, *options, seconds=seconds) as found:
        yield found.url


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


class Worker:
    """A process that says when it is ready, and then answers one question at a time."""

    def __init__(self, name: str, target: Callable, *arguments):
        spawn = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=target, args=(*arguments, theirs))
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(f"{self.name} ended with exit code {self.process.exitcode}") from None

    def ask(self, question: Any) -> Any:
        self.connection.send(question)
        return self.receive()


@contextmanager
def working(name: str, target: Callable, *arguments) -> Iterator[Worker]:
    """A worker that is ready: `target(*arguments, connection)`. Its process ends with this context."""
    worker = Worker(name, target, *arguments)
    try:
        worker.receive()
        yield worker
        worker.process.join(timeout=30.0)
    finally:
        worker.process.kill()
        worker.process.join()
