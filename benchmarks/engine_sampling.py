"""Rows of fixed length from every engine, over the expert's mean weight E[w] and the rule by which it branches."""

import math
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import EOS, PADDING, Server, markdown_table, random_prompts, working
from mentor_trl import LocalSampler, MixedRequest
from mentor_trl.objective import branch_weight, near_sentence_end, sentence_endings


RULES = ("random", "entropy", "sentence")
PLAIN, SHARED, SERVERS, LLM, LOCAL = (
    "plain vLLM",
    "shared engine",
    "stock servers",
    "stock, policy in this process",
    "in process",
)
ENGINES = (PLAIN, SHARED, SERVERS, LLM, LOCAL)
USES_SERVERS = {SERVERS: ("policy", "expert"), LLM: ("expert",)}


@dataclass(frozen=True)
class Case:
    """A rule whose parameters give the expert about the weight that is aimed at."""

    rule: str
    aim: float
    gamma: float = math.inf
    share: float = 0.0
    span: int = 1

    def request(self, args: Namespace, seed: int, sentence_ids: tuple[int, ...]) -> MixedRequest:
        return MixedRequest(
            random_prompts(args.rows, args.prompt, args.vocab),
            [self.gamma] * args.rows,
            args.tokens,
            (),
            branch_rule=self.rule if self.aim else "entropy",
            share=self.share,
            span=self.span,
            sentence_ids=sentence_ids if self.rule == "sentence" else (),
            seed=seed,
        )


# Engines: each gives a function that samples a request and one that counts its traffic


def engine_options(args: Namespace, models: int = 1) -> dict[str, Any]:
    options = {
        "dtype": args.dtype,
        "max_model_len": context(args),
        "max_num_seqs": args.rows,
        "gpu_memory_utilization": models * args.memory,
        "enforce_eager": args.eager,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
    }
    return options | ({"kv_cache_memory_bytes": 2**28} if args.device == "cpu" else {})


def context(args: Namespace) -> int:
    """Tokens that an engine must hold: near its limit the shared one would draft less."""
    return args.prompt + max(args.tokens, args.step_tokens) + 2 * args.draft_length


def no_traffic() -> dict[str, int]:
    return {"requests": 0, "sent": 0, "received": 0}


def traffic(clients: list) -> Callable[[], dict[str, int]]:
    return lambda: {name: sum(getattr(client, name) for client in clients) for name in no_traffic()}


def plain_engine(args: Namespace, folders: dict[str, str], servers: dict[str, Server]):
    from mentor_trl.vllm_server.options import engine_environment

    os.environ.update(engine_environment(cpu=args.device == "cpu"))
    from vllm import LLM, SamplingParams

    llm = LLM(folders["policy"], **engine_options(args))

    def sample(request: MixedRequest) -> None:
        params = SamplingParams(max_tokens=request.max_new_tokens, ignore_eos=True, detokenize=False, logprobs=0)
        llm.generate([{"prompt_token_ids": ids} for ids in request.prompt_ids], params, use_tqdm=False)

    return sample, no_traffic


def shared_engine(args: Namespace, folders: dict[str, str], servers: dict[str, Server]):
    from mentor_trl.rollout.vllm.colocate import ColocateSampler

    options = {**engine_options(args, models=2), "draft_length": args.draft_length}
    endings = sentence_endings(AutoTokenizer.from_pretrained(folders["policy"]))
    sampler = ColocateSampler(
        folders["policy"], folders["expert"], num_tokens=args.vocab - PADDING, sentence_ids=endings, **options
    )
    return sampler.sample, no_traffic


def stock_servers(args: Namespace, folders: dict[str, str], servers: dict[str, Server]):
    from mentor_trl.experts.remote import RemoteExpert
    from mentor_trl.rollout.stock.replicas import PolicyReplicas
    from mentor_trl.rollout.stock.stock_sampler import StockSampler

    policy = PolicyReplicas(servers["policy"].url, num_tokens=args.vocab - PADDING)
    expert = RemoteExpert(servers["expert"].url, AutoTokenizer.from_pretrained(folders["policy"]))
    clients = [server.client for server in policy.servers] + expert.clients
    return StockSampler(policy, expert).sample, traffic(clients)


def stock_llm(args: Namespace, folders: dict[str, str], servers: dict[str, Server]):
    from mentor_trl.experts.remote import RemoteExpert
    from mentor_trl.rollout.stock.policy_llm import PolicyLLM
    from mentor_trl.rollout.stock.stock_sampler import StockSampler
    from mentor_trl.vllm_server.options import TOKENS
    from mentor_trl.vllm_server.token_table import TokenTable

    tokenizer = AutoTokenizer.from_pretrained(folders["policy"])
    table = TokenTable.of(tokenizer, args.vocab, [EOS])
    policy = PolicyLLM(folders["policy"], additional_config={TOKENS: asdict(table)}, **engine_options(args))
    expert = RemoteExpert(servers["expert"].url, tokenizer)
    return StockSampler(policy, expert).sample, traffic(expert.clients)


def local_engine(args: Namespace, folders: dict[str, str], servers: dict[str, Server]):
    policy, expert = (
        AutoModelForCausalLM.from_pretrained(folders[name], dtype=args.dtype).to(args.device).eval()
        for name in ("policy", "expert")
    )
    sampler = LocalSampler(expert, args.vocab - PADDING, args.rows, args.draft_length)

    def sample(request: MixedRequest):
        with sampler.session(policy) as session:
            return session.sample(request)

    return sample, no_traffic


MAKERS = dict(zip(ENGINES, (plain_engine, shared_engine, stock_servers, stock_llm, local_engine)))


def work(name: str, args: Namespace, folders: dict[str, str], servers: dict[str, Server], connection) -> None:
    """An engine in its process, which samples a request at a time and says what this took."""
    sample, counts = MAKERS[name](args, folders, servers)
    used = [servers[each] for each in USES_SERVERS.get(name, ())]
    connection.send("ready")
    while (request := connection.recv()) is not None:
        before, own, cpu = counts(), time.process_time(), sum(server.cpu_seconds() for server in used)
        started = time.perf_counter()
        rollout = sample(request)
        seconds = time.perf_counter() - started
        own = time.process_time() - own
        cpu = sum(server.cpu_seconds() for server in used) - cpu
        result = {
            "seconds": seconds,
            # With both engines on servers, this process is a client alone
            "engine_cpu": cpu if name == SERVERS else cpu + own,
            "client_cpu": own if name == SERVERS else 0.0,
            **{each: after - before[each] for each, after in counts().items()},
        }
        connection.send(result | branch_share(rollout))


def branch_share(rollout) -> dict[str, float]:
    return {} if rollout is None else {"weight": rollout.branch[rollout.mask].double().mean().item()}


# Which parameters give which E[w]


def calibrate(args: Namespace, folders: dict[str, str], connection) -> None:
    """Entropies of the policy's tokens, and by span how many of them are the first of a sentence."""
    sample, _ = local_engine(args, folders, {})
    connection.send("ready")
    endings = torch.tensor(connection.recv())
    rollout = sample(Case("entropy", 0.0).request(args, seed=1, sentence_ids=()))
    prompts = random_prompts(args.rows, args.prompt, args.vocab)
    rows = [torch.tensor(prompt + ids) for prompt, ids in zip(prompts, rollout.completion_ids)]
    near = {}
    for span in range(1, min(args.prompt, 64) + 1):
        recent = torch.cat([row.unfold(0, span, 1)[args.prompt - span : -1] for row in rows])
        near[span] = near_sentence_end(recent, endings).double().mean().item()
    connection.send((rollout.entropies[rollout.mask].tolist(), near))


def cases(args: Namespace, entropies: torch.Tensor, near: dict[int, float]) -> Iterator[Case]:
    for aim in args.share:
        if not aim:
            yield Case("none", 0.0)
            continue
        for rule in args.rule:
            if rule == "entropy":
                yield Case(rule, aim, gamma=gamma_of(entropies, aim))
            elif rule == "random":
                yield Case(rule, aim, gamma=1.0, share=aim)
            else:
                span = min(near, key=lambda span: abs(near[span] - aim))
                yield Case(rule, aim, gamma=1.0, share=min(1.0, aim / near[span]), span=span)


def gamma_of(entropies: torch.Tensor, aim: float) -> float:
    """gamma at which the mean weight is `aim`, by bisection."""
    low, high = 1e-6, entropies.max().item() / aim + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if branch_weight(entropies, middle).mean() > aim:
            low = middle
        else:
            high = middle
    return high


# All of them, in turn


def measure_sampling(
    args: Namespace, folders: dict[str, str], servers: dict[str, Server], say: Callable[[dict], None]
) -> list[dict[str, Any]]:
    """The counted runs of each case and engine; `say` gets each as it comes."""
    endings = tuple(sentence_endings(AutoTokenizer.from_pretrained(folders["policy"])))
    with working("calibration", calibrate, args, folders) as worker:
        entropies, near = worker.ask(list(endings))
    found = []
    with ExitStack() as stack:
        # One after the other: an engine takes its share of the memory that it finds
        start = lambda name: working(name, work, name, args, folders, servers)
        workers = {name: stack.enter_context(start(name)) for name in args.engine}
        for number, case in enumerate(cases(args, torch.tensor(entropies, dtype=torch.double), near)):
            for turn in range(-1 if number == 0 else 0, args.repeats):
                request = case.request(args, 1000 * number + turn + 1, endings)
                for name in rotated(list(workers), turn):
                    run = {"engine": name, **asdict(case), "round": turn, **workers[name].ask(request)}
                    if turn >= 0:
                        found.append(run)
                        say(run)
        for worker in workers.values():
            worker.connection.send(None)
    return found


def rotated(items: list, by: int) -> list:
    by %= len(items)
    return items[by:] + items[:by]


def summarize_sampling(runs: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Medians of each case and engine, of runs of so many tokens; ratios are to plain vLLM in the same round."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault((run["rule"], run["aim"], run["engine"]), []).append(run)
    return [summary(own, groups.get((*name[:2], PLAIN)), tokens) for name, own in groups.items()]


def summary(own: list[dict[str, Any]], plain: list[dict[str, Any]] | None, tokens: int) -> dict[str, Any]:
    median = lambda name: statistics.median(run[name] for run in own)
    row = {name: own[0][name] for name in ("rule", "aim", "engine")}
    row["weight"] = statistics.fmean(run["weight"] for run in own) if "weight" in own[0] else None
    row["tokens_per_second"] = tokens / median("seconds")
    row |= {f"{name}_ms_per_token": 1e3 * median(name) / tokens for name in ("engine_cpu", "client_cpu")}
    row |= {f"{name}_per_token": median(name) / tokens for name in no_traffic()}
    row["requests_per_second"] = statistics.median(run["requests"] / run["seconds"] for run in own)
    if plain:
        pairs = list(zip(own, plain))
        row["of_plain"] = statistics.median(base["seconds"] / run["seconds"] for run, base in pairs)
        row["cpu_of_plain"] = statistics.median(run["engine_cpu"] / base["engine_cpu"] for run, base in pairs)
    return row


def crossings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each rule, where the shared engine and each stock one are equally fast, and where they take the same CPU."""
    found = []
    by = {(row["rule"], row["aim"], row["engine"]): row for row in rows}
    for rule in dict.fromkeys(row["rule"] for row in rows if row["aim"]):
        aims = sorted({row["aim"] for row in rows if row["rule"] in (rule, "none")})
        for engine in (SERVERS, LLM):
            pairs = []
            for aim in aims:
                key = (rule if aim else "none", aim)
                if (*key, engine) in by and (*key, SHARED) in by:
                    pairs.append((by[(*key, engine)], by[(*key, SHARED)]))
            if len(pairs) < 2:
                continue
            for measure, sign in (("tokens_per_second", 1.0), ("engine_cpu_ms_per_token", -1.0)):
                points = [
                    ((stock["weight"] + shared["weight"]) / 2, sign * math.log(stock[measure] / shared[measure]))
                    for stock, shared in pairs
                ]
                found.append({"rule": rule, "engine": engine, "measure": measure, **crossing(points)})
    return found


def crossing(points: list[tuple[float, float]]) -> dict[str, Any]:
    """Where a line through (E[w], advantage of the stock engine) falls to zero."""
    ratios = {"first": math.exp(points[0][1]), "last": math.exp(points[-1][1])}
    for (left, before), (right, after) in zip(points, points[1:]):
        if before > 0.0 >= after:
            return {"at": left + (right - left) * before / (before - after), **ratios}
    return {"at": None, "range": [points[0][0], points[-1][0]], **ratios}


# Tables


def sampling_table(rows: list[dict[str, Any]]) -> str:
    headings = ["rule", "engine", "E[w]", "tokens/s", "of plain", "engine CPU, ms / token", "of plain"]
    headings += ["client CPU, ms / token", "requests/s", "requests / token", "bytes sent, received / token"]
    lines = []
    for row in rows:
        cells = [row["rule"], row["engine"], filled(row["weight"], ".3f"), f"{row['tokens_per_second']:,.0f}"]
        cells += [filled(row.get("of_plain"), ".2f"), f"{row['engine_cpu_ms_per_token']:.2f}"]
        cells += [filled(row.get("cpu_of_plain"), ".2f"), filled(row["client_cpu_ms_per_token"] or None, ".2f")]
        cells += [
            filled(row[f"requests_per_{unit}"] or None, form) for unit, form in (("second", ".0f"), ("token", ".3f"))
        ]
        cells.append(f"{row['sent_per_token']:.0f}, {row['received_per_token']:.0f}" if row["sent_per_token"] else "")
        lines.append(cells)
    return markdown_table(headings, lines, texts=2)


def filled(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def crossings_table(found: list[dict[str, Any]]) -> str:
    names = {"tokens_per_second": "tokens/s", "engine_cpu_ms_per_token": "engine CPU"}
    headings = [
        "rule",
        "stock engine",
        "by",
        "E[w] below which it is ahead of the shared engine",
        "ahead by, first-last",
    ]
    lines = []
    for each in found:
        where = (
            f"{each['at']:.3f}"
            if each["at"] is not None
            else "no crossing from {:.2f} to {:.2f}".format(*each["range"])
        )
        ahead = f"{each['first']:.2f}-{each['last']:.2f} times"
        lines.append([each["rule"], each["engine"], names[each["measure"]], where, ahead])
    return markdown_table(headings, lines, texts=5)
