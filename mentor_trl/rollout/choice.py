"""Which engine a configuration asks for. The choice follows TRL's own flags."""

from ..config import MentorGRPOConfig
from .host import EngineSetup, PlainSetup
from .local.local_engine import LocalSetup
from .local.scoring_engine import ScoringSetup
from .stock.stock_engine import StockSetup


def engine_setup(args: MentorGRPOConfig, expert, expert_tokenizer, needs_expert: bool) -> EngineSetup:
    """Setup of the engine of a run."""
    if not needs_expert:
        return PlainSetup(args)
    if args.use_vllm and args.distillation != "none" and args.num_mixed_generations == 0:
        return ScoringSetup(args, expert, expert_tokenizer)
    if not args.use_vllm:
        return LocalSetup(args, expert, expert_tokenizer)
    if args.expert_base_url is not None:
        return StockSetup(args, expert, expert_tokenizer)
    # Only here, as this engine alone replaces parts of vLLM
    from .vllm.vllm_engine import VLLMSetup

    return VLLMSetup(args, expert, expert_tokenizer)
