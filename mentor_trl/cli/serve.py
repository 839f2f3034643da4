"""`mentor-trl serve` and `mentor-trl health`."""

import argparse
import json
import os
import shlex
import sys

from ..vllm_plugin.options import WORKER_EXTENSION, engine_environment, engine_options


LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What the engine needs to be, which a passed option would change
OURS = (
    "--model",
    "--speculative-config",
    "--additional-config",
    "--worker-extension-cls",
    "--generation-config",
    "--async-scheduling",
    "--no-async-scheduling",
)


def make_parser() -> argparse.ArgumentParser:
    """Parser of `mentor-trl serve`; what it does not know goes to vLLM."""
    parser = argparse.ArgumentParser(
        prog="mentor-trl serve",
        description="Serve mixed rollouts: one vLLM server that speaks for a policy and its expert.",
        epilog="All further options are vLLM's (`vllm serve --help`), such as --max-model-len, --dtype, "
        "--gpu-memory-utilization or --distributed-executor-backend ray.",
        allow_abbrev=False,
    )
    parser.add_argument("--policy", help="model id or folder of the policy, whose weights a trainer replaces")
    parser.add_argument(
        "--expert",
        help="model id or folder of the expert, of the same tokens as the policy; without it the server speaks for "
        "the policy alone",
    )
    parser.add_argument(
        "--draft-length", type=int, default=8, help="tokens drafted between two passes of the expert (8)"
    )
    parser.add_argument(
        "--num-tokens", type=int, help="token ids that may be sampled (default: those of the tokenizer)"
    )
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="devices that share each model (1)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument("--check", metavar="URL", help="say what the server at URL is, and exit")
    parser.add_argument("--dry-run", action="store_true", help="print the equivalent `vllm serve` line, and exit")
    return parser


def serve(args: list[str]) -> int:
    """Run `mentor-trl serve`. Returns an exit code; where it serves, the process becomes vLLM's."""
    parser = make_parser()
    options, passed = parser.parse_known_args(args)
    if options.check:
        return health([options.check])
    if not options.policy:
        parser.error("--policy is required")
    given = {option.split("=")[0] for option in passed}
    taken = sorted(given & set(OURS))
    if taken:
        parser.error(f"{', '.join(taken)} is set by `mentor-trl serve` itself: leave it out")
    num_tokens = options.num_tokens
    if options.expert:
        try:
            num_tokens = num_tokens or shared_vocabulary(
                options.policy, options.expert, "--trust-remote-code" in passed
            )
        except (OSError, ValueError) as error:
            parser.error(str(error))
    import torch

    command = vllm_arguments(options, num_tokens) + passed
    if torch.cuda.is_available() and "--weight-transfer-config" not in given:
        command += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    environment = {**engine_environment(cpu=not torch.cuda.is_available()), "VLLM_SERVER_DEV_MODE": "1"}
    prefix = " ".join(f"{name}={value}" for name, value in environment.items())
    print(f"{prefix} vllm serve {shlex.join(command)}", flush=True)
    if options.host not in LOOPBACK:
        print(
            f"Warning: the server listens on {options.host} with vLLM's development endpoints, which let anybody who "
            "reaches the port replace the weights. Keep it inside a network you trust.",
            file=sys.stderr,
        )
    if options.dry_run:
        return 0
    os.execve(
        sys.executable,
        [sys.executable, "-m", "mentor_trl.cli.vllm_command", *command],
        {**os.environ, **environment},
    )


def vllm_arguments(options: argparse.Namespace, num_tokens: int | None) -> list[str]:
    """Arguments of `vllm serve` for a mixed-policy server, or, without an expert, one of the policy alone."""
    common = [
        *("--served-model-name", options.policy),
        *("--tokenizer", options.policy),
        *("--host", options.host),
        *("--port", str(options.port)),
        *("--tensor-parallel-size", str(options.tensor_parallel_size)),
        *("--worker-extension-cls", WORKER_EXTENSION),
        *("--generation-config", "vllm"),
    ]
    if not options.expert:
        return [options.policy, *common, "--logprobs-mode", "processed_logprobs"]
    engine = engine_options(
        options.policy, options.expert, num_tokens, options.draft_length, options.tensor_parallel_size
    )
    return [
        engine["model"],
        *common,
        *("--speculative-config", json.dumps(engine["speculative_config"])),
        *("--additional-config", json.dumps(engine["additional_config"])),
        "--no-async-scheduling",
    ]


def shared_vocabulary(policy: str, expert: str, trust_remote_code: bool = False) -> int:
    """
    Number of token ids of a policy and its expert.

    Args:
        policy, expert (`str`):
            Model ids or folders.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that the repositories ship.

    Raises:
        [`SetupError`]: if their tokenizers differ.
    """
    from transformers import AutoTokenizer

    from ..experts.compatibility import check_tokenizers

    names = (policy, expert)
    return check_tokenizers(*(AutoTokenizer.from_pretrained(n, trust_remote_code=trust_remote_code) for n in names))


def health(args: list[str]) -> int:
    """Run `mentor-trl health URL`. Returns 0 if a MENTOR server answers there."""
    parser = argparse.ArgumentParser(prog="mentor-trl health", description="Say what the server at a URL is.")
    parser.add_argument("url", help="address of the server, as http://127.0.0.1:8000")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for an answer (30)")
    options = parser.parse_args(args)

    import httpx

    from ..rollout.vllm.server import AnyServer, Patience, ServerError

    patience = Patience(connect=options.timeout, read=options.timeout, attempts=1, recovery=0.0)
    try:
        info = AnyServer(options.url, patience=patience).info
    except (ServerError, httpx.HTTPError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(info, indent=2))
    return 0
