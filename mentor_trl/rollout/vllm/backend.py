"""TRL's vLLM backend for an engine that speaks for policy and expert."""

import atexit
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer
from trl.trainer.utils import ensure_master_addr_port

from ...config import MentorGRPOConfig
from ...connection.client import Patience
from ...connection.failures import WeightsLost
from ...errors import EngineError, SetupError
from ...experts.compatibility import check_context, check_tokenizers, text_model
from ...experts.load import load_expert_tokenizer
from ...objective import sentence_endings
from ...vllm_server.identity import files_digest
from ...vllm_server.options import model_shape
from ..types import MixedRequest, MixedRollout, Progress
from .colocate import ColocateSampler
from .nccl import DraftWeightClient, PolicyWeightClient
from .server import PolicyServerSampler, ServerSampler
from .weights import new_run_id, remove_dead_weights, remove_weights, write_weights


# The Trainer leaves names with an underscore out of what it pushes to the Hub
WEIGHTS_FOLDER = "_vllm_weights"


def weights_root(args: MentorGRPOConfig) -> Path:
    """Folder in which weights wait for a server."""
    return Path(args.vllm_weight_sync_dir or os.path.join(args.output_dir, WEIGHTS_FOLDER)).absolute()


@contextmanager
def mixed_generation(args: MentorGRPOConfig, expert: str | None) -> Iterator[None]:
    """Inside, [`~trl.GRPOTrainer`] builds its vLLM backend as a [`MixedVLLMGeneration`]."""
    original = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = partial(MixedVLLMGeneration, config=args, expert=expert)
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
    """

    def __init__(self, *args: Any, config: MentorGRPOConfig, expert: str | None, **kwargs: Any):
        self.config, self.expert = config, expert
        self.sampler: ColocateSampler | ServerSampler | None = None
        self.policy_sampler: ServerSampler | None = None
        self._nccl: list[PolicyWeightClient] = []  # of the servers, on the main process
        self.info: dict[str, Any] = {}
        self.stop_token_ids: tuple[int, ...] = ()
        self._updates = 0
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        self._run_id = new_run_id()
        self.tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.num_tokens = max(self.tokenizer.get_vocab().values()) + 1
        if self.mode == "server":
            self.info = self._on_main(self._connect)
            # Log-probabilities come from the plugin's records, which are those of the tempered distribution
            described = {"model_config": {"logprobs_mode": "processed_logprobs"}}
            self.vllm_client = SimpleNamespace(get_server_info=lambda: described)
        else:
            self.sampler = self._build()
            self.info = self.sampler.info
        self.accelerator.wait_for_everyone()

    def _connect(self) -> dict[str, Any]:
        url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
        patience = Patience(read=self.config.vllm_read_timeout, recovery=self.server_timeout)
        access = {"patience": patience, "api_key_file": self.config.vllm_server_api_key_file}
        self.sampler = ServerSampler(url, num_tokens=self.num_tokens, **access)
        if self.config.vllm_policy_server_base_url is not None:
            self.policy_sampler = PolicyServerSampler(self.config.vllm_policy_server_base_url, **access)
        if self.weight_sync == "nccl":
            if self.accelerator.device.type != "cuda":
                raise SetupError(
                    f"`vllm_weight_sync='nccl'` needs a CUDA device, and the policy is on {self.accelerator.device}. "
                    "Set it to 'folder', or leave it unset."
                )
            kinds = (DraftWeightClient, PolicyWeightClient)
            self._nccl = [
                kind(sampler, self.group_port + port, self.accelerator.device)
                for port, (sampler, kind) in enumerate(zip(self._servers, kinds))
            ]
        else:
            root = weights_root(self.config)
            remove_dead_weights(root)
            atexit.register(remove_weights, root, self._run_id)
        return {**self.sampler.info, "policy_server": getattr(self.policy_sampler, "info", None)}

    @property
    def _servers(self) -> list[ServerSampler]:
        """On the main process, all that hold the policy."""
        return [self.sampler] if self.policy_sampler is None else [self.sampler, self.policy_sampler]

    @property
    def weight_sync(self) -> str:
        """`"nccl"` or `"folder"`."""
        if self.config.vllm_weight_sync != "auto":
            return self.config.vllm_weight_sync
        return "nccl" if self.accelerator.device.type == "cuda" else "folder"

    def _build(self) -> ColocateSampler:
        os.environ["RANK"] = str(self.accelerator.process_index)
        os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
        os.environ["WORLD_SIZE"] = str(self.accelerator.num_processes)
        ensure_master_addr_port()
        return ColocateSampler(
            self.model.name_or_path,
            self.expert,
            num_tokens=self.num_tokens,
            draft_length=self.config.draft_length,
            sentence_ids=sentence_endings(self.tokenizer) if self.config.branch_rule == "sentence" else None,
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
        self, policy: PreTrainedModel, expert_tokenizer: PreTrainedTokenizerBase | None, longest_prompt: int
    ) -> None:
        """Raise [`SetupError`] if the engine, which is running by now, does not fit this policy and expert."""
        expert = self.expert
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
        """Give the engine the policy's current weights. Collective; where it fails, it does so on every process."""
        self._updates += 1
        version = f"{self._run_id}-{self._updates}"
        if self.mode == "colocate":
            self.sampler.load_tensors(self._iter_named_params(), version)
        elif self.weight_sync == "folder":
            self._sync_by_folder(version)
        else:
            self._sync_by_nccl(version)

    def _sync_by_folder(self, version: str) -> None:
        root = weights_root(self.config)

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
        for index in range(1 if self.config.vllm_policy_server_base_url is None else 2):
            self._send(lambda params, index=index: self._nccl[index].push(self._weight_metadata, params, version))

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
                    deque(params, maxlen=0)

        self._on_main(push_all, others=lambda: deque(self._iter_named_params(), maxlen=0))

    def _on_main(self, call: Callable[[], Any], others: Callable[[], Any] = lambda: None) -> Any:
        """
        What a call returns on the main process, on every process; if it fails, it fails on every process. The others
        make theirs meanwhile.
        """
        outcome: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.accelerator.is_main_process:
            try:
                outcome[0] = call()
            except Exception as error:
                failure = error
                kind = type(error) if isinstance(error, EngineError) else RuntimeError
                outcome[1] = kind(f"On the main process: {error}")
        else:
            others()
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome, from_process=0)
        if failure or outcome[1]:
            raise failure or outcome[1]
        return outcome[0]

    # Rows

    @contextmanager
    def session(self) -> Iterator["MixedVLLMGeneration"]:
        """Hold the current weights: a colocated engine is awake inside."""
        with self.sampler.session() if self.mode == "colocate" else nullcontext():
            yield self

    def generate(self, prompts, images, num_generations, profiler=None) -> tuple:
        """Sample the plain policy, for [`~trl.GRPOTrainer`]."""
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

    def sample(self, request: MixedRequest, progress: Progress | None = None) -> MixedRollout:
        """
        Sample the rows of this process. In server mode all processes call this together, with any number of rows, and
        what is not per row must be the same on all. A failing server is a [`ServerError`] on all.
        """
        if self.mode == "colocate":
            return self.sampler.sample(request, progress)
        requests = gather_object([request])
        counts = [len(part.prompt_ids) for part in requests]

        def sample_all() -> list[MixedRollout]:
            plain = self.policy_sampler is not None and all(part.plain for part in requests)
            with (self.policy_sampler if plain else self.sampler).session() as session:
                return session.sample(MixedRequest.merged(requests), progress).split(counts)

        for _ in range(Patience.attempts):
            try:
                return self._on_main(sample_all)[self.accelerator.process_index]
            except WeightsLost as error:
                lost = error
            self.sync_weights()
        raise lost


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
