"""Which engine a configuration asks for. The choice follows TRL's own flags."""

from ..config import MentorGRPOConfig
from .host import EngineSetup, PlainSetup
from .local.local_engine import LocalSetup
from .vllm.vllm_engine import VLLMSetup


def engine_setup(args: MentorGRPOConfig, expert, expert_tokenizer, needs_expert: bool) -> EngineSetup:
    """Setup of the engine of a run."""
    if not needs_expert:
        return PlainSetup(args)
    return (VLLMSetup if args.use_vllm else LocalSetup)(args, expert, expert_tokenizer)
