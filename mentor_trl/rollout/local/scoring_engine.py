"""The engine of a trainer that TRL's own vLLM generates for, and whose expert only scores what it wrote."""

from ...errors import SetupError
from ...experts.port import Expert
from ..host import Host, PlainEngine, check_vllm
from ..serving.expert_servers import remote_expert
from .decoding_check import check_decoding
from .in_process import InProcessExpert
from .local_engine import LocalSetup


class ScoringEngine(PlainEngine):
    """
    [`~mentor_trl.rollout.types.Engine`] that samples nothing.

    Args:
        expert ([`~mentor_trl.experts.port.Expert`]):
            The expert, in this process or on servers.
        stop_token_ids (`list[int]`):
            Ids that end a completion.
    """

    def __init__(self, expert: Expert, stop_token_ids: list[int]):
        super().__init__(stop_token_ids)
        self.expert, self.expert_name = expert, expert.name
        self.remote = not isinstance(expert, InProcessExpert)

    @property
    def released(self) -> bool:
        return self.expert is None

    def release_expert(self) -> None:
        """Free the expert's memory."""
        self.expert = None


class ScoringSetup(LocalSetup):
    """[`~mentor_trl.rollout.host.EngineSetup`] of a [`ScoringEngine`]; see [`LocalSetup`]."""

    def check(self, model, quantization_config) -> None:
        check_vllm()
        if self.source is None and self.args.expert_base_url is None:
            raise SetupError(
                f"`distillation={self.args.distillation!r}` needs an expert. Set `expert_model_name_or_path` or "
                "`expert_base_url`, or pass `expert=` to the trainer."
            )
        super().check(model, quantization_config)

    def build(self, host: Host) -> ScoringEngine:
        """Load the expert, or reach its servers, and check that it fits the policy."""
        args = host.args
        expert, stop = self._load(host) if args.expert_base_url is None else remote_expert(args, host)
        generation = host.vllm_generation
        if stop != host.stop_token_ids:  # those of the expert, which vLLM does not know
            generation.generation_kwargs = {**generation.generation_kwargs, "stop_token_ids": stop}
        if args.expert_base_url is None:
            expert = self._in_process(host, expert, check_decoding(expert, "expert"))
        return ScoringEngine(expert, stop)
