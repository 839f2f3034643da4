"""TRL's vLLM backend where vLLM holds the policy of mixed rollouts: weights go to it, and rows come from it."""

import atexit
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer
from trl.trainer.utils import ensure_master_addr_port

from ...config import MentorGRPOConfig
from ...connection.client import Patience
from ...connection.failures import WeightsLost
from ...errors import EngineError, SetupError
from ...experts.compatibility import text_model
from ...vllm_server.options import model_shape
from ..types import MixedRequest, MixedRollout, Progress
from .adapters import write_adapter
from .nccl import PolicyWeightClient
from .policy_server import PolicyServer
from .weights import new_run_id, remove_dead_weights, remove_weights, write_weights


# The Trainer leaves names with an underscore out of what it pushes to the Hub
WEIGHTS_FOLDER = "_vllm_weights"


def weights_root(args: MentorGRPOConfig) -> Path:
    """Folder in which weights wait for a server."""
    return Path(args.vllm_weight_sync_dir or os.path.join(args.output_dir, WEIGHTS_FOLDER)).absolute()


@contextmanager
def backend(kind: type["PolicyGeneration"], **kwargs: Any) -> Iterator[None]:
    """Inside, [`~trl.GRPOTrainer`] builds its vLLM backend as one of ours."""
    original = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = partial(kind, **kwargs)
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = original


class PolicyGeneration(VLLMGeneration):
    """
    Generation for the trainer with vLLM engines that hold the policy, in servers or in this process.

    `generate` samples the plain policy, as TRL asks for evaluation and once guidance is over; `sample` samples
    what a [`MixedRequest`] asks for. In server mode both are collective: the rows of all processes go to the servers
    together, and each process gets its own back.
    """

    def __init__(self, *args: Any, config: MentorGRPOConfig, **kwargs: Any):
        self.config = config
        self.sampler: Any = None  # in this process, or on the main one the servers'
        self.info: dict[str, Any] = {}
        self.stop_token_ids: tuple[int, ...] = ()
        self._nccl: list[PolicyWeightClient] = []  # of the servers, on the main process
        self._updates = 0
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        self._run_id = new_run_id()
        self.tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        self.num_tokens = max(self.tokenizer.get_vocab().values()) + 1
        if self.mode == "server":
            self.info = self._on_main(self._connect_all)
            # Log-probabilities come from our own records, which are those of the tempered distribution
            described = {"model_config": {"logprobs_mode": "processed_logprobs"}}
            self.vllm_client = SimpleNamespace(get_server_info=lambda: described)
        else:
            os.environ["RANK"] = str(self.accelerator.process_index)
            os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
            os.environ["WORLD_SIZE"] = str(self.accelerator.num_processes)
            ensure_master_addr_port()
            self.info = self._build()
        self.accelerator.wait_for_everyone()

    # What a kind of engine says

    @property
    def servers(self) -> list[PolicyServer]:
        """On the main process in server mode, all servers that hold the policy."""
        raise NotImplementedError

    def _connect(self) -> dict[str, Any]:
        """Reach the servers, on the main process; returns what they are."""
        raise NotImplementedError

    def _build(self) -> dict[str, Any]:
        """Build the engine of this process; returns what it is."""
        raise NotImplementedError

    @property
    def _adapter_hosts(self) -> list:
        """What takes an adapter."""
        raise NotImplementedError

    def _session(self, request: MixedRequest) -> AbstractContextManager[Any]:
        """A session of the servers' sampler for a request, on the main process."""
        raise NotImplementedError

    def _load_tensors(self, version: str) -> None:
        """Replace the weights of the engine in this process."""
        self.sampler.load_tensors(self._iter_named_params(), version)

    def _nccl_client(self, index: int) -> type[PolicyWeightClient]:
        """Kind of client for the weights of a server."""
        return PolicyWeightClient

    @property
    def access(self) -> dict[str, Any]:
        """How servers are reached."""
        patience = Patience(read=self.config.vllm_read_timeout, recovery=self.server_timeout)
        return {"patience": patience, "api_key_file": self.config.vllm_server_api_key_file}

    @property
    def url(self) -> str:
        """Address, or addresses, of the servers."""
        return self.server_base_url or f"http://{self.server_host}:{self.server_port}"

    @property
    def engine_options(self) -> dict[str, Any]:
        """TRL's options of an engine in this process."""
        return {
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.max_model_length,
            "max_num_seqs": self.max_num_seqs,
            "enable_sleep_mode": self.enable_sleep_mode,
            "model_impl": self.model_impl,
            "trust_remote_code": self.trust_remote_code,
            "skip_tokenizer_init": True,
            # In this process, where the weights are
            "distributed_executor_backend": "external_launcher",
            "seed": self.accelerator.process_index,
        }

    def _connect_all(self) -> dict[str, Any]:
        info = self._connect()
        if self.weight_sync == "nccl":
            if self.accelerator.device.type != "cuda":
                raise SetupError(
                    f"`vllm_weight_sync='nccl'` needs a CUDA device, and the policy is on {self.accelerator.device}. "
                    "Set it to 'folder', or leave it unset."
                )
            self._nccl = [
                self._nccl_client(index)(server, self.group_port + index, self.accelerator.device)
                for index, server in enumerate(self.servers)
            ]
        else:
            root = weights_root(self.config)
            remove_dead_weights(root)
            atexit.register(remove_weights, root, self._run_id)
        return info | {"servers": len(self.servers)}

    def check_shape(self, policy: PreTrainedModel, served: dict[str, Any], name: str) -> None:
        """Raise [`SetupError`] if an engine holds a policy of another shape."""
        ours = model_shape(text_model(policy).config.get_text_config())
        if served["policy_shape"] != ours:
            raise SetupError(
                f"{name} serves a policy ({served['policy']!r}) of another shape than the one that is trained: "
                f"{served['policy_shape']}, and not {ours}. Start it with `--policy {policy.name_or_path}`."
            )

    @property
    def weight_sync(self) -> str:
        """`"nccl"`, `"folder"` or `"adapter"`."""
        if self.config.vllm_weight_sync != "auto":
            return self.config.vllm_weight_sync
        return "nccl" if self.accelerator.device.type == "cuda" else "folder"

    # Weights

    def sync_weights(self) -> None:
        """Give the engine the policy's current weights. Collective; where it fails, it does so on every process."""
        self._updates += 1
        version = f"{self._run_id}-{self._updates}"
        if self.weight_sync == "adapter":
            self._sync_by_adapter(version)
        elif self.mode == "colocate":
            self._load_tensors(version)
        elif self.weight_sync == "folder":
            self._sync_by_folder(version)
        else:
            self._sync_by_nccl(version)

    def _sync_by_folder(self, version: str) -> None:
        root = weights_root(self.config)

        def push(params: Iterator[tuple[str, torch.Tensor]]) -> None:
            write_weights(params, root / version, getattr(torch, self.info["dtype"]))
            for server in self.servers:
                server.load_policy(str(root / version), version)
            remove_weights(root, self._run_id, keep=version)

        self._send(push)

    def _sync_by_nccl(self, version: str) -> None:
        if self._weight_metadata is None:
            self._weight_metadata = [
                (name, str(param.dtype).removeprefix("torch."), list(param.shape))
                for name, param in self._iter_named_params()
            ]
        for index in range(self.info["servers"]):
            self._send(lambda params, index=index: self._nccl[index].push(self._weight_metadata, params, version))

    def _sync_by_adapter(self, version: str) -> None:
        root = weights_root(self.config)
        with self._dist.gather_params([param for param in self.model.parameters() if param.requires_grad]):
            self._on_main(lambda: write_adapter(self.model, root / version))

        def load() -> None:
            for host in self._adapter_hosts:
                host.load_adapter(str(root / version), version)

        if self.mode == "server":
            self._on_main(load)
        else:
            load()
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            remove_weights(root, self._run_id, keep=version)

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
    def session(self) -> Iterator["PolicyGeneration"]:
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
            merged = MixedRequest.merged(requests)
            with self._session(merged) as session:
                return session.sample(merged, progress).split(counts)

        for _ in range(Patience.attempts):
            try:
                return self._on_main(sample_all)[self.accelerator.process_index]
            except WeightsLost as error:
                lost = error
            self.sync_weights()
        raise lost
