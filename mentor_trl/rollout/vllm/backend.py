"""TRL's vLLM backend for an engine that speaks for policy and expert."""

import atexit
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer
from trl.trainer.utils import ensure_master_addr_port

from ...config import MentorGRPOConfig
from ...errors import SetupError
from ...experts.compatibility import check_context, check_tokenizers, text_model
from ...experts.load import load_expert_tokenizer
from ...vllm_plugin.identity import files_digest
from ...vllm_plugin.options import model_shape
from ..types import MixedRequest, MixedRollout
from .collective import on_main
from .colocate import ColocateSampler
from .nccl import DraftWeightClient, PolicyWeightClient
from .server import Patience, PolicyServerSampler, ServerSampler, WeightsLost
from .weights import new_run_id, remove_dead_weights, remove_weights, write_weights


# The Trainer leaves names with an underscore out of what it pushes to the Hub
WEIGHTS_FOLDER = "_vllm_weights"


@dataclass(frozen=True)
class EngineSettings:
    """
    What TRL's backend is not told by [`~trl.GRPOTrainer`].

    Args:
        expert (`str`, *optional*):
            Model id or folder of the expert, for the colocated engine.
        draft_length (`int`, *optional*, defaults to `8`):
            Tokens that the policy drafts between two passes of the expert, in the colocated engine.
        weight_sync (`str`, *optional*, defaults to `"auto"`):
            How weights reach the server: `"nccl"`, `"folder"`, or `"auto"`, NCCL from a CUDA device and else a folder.
        weight_sync_dir (`str`, *optional*):
            Folder, shared with the server, for `"folder"`.
        read_timeout (`float`, *optional*, defaults to `1200.0`):
            Seconds to wait for the server's answer to one request.
        policy_server_base_url (`str`, *optional*):
            Address of a server of the policy alone, for the rows that the expert has no part in.
        api_key_file (`str`, *optional*):
            File with the key of the servers.
    """

    expert: str | None = None
    draft_length: int = 8
    weight_sync: str = "auto"
    weight_sync_dir: str | None = None
    read_timeout: float = 1200.0
    policy_server_base_url: str | None = None
    api_key_file: str | None = None

    @classmethod
    def of(cls, args: MentorGRPOConfig, expert: str | None) -> "EngineSettings":
        """Settings of a configuration."""
        return cls(
            expert=expert,
            draft_length=args.draft_length,
            weight_sync=args.vllm_weight_sync,
            weight_sync_dir=args.vllm_weight_sync_dir or os.path.join(args.output_dir, WEIGHTS_FOLDER),
            read_timeout=args.vllm_read_timeout,
            policy_server_base_url=args.vllm_policy_server_base_url,
            api_key_file=args.vllm_server_api_key_file,
        )


@contextmanager
def mixed_generation(settings: EngineSettings) -> Iterator[None]:
    """Inside, [`~trl.GRPOTrainer`] builds its vLLM backend as a [`MixedVLLMGeneration`]."""
    original = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = partial(MixedVLLMGeneration, settings=settings)
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = original


class MixedVLLMGeneration(VLLMGeneration):
    """
    Generation for the trainer with a mixed-policy vLLM engine. Its weights are those of the draft model: nothing that
    happens here changes the expert.

    `generate` samples the plain policy, as TRL asks for evaluation and once guidance is over; `sample` samples
    what a [`MixedRequest`] asks for. In server mode both are collective: the rows of all processes go to the server
    together, and each process gets its own back.

    Args:
        *args, **kwargs:
            See [`~trl.generation.vllm_generation.VLLMGeneration`].
        settings ([`EngineSettings`]):
            The rest.
    """

    def __init__(self, *args: Any, settings: EngineSettings, **kwargs: Any):
        self.settings = settings
        self.sampler: ColocateSampler | ServerSampler | None = None
        self.policy_sampler: ServerSampler | None = None
        self._nccl: dict[ServerSampler, DraftWeightClient | PolicyWeightClient] = {}
        self.info: dict[str, Any] = {}
        self.stop_token_ids: tuple[int, ...] = ()
        self._updates = 0
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        self._run_id = new_run_id()
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.num_tokens = max(tokenizer.get_vocab().values()) + 1
        if self.mode == "server":
            self.info = on_main(self.accelerator, self._connect)
            self.vllm_client = _Described()
        else:
            self.sampler = self._build()
            self.info = self.sampler.info
        self.accelerator.wait_for_everyone()

    def _connect(self) -> dict[str, Any]:
        url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
        patience = Patience(read=self.settings.read_timeout, recovery=self.server_timeout)
        access = {"patience": patience, "api_key_file": self.settings.api_key_file}
        self.sampler = ServerSampler(url, num_tokens=self.num_tokens, **access)
        if self.settings.policy_server_base_url is not None:
            self.policy_sampler = PolicyServerSampler(self.settings.policy_server_base_url, **access)
        if self.weight_sync == "nccl":
            if self.accelerator.device.type != "cuda":
                raise SetupError(
                    f"`vllm_weight_sync='nccl'` needs a CUDA device, and the policy is on {self.accelerator.device}. "
                    "Set it to 'folder', or leave it unset."
                )
            kinds = (DraftWeightClient, PolicyWeightClient)
            self._nccl = {
                sampler: kind(sampler, self.group_port + port, self.accelerator.device)
                for port, (sampler, kind) in enumerate(zip(self._servers, kinds))
            }
        else:
            root = Path(self.settings.weight_sync_dir).absolute()
            remove_dead_weights(root)
            atexit.register(remove_weights, root, self._run_id)
        policy_info = self.policy_sampler.info if self.policy_sampler is not None else None
        return {**self.sampler.info, "policy_server": policy_info}

    @property
    def _servers(self) -> list[ServerSampler]:
        """On the main process, all that hold the policy."""
        return [self.sampler] if self.policy_sampler is None else [self.sampler, self.policy_sampler]

    @property
    def weight_sync(self) -> str:
        """`"nccl"` or `"folder"`."""
        if self.settings.weight_sync != "auto":
            return self.settings.weight_sync
        return "nccl" if self.accelerator.device.type == "cuda" else "folder"

    def _build(self) -> ColocateSampler:
        os.environ["RANK"] = str(self.accelerator.process_index)
        os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
        os.environ["WORLD_SIZE"] = str(self.accelerator.num_processes)
        ensure_master_addr_port()
        return ColocateSampler(
            self.model.name_or_path,
            self.settings.expert,
            num_tokens=self.num_tokens,
            draft_length=self.settings.draft_length,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_length,
            max_num_seqs=self.max_num_seqs,
            enable_sleep_mode=self.enable_sleep_mode,
            model_impl=self.model_impl,
            trust_remote_code=self.trust_remote_code,
            skip_tokenizer_init=True,
            # In this process, where the weights are
            distributed_executor_backend="external_launcher",
            seed=self.accelerator.process_index,
        )

    def check(
        self,
        policy: PreTrainedModel,
        expert: str | None,
        expert_tokenizer: PreTrainedTokenizerBase | None,
        longest_prompt: int,
    ) -> None:
        """
        Check that the engine speaks for this policy and this expert.

        Args:
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Policy.
            expert (`str`, *optional*):
                Expert that the configuration names.
            expert_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Its tokenizer. A server has checked its own when it was started.
            longest_prompt (`int`):
                Tokens of the longest prompt.

        Raises:
            `SetupError`: naming what differs.
        """
        info, where = self.info, "The server" if self.mode == "server" else "The engine"
        ours = model_shape(text_model(policy).config.get_text_config())
        for name, served in ((where, info), ("The policy's server", info.get("policy_server"))):
            if served is not None and served["policy_shape"] != ours:
                raise SetupError(
                    f"{name} serves a policy ({served['policy']!r}) of another shape than the one that is trained: "
                    f"{served['policy_shape']}, and not {ours}. Start it with `--policy {policy.name_or_path}`."
                )
        if expert is not None and not same_model(expert, info["expert"], info.get("expert_files")):
            raise SetupError(
                f"{where} speaks for the expert {info['expert']!r}, and the configuration names {expert!r}. Serve "
                "that expert, or leave `expert_model_name_or_path` unset to take the server's."
            )
        if self.mode == "colocate" and expert_tokenizer is None:
            expert_tokenizer = load_expert_tokenizer(expert, None, self.trust_remote_code)
        if expert_tokenizer is not None:
            check_tokenizers(self.processing_class, expert_tokenizer)
        option = "--max-model-len of `mentor-trl serve`" if self.mode == "server" else "`vllm_max_model_length`"
        limit = min(served["max_model_len"] for served in (info, info.get("policy_server")) if served is not None)
        check_context([longest_prompt], self.max_completion_length, limit, "the engine's", f"raise {option}")

    # Weights

    def sync_weights(self) -> None:
        """
        Give the engine the policy's current weights. Collective.

        Raises:
            [`ServerError`]: on every process, if the server cannot be given them.
        """
        self._updates += 1
        version = f"{self._run_id}-{self._updates}"
        if self.mode == "colocate":
            self.sampler.load_tensors(self._iter_named_params(), version)
        elif self.weight_sync == "folder":
            self._sync_by_folder(version)
        else:
            self._sync_by_nccl(version)

    def _sync_by_folder(self, version: str) -> None:
        root = Path(self.settings.weight_sync_dir).absolute()

        def push(params: Iterator[tuple[str, torch.Tensor]]) -> None:
            write_weights(params, root / version, getattr(torch, self.info["dtype"]))
            for server in self._servers:
                server.load_policy(str(root / version), version)
            remove_weights(root, self._run_id, keep=version)

        self._send(push)

    def _sync_by_nccl(self, version: str) -> None:
        if self._weight_metadata is None:
            self._weight_metadata = [
                (name, str(param.dtype).removeprefix("torch."), list(param.shape))
                for name, param in self._iter_named_params()
            ]
        for index in range(1 if self.settings.policy_server_base_url is None else 2):
            self._send(
                lambda params, server=index: self._nccl[self._servers[server]].push(
                    self._weight_metadata, params, version
                )
            )

    def _send(self, push: Callable[[Iterator[tuple[str, torch.Tensor]]], None]) -> None:
        """
        Let the main process push the parameters. All processes go through all of them, also where the push fails:
        bringing sharded parameters together is collective, and adapters are merged as long as the parameters last.
        """

        def push_all() -> None:
            params = self._iter_named_params()
            try:
                push(params)
            finally:
                if not params.gi_running:  # a transfer that hangs still holds them
                    _exhaust(params)

        on_main(self.accelerator, push_all, others=lambda: _exhaust(self._iter_named_params()))

    # Rows

    @contextmanager
    def session(self) -> Iterator["MixedVLLMGeneration"]:
        """Hold the current weights: a colocated engine is awake inside."""
        with self.sampler.session() if self.mode == "colocate" else nullcontext():
            yield self

    def generate(self, prompts, images, num_generations, profiler=None) -> tuple:
        """
        Sample the plain policy.

        Returns:
            `tuple` of prompts, completions, `(rows, tokens, 1)` log-probabilities and `None`, as
            [`~trl.generation.vllm_generation.VLLMGeneration.generate`].
        """
        request = MixedRequest(
            prompt_ids=prompts,
            gamma=[float("inf")] * len(prompts),
            max_new_tokens=self.max_completion_length,
            stop_token_ids=self.stop_token_ids,
            temperature=self.temperature,
        )
        with self.session(), profiler or nullcontext():
            rollout = self.sample(request)
        logps = [[[logp] for logp in row] for row in rollout.policy_logps()]
        return prompts, rollout.completion_ids, logps, None

    def sample(self, request: MixedRequest) -> MixedRollout:
        """
        Sample the rows of this process. In server mode all processes call this together, with any number of rows.

        Args:
            request ([`MixedRequest`]):
                Rows of this process. What is not per row must be the same on all.

        Returns:
            [`MixedRollout`] of these rows.

        Raises:
            [`ServerError`]: on every process, if the server fails longer than it may.
        """
        if self.mode == "colocate":
            return self.sampler.sample(request)
        requests = gather_object([request])
        counts = [len(part.prompt_ids) for part in requests]
        for _ in range(Patience.attempts):
            try:
                return on_main(
                    self.accelerator, lambda: self._sample_all(MixedRequest.merged(requests)).split(counts)
                )[self.accelerator.process_index]
            except WeightsLost as error:
                lost = error
            self.sync_weights()
        raise lost

    def _sample_all(self, request: MixedRequest) -> MixedRollout:
        plain = self.policy_sampler is not None and request.plain
        with (self.policy_sampler if plain else self.sampler).session() as session:
            return session.sample(request)


class _Described:
    """What TRL asks its client about the server."""

    def get_server_info(self) -> dict[str, Any]:
        # Log-probabilities come from the plugin's records, which are those of the tempered distribution
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}


def _exhaust(params: Iterator[tuple[str, torch.Tensor]]) -> None:
    for _ in params:
        pass


# Last parts of paths that every run has
COMMON_NAME = re.compile(
    r"((global[-_]?)?step|checkpoint|epoch|iter)[-_]?\d+|best|final|hf|last|latest|merged|model|output"
)


def same_model(name: str, served: str, served_files: str | None = None) -> bool:
    """
    Whether two names may mean one model. A folder that is here is compared by its weights, as `files_digest` of the
    server's, where the server has told that. Else two ids of the Hub are one model only if they are equal, and paths,
    as a folder may lie elsewhere on a server, if their last parts are: with the parts before where the last says
    nothing. A snapshot in the Hub's cache counts as its id.

    >>> same_model("org/expert", "org/expert"), same_model("org/expert", "other/expert")
    (True, False)
    >>> same_model("experts/mine", "/data/experts/mine"), same_model("experts/mine", "/data/experts/yours")
    (True, False)
    >>> same_model("mine/checkpoint-100", "/data/mine/checkpoint-100"), same_model("mine/final", "/data/yours/final")
    (True, False)
    >>> same_model("org/expert", "/cache/models--org--expert/snapshots/0a1b")
    True
    """
    files = files_digest(name) if served_files is not None else None
    if files is not None:
        return files == served_files
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$", served)
    served = "/".join(cached.groups()) if cached else served
    if all(value.count("/") == 1 and not value.startswith((".", "~", "/")) for value in (name, served)):
        return name == served
    mine, theirs = (Path(os.path.abspath(value)).parts for value in (name, served))
    parts = 2 if COMMON_NAME.fullmatch(mine[-1]) else 1
    return mine[-parts:] == theirs[-parts:]
