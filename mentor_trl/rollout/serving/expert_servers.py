"""The expert on servers of its own, as a configuration asks for it."""

from ...config import MentorGRPOConfig
from ...connection.client import Patience
from ...experts.compatibility import check_context, check_stop_ids
from ...experts.remote import RemoteExpert
from ..host import Host


def remote_expert(args: MentorGRPOConfig, host: Host) -> tuple[RemoteExpert, list[int]]:
    """
    The expert of `expert_base_url`, tested, and the ids that end a completion of either source.

    Raises:
        [`SetupError`]: if it does not fit the policy.
        [`ServerError`]: if a server does not answer, or is not fit to be asked.
    """
    uncorrected = args.correction == "temper" and args.correction_exponent == 0.0 and args.distillation == "none"
    expert = RemoteExpert(
        args.expert_base_url,
        host.tokenizer,
        served_name=args.expert_served_model_name,
        api_key_file=args.expert_api_key_file,
        patience=Patience(read=args.vllm_read_timeout, recovery=args.vllm_server_timeout),
        needs_tempered=args.temperature != 1.0 and not uncorrected,
    )
    stop = check_stop_ids(host.stop_token_ids, expert.stop_token_ids, host.tokenizer, args.extend_stop_tokens)
    lengths, remedy = [host.longest_prompt()], "serve the expert with a larger `--max-model-len`"
    check_context(lengths, args.max_completion_length, expert.max_length, "the expert's", remedy)
    return expert, stop
