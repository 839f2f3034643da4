"""`mentor-trl serve` and `mentor-trl health`."""

import argparse
import json
import os
import secrets
import shlex
import socket
import stat
import sys
from functools import partial
from pathlib import Path

import httpx

from ..errors import EngineError, SetupError
from ..vllm_plugin.shared_options import engine_options
from ..vllm_server.guard import HOSTS, ORIGINS, ExpertGuard, MixedGuard, PolicyGuard
from ..vllm_server.keys import KEY, KEY_FILE, checked_key, default_key_file, key_of, read_key, store_key
from ..vllm_server.options import device_environment, engine_environment, expert_engine_options, policy_engine_options


LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What the servers need to be, which a passed option would change
COMMON = ("--model", "--generation-config", "--grpc")
OURS = {
    "mixed": (
        *(*COMMON, "--speculative-config", "--additional-config", "--worker-extension-cls", "--logits-processors"),
        *("--async-scheduling", "--no-async-scheduling"),
    ),
    "policy": (*COMMON, "--logprobs-mode", "--speculative-config", "--worker-extension-cls", "--logits-processors"),
    "expert": (*COMMON, "--logprobs-mode"),
}
GUARDS = {"mixed": MixedGuard, "policy": PolicyGuard, "expert": ExpertGuard}


def make_parser() -> argparse.ArgumentParser:
    """Parser of `mentor-trl serve`; what it does not know goes to vLLM."""
    parser = argparse.ArgumentParser(
        prog="mentor-trl serve",
        description="Serve mixed rollouts with vLLM: a policy that is trained, its expert, or both in one engine.",
        epilog="All further options are vLLM's (`vllm serve --help`), such as --max-model-len, --dtype, "
        "--gpu-memory-utilization or --distributed-executor-backend ray.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--policy",
        help="model id or folder of the policy, whose weights a trainer replaces; alone, its requests end at the "
        "branch points of mixed rollouts, where an expert on another server speaks",
    )
    parser.add_argument("--expert", help="model id or folder of the expert, of the same tokens")
    parser.add_argument(
        "--draft-length", type=int, default=8, help="of both in one: tokens drafted between passes of the expert (8)"
    )
    parser.add_argument(
        "--num-tokens", type=int, help="of both in one: ids that may be sampled (default: those of the tokenizer)"
    )
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="devices that share each model (1)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument("--api-key", metavar="KEY", help=f"key of the server (default: ${KEY}, or a new one)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the key of the server")
    parser.add_argument(
        "--allowed-origins", type=origins, default=[], metavar="JSON", help="web origins that may ask, a list ([])"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that requests may call this server, beside addresses, localhost, and this machine's name",
    )
    parser.add_argument("--check", metavar="URL", help="say what the server at URL is, and exit")
    parser.add_argument("--dry-run", action="store_true", help="print the equivalent `vllm serve` line, and exit")
    return parser


def serve(args: list[str]) -> int:
    """Run `mentor-trl serve`. Returns an exit code; where it serves, the process becomes vLLM's."""
    parser = make_parser()
    options, passed = parser.parse_known_args(args)
    if options.check:
        return health([options.check, *(["--api-key-file", options.api_key_file] if options.api_key_file else [])])
    if not options.policy and not options.expert:
        parser.error("--policy is required, or --expert, or both")
    kind = "mixed" if options.policy and options.expert else "policy" if options.policy else "expert"
    given = {option.split("=")[0].replace("_", "-") for option in passed}
    taken = sorted(given & set(OURS[kind]))
    if taken:
        parser.error(f"{', '.join(taken)} is set by `mentor-trl serve` itself: leave it out")
    adapters = kind == "policy" and "--enable-lora" in given
    if adapters and "--api-server-count" in given:
        parser.error("an adapter is known to the one API process that loads it: leave --api-server-count out")
    import torch

    cpu = not torch.cuda.is_available()
    try:
        command = vllm_arguments(kind, options, cpu, "--trust-remote-code" in passed) + passed
        if not options.dry_run:
            check_port(options.host, options.port)
        key_file = place_key(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if kind != "expert" and not cpu and "--weight-transfer-config" not in given:
        command += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    if adapters:
        command += ["--api-server-count", "1"]
    # The outermost guard is the one that is named last
    command += ["--allowed-origins", json.dumps(options.allowed_origins)]
    command += ["--middleware", f"{GUARDS[kind].__module__}.{GUARDS[kind].__name__}"]
    environment = {
        **server_environment(kind, cpu, adapters),
        KEY_FILE: str(key_file),
        HOSTS: json.dumps([name.lower() for name in (options.host, *options.allowed_host)]),
        ORIGINS: json.dumps(options.allowed_origins),
    }
    announce(kind, options, command, environment)
    if options.dry_run:
        return 0
    os.umask(os.umask(0o022) | 0o022)  # nobody else may write to the sockets by which its processes talk
    inherited = {name: value for name, value in os.environ.items() if name not in ("VLLM_API_KEY", KEY)}
    os.execve(
        sys.executable,
        [sys.executable, "-m", "mentor_trl.cli.vllm_command", *command],
        {**inherited, **environment},
    )


def server_environment(kind: str, cpu: bool, adapters: bool) -> dict[str, str]:
    """Environment variables of vLLM's processes."""
    environment = device_environment(cpu) if kind == "expert" else engine_environment(cpu)
    environment["VLLM_USE_RUST_FRONTEND"] = "0"  # it knows no middleware
    if kind != "expert":
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    if adapters:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return environment


def announce(kind: str, options: argparse.Namespace, command: list[str], environment: dict[str, str]) -> None:
    """Print the equivalent `vllm serve` line, where the key is, and what to be careful of."""
    prefix = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    print(f"{prefix} vllm serve {shlex.join(command)}", flush=True)
    option = "expert_api_key_file" if kind == "expert" else "vllm_server_api_key_file"
    print(
        f"The server's key is in {environment[KEY_FILE]}. Clients on this machine find it there, others take it from "
        f"`{option}` or {KEY}.",
        file=sys.stderr,
    )
    if options.host not in LOOPBACK:
        power = "use it" if kind == "expert" else "replace the weights"
        print(
            f"Warning: the server listens on {options.host}. Whoever reads its traffic has its key, and with it can "
            f"{power}. Keep it inside a network you trust, or pass --ssl-keyfile and --ssl-certfile.",
            file=sys.stderr,
        )


def origins(value: str) -> list[str]:
    """The value of --allowed-origins, which is vLLM's."""
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(origin, str) for origin in found):
        raise argparse.ArgumentTypeError(f"{value!r} is no JSON list of origins, as '[\"https://mine.example\"]'")
    return found


def check_port(host: str, port: int) -> None:
    """Raise [`SetupError`] if nobody can listen there: vLLM would find out after the running server's key is gone."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise SetupError(
            f"nothing can listen on {host}:{port} ({error}): stop what does, or choose another --port"
        ) from error


def place_key(options: argparse.Namespace) -> Path:
    """
    File with the key of a server that is about to start; a dry run writes none. A [`SetupError`] if there is no key in
    a file that is given, or if a key cannot be kept.
    """
    if options.api_key_file is not None:
        if options.api_key is not None:
            raise SetupError("give --api-key or --api-key-file, not both")
        file = Path(options.api_key_file).expanduser().absolute()
        read_key(file)
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            print(f"Warning: other users can open the key in {file}; `chmod 600` it.", file=sys.stderr)
        return file
    key = options.api_key or os.environ.get(KEY) or secrets.token_urlsafe(32)
    checked_key(key, "--api-key" if options.api_key else KEY)
    return default_key_file(options.port) if options.dry_run else store_key(key, options.port)


def vllm_arguments(kind: str, options: argparse.Namespace, cpu: bool, trust_remote_code: bool) -> list[str]:
    """Arguments of `vllm serve` for a server of a kind: `"mixed"`, `"policy"` or `"expert"`."""
    policy, expert, devices = options.policy, options.expert, options.tensor_parallel_size
    if kind == "mixed":
        num_tokens = options.num_tokens or shared_vocabulary(policy, expert, trust_remote_code)
        named = engine_options(policy, expert, num_tokens, options.draft_length, devices) | {"tokenizer": policy}
    elif kind == "policy":
        named = policy_engine_options(policy, devices, cpu)
    else:
        named = expert_engine_options(expert, devices, cpu)
    named |= {"served_model_name": policy or expert, "host": options.host, "port": options.port}
    words = [named.pop("model")]
    for name, value in named.items():
        option = name.replace("_", "-")
        if value is False:
            words += [f"--no-{option}"]
        elif isinstance(value, list):
            words += [f"--{option}", *value]
        else:
            words += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
    return words


def shared_vocabulary(policy: str, expert: str, trust_remote_code: bool) -> int:
    """Number of token ids of a policy and its expert; a [`SetupError`] if their tokenizers differ."""
    from transformers import AutoTokenizer

    from ..experts.compatibility import check_tokenizers

    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    return check_tokenizers(load(policy), load(expert))


def health(args: list[str]) -> int:
    """Run `mentor-trl health URL`. Returns 0 if a server of ours or a stock vLLM server answers there."""
    parser = argparse.ArgumentParser(prog="mentor-trl health", description="Say what the server at a URL is.")
    parser.add_argument("url", help="address of the server, as http://127.0.0.1:8000")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for an answer (30)")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with the server's key, where it is not found")
    options = parser.parse_args(args)

    from ..connection.client import Client, Patience
    from ..connection.failures import WrongServer
    from ..rollout.serving.policy_server import PolicyServer

    patience = Patience(connect=options.timeout, read=options.timeout, attempts=1, recovery=0.0)
    try:
        try:
            info = PolicyServer(options.url, patience=patience, api_key_file=options.api_key_file).info
        except WrongServer:
            key = partial(key_of, options.url, options.api_key_file)
            info = stock_info(Client(options.url, patience, key))
            if info is None:
                raise
    except (EngineError, SetupError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(info, indent=2))
    return 0


def stock_info(client) -> dict | None:
    """What a vLLM server that is none of ours is, as one of an expert; `None` if it is no vLLM server either."""
    try:
        models = client.run(client.ask("/v1/models", "GET"))["data"]
        version = client.run(client.ask("/version", "GET"))["version"]
        served = [{name: model.get(name) for name in ("id", "root", "max_model_len")} for model in models]
    except (EngineError, httpx.TransportError, KeyError, TypeError, AttributeError):
        return None
    return {"kind": "stock", "vllm": version, "models": served}
