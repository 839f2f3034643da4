"""The expert on stock servers, against servers that are right, wrong and broken."""

import asyncio
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch

from fake_server import serving
from helpers import make_letter_tokenizer
from mentor_trl.connection.client import Patience
from mentor_trl.connection.failures import Exhausted, KeyRefused, ServerError, WrongServer
from mentor_trl.errors import SetupError
from mentor_trl.experts import expert_server
from mentor_trl.experts.port import Points
from mentor_trl.experts.remote import RemoteExpert
from mentor_trl.rollout import MixedRequest
from statistics_helpers import Tree, forward_logps, make_peaked_model, misfit
from stock_server import StockServer


PATIENCE = Patience(connect=10.0, read=30.0, attempts=4, back_off=0.01, recovery=2.0)
IMPATIENCE = replace(PATIENCE, read=1.0, recovery=30.0)  # for servers that hang
LETTERS, PROMPT = make_letter_tokenizer("abcd"), [3, 1, 2]
PAGE = b"<html>\n<title>Sign in</title>\n</html>"


@dataclass(frozen=True)
class Cut:
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@pytest.fixture(scope="module")
def model():
    return make_peaked_model(seed=1)


@pytest.fixture(scope="module")
def other():
    return make_peaked_model(seed=0)


@pytest.fixture
def stock(model):
    return StockServer(model, LETTERS)


@pytest.fixture
def url(stock):
    with serving(stock) as address:
        yield address


def connect(url, tokenizer=LETTERS, patience=PATIENCE, **options) -> RemoteExpert:
    return RemoteExpert(url, tokenizer, patience=patience, concurrency=16, **options)


def speak_all(expert, rows, count=3, temperature=1.0, stops=(0,), prompt=PROMPT, truncation=None):
    """Rows that are asked for at once, from a loop that is not the connections'."""
    found = speak_each(expert, rows, count, temperature, stops, prompt, truncation)
    return [_raised(row) for row in found]


def speak_each(expert, rows, count=3, temperature=1.0, stops=(0,), prompt=PROMPT, truncation=None):
    """The same, with what a row raised in its place."""

    async def all_rows():
        calls = (expert.speak(prompt, count, temperature, stops, 97 * row, truncation) for row in range(rows))
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(all_rows())


def _raised(row):
    if isinstance(row, Exception):
        raise row
    return row


def log_s(model, prefix, temperature=1.0):
    return forward_logps(model, torch.tensor([prefix]), temperature)[0, -1]


def check_rows(model, rows, temperature=1.0):
    for ids, logps in rows:
        due = [log_s(model, PROMPT + ids[:at], temperature)[index].item() for at, index in enumerate(ids)]
        assert logps == pytest.approx(due, abs=1e-4)


# The law


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_rows_follow_the_expert(temperature, url, model, other):
    request = MixedRequest([PROMPT], [math.inf], 3, (0,), temperature=temperature)
    tree = Tree(other, model, request)
    rows = speak_all(connect(url), 500, temperature=temperature)
    assert misfit([([tuple(ids) for ids, _ in rows], tree.expert())]) <= 1.0
    assert misfit([([tuple(ids) for ids, _ in rows], tree.policy())]) > 3.0
    check_rows(model, rows[:50], temperature)


def test_truncated_rows(url, model):
    rows = speak_all(connect(url), 200, count=1, truncation=Cut(top_k=2))
    best = log_s(model, PROMPT).topk(2)
    due = dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist()))
    assert misfit([([ids[0] for ids, _ in rows], due)]) <= 1.0
    assert all(logps[0] == pytest.approx(math.log(due[ids[0]]), abs=1e-4) for ids, logps in rows)


def test_the_same_row_says_the_same(url):
    expert = connect(url)
    assert speak_all(expert, 8) == speak_all(expert, 8)
    assert len({tuple(ids) for ids, _ in speak_all(expert, 8)}) > 1


def test_every_setting_is_explicit(url, stock):
    speak_all(connect(url), 2, temperature=0.7, truncation=Cut(0.9, 3, 0.1))
    body = [body for path, body in stock.calls if path == "/v1/completions"][-1]
    assert body.pop("seed") >= 0
    assert body == {
        "model": "expert",
        "prompt": PROMPT,
        "max_tokens": 3,
        "n": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stop_token_ids": [0],
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
    }


def points(rows, temperature, branch=True):
    """`rows` points behind a row of 3 tokens and one draft, the second of the two in question."""
    draft = torch.arange(rows) % 4
    tokens = torch.tensor([[*PROMPT, 1, 0]]).repeat(rows, 1)
    tokens[:, 4] = draft
    return Points(
        tokens,
        size=torch.full((rows,), 3),
        length=torch.full((rows,), 2),
        row=torch.arange(rows),
        step=torch.ones(rows, dtype=torch.long),
        branch=torch.full((rows,), branch),
        draft=draft,
        policy_logps=lambda part: None,
        temperature=temperature,
        rows=range(rows),
        row_seeds=[31 * row for row in range(rows)],
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_consultations(temperature, url, model):
    expert, s = connect(url), log_s(model, [*PROMPT, 1], temperature)
    spoken = expert.consult(points(300, temperature))
    assert misfit([(spoken.tokens.tolist(), dict(enumerate(s.exp().tolist())))]) <= 1.0
    torch.testing.assert_close(spoken.expert_logps.double(), s[spoken.tokens], atol=1e-4, rtol=0)
    assert spoken.logps is None and spoken.replaced is None and not expert.couples
    asked = points(8, temperature, branch=False)
    scored = expert.consult(asked)
    assert torch.equal(scored.tokens, asked.draft)
    torch.testing.assert_close(scored.expert_logps.double(), s[asked.draft], atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_equal_a_forward_pass(temperature, url, model):
    prompts, completions = [[1], PROMPT, [2, 2]], [[1, 2, 0], [], [3] * 62]  # the last fills the context
    scores = connect(url).score(prompts, completions, temperature)
    assert scores.shape == (3, 62)
    for row, (prompt, ids) in enumerate(zip(prompts, completions)):
        due = forward_logps(model, torch.tensor([prompt + ids]), temperature)[0, len(prompt) - 1 : -1]
        due = due.gather(1, torch.tensor(ids, dtype=torch.long).unsqueeze(1))[:, 0]
        torch.testing.assert_close(scores[row, : len(ids)].double(), due, atol=1e-4, rtol=0)
        assert scores[row, len(ids) :].isnan().all()


def test_ids_that_the_policy_does_not_have_are_drawn_again(model, other):
    """Padding ids with no weight to speak of; with more of it the expert is refused."""
    padded = make_peaked_model(seed=1, vocab_size=6)
    with torch.no_grad():
        padded.lm_head.weight[4:] = 0.0
    stock = StockServer(padded, LETTERS)
    with serving(stock) as url:
        expert = connect(url)
        with pytest.raises(WrongServer, match="drew the id [45] with the probability 0.* defines 4 ids"):
            speak_all(expert, 50)
        # unlikely ids that a draw of bad luck brings: the first draws are of another model than the rest
        answers = iter([{"tokens": ["token_id:1", "token_id:5", "token_id:1"], "token_logprobs": [-0.5, -8.0, -1.0]}])
        whole, stock.complete = stock.complete, lambda body: _answer(next(answers, None)) or whole(body)
        expert.draws = expert.redraws = 0
        stock.logits.clear()
        with torch.no_grad():
            padded.lm_head.weight.copy_(torch.nn.functional.pad(model.lm_head.weight, (0, 0, 0, 2)))
        ((ids, logps),) = speak_all(expert, 1, stops=())
        assert expert.redraws == 1 and len(ids) == 3 and ids[0] == 1 and max(ids) < 4 and logps[0] == -0.5
        seeds = [body["seed"] for path, body in stock.calls[-2:]]
        assert seeds[0] != seeds[1] and stock.calls[-1][1]["prompt"] == [*PROMPT, 1]


def _answer(logprobs):
    return logprobs and {"choices": [{"finish_reason": "length", "logprobs": logprobs}]}


# What a server must prove


def test_what_a_server_says_of_itself(url, stock):
    stock.entries.append({"id": "adapter", "root": "a", "parent": "expert"})
    expert = connect(f"{url}/")
    assert (expert.served_name, expert.name, expert.max_length) == ("expert", "hub/expert", 64)
    assert expert.stop_token_ids == [0] and expert.max_model_len == 64
    assert connect(url, served_name="adapter").served_name == "adapter"
    with pytest.raises(WrongServer, match="serves 'expert', 'adapter' and not 'other'"):
        connect(url, served_name="other")


def test_raw_log_probabilities_are_refused_unless_nobody_needs_others(url, stock):
    stock.processed = False
    with pytest.raises(WrongServer, match="the same at every temperature.*--logprobs-mode processed_logprobs"):
        connect(url)
    assert connect(url, needs_tempered=False).stop_token_ids == [0]


def test_a_server_that_cuts_is_refused(url, stock):
    stock.cut = 2
    with pytest.raises(WrongServer, match="draws tokens by other probabilities than its model's.*0.* nats"):
        connect(url)


@pytest.mark.parametrize("stops", [(), (0,), (0, 2)])
def test_stop_ids_are_found(stops, model):
    tokenizer = make_letter_tokenizer("abcd")
    tokenizer.add_special_tokens({"additional_special_tokens": ["c"]})
    with serving(StockServer(model, tokenizer, stops)) as url:
        assert connect(url, tokenizer).stop_token_ids == list(stops)


@pytest.mark.parametrize("letters", ["abdc", "abc", "abcé"])
def test_other_tokens_are_named(letters, url, stock):
    stock.tokenizer = make_letter_tokenizer(letters)
    with pytest.raises(WrongServer, match=r"are not the policy's: other tokens.*\('[cd]'\)"):
        connect(url)


def test_every_id_is_compared(model):
    """One of 700 differs, far from the special tokens."""
    letters = [chr(0x4E00 + index) for index in range(700)]
    ours, theirs = make_letter_tokenizer(letters), make_letter_tokenizer([*letters[:600], "x", *letters[601:]])
    with serving(StockServer(make_peaked_model(seed=1, vocab_size=700), theirs)) as url:
        with pytest.raises(WrongServer, match=f"at 1 ids, among them 600 .'{letters[600]}'"):
            connect(url, ours)


def test_keys(url, stock, tmp_path, monkeypatch):
    for name in ("MENTOR_TRL_API_KEY", "MENTOR_TRL_EXPERT_API_KEY", "MENTOR_TRL_EXPERT_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    stock.key = "two"
    with pytest.raises(KeyRefused, match="`expert_api_key_file`, or set MENTOR_TRL_EXPERT_API_KEY"):
        connect(url)
    (tmp_path / "key").write_text("two")
    assert connect(url, api_key_file=str(tmp_path / "key")).stop_token_ids == [0]
    monkeypatch.setenv("MENTOR_TRL_API_KEY", "two")
    assert connect(url).stop_token_ids == [0]
    monkeypatch.setenv("MENTOR_TRL_EXPERT_API_KEY", "three")
    with pytest.raises(KeyRefused):
        connect(url)
    monkeypatch.setenv("MENTOR_TRL_EXPERT_API_KEY", "two")
    monkeypatch.setenv("MENTOR_TRL_API_KEY", "one")
    assert connect(url).stop_token_ids == [0]
    with pytest.raises(SetupError, match="nowhere"):
        connect(url, api_key_file=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"/v1/models": PAGE}, "not JSON: <html>"),
        ({"/v1/models": {"data": []}}, "/v1/models with something"),
        ({"/v1/models": {"data": [{"id": "expert", "root": "r", "max_model_len": "64"}]}}, "a context of '64'"),
        ({"/detokenize": PAGE}, "not JSON: <html>"),
        ({"/detokenize": {"text": "a"}}, "no 'prompt'"),
        ({"/v1/completions": PAGE}, "not JSON: <html>"),
        ({"/v1/completions": {"choices": []}}, "/v1/completions with something"),
    ],
)
def test_servers_that_answer_something_else_are_named(raw, message, url, stock):
    stock.raw = raw
    with pytest.raises(WrongServer, match=message) as refused:
        connect(url)
    assert url in str(refused.value)


@pytest.mark.parametrize("status", [403, 404])
def test_servers_that_refuse_are_not_waited_for(status, url, stock):
    stock.script["/v1/models"] = [status]
    with pytest.raises(WrongServer, match="is not a vLLM server .*Start the expert with `vllm serve"):
        connect(url)
    assert len(stock.calls) == 1


# Trouble


def test_no_server():
    with pytest.raises(ServerError, match="No server answers at http://127.0.0.1:9 .*vllm serve MODEL"):
        connect("http://127.0.0.1:9", patience=Patience(recovery=0.0))


def test_a_slow_start_is_waited_for(url, stock):
    stock.script["/v1/models"] = [503, "drop", "hang"]
    assert connect(url, patience=IMPATIENCE).stop_token_ids == [0]


@pytest.mark.parametrize("trouble", [500, "drop", "hang", "restart"])
def test_rows_are_whole_whatever_happens(trouble, url, stock):
    """The same rows as without trouble: none is lost, doubled or drawn by other seeds."""
    expert = connect(url, patience=IMPATIENCE if trouble == "hang" else PATIENCE)
    due = speak_all(expert, 12)
    stock.script["/v1/completions"] = [200, 200, trouble, 200, trouble]
    before = len(stock.calls)
    assert speak_all(expert, 12) == due
    assert any(path == "/v1/models" for path, _ in stock.calls[before:])  # it was tested again


def test_another_model_after_a_restart_ends_the_batch(url, stock, other):
    """Rows that it answers before anybody asks who it is do not count."""
    expert = connect(url)
    due = speak_all(expert, 12)
    stock.then = other
    stock.script["/v1/completions"] = [200, 200, "restart"]
    found = speak_each(expert, 12)
    refused = [row for row in found if isinstance(row, WrongServer)]
    assert len(refused) >= 10 and all(row == before for row, before in zip(found, due) if row not in refused)
    with pytest.raises(WrongServer, match=r"came back as another server: both are called 'expert' .*had the.*has \["):
        raise refused[0]
    with pytest.raises(WrongServer, match="came back as another server"):
        speak_all(expert, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stock: stock.entries[0].update(id="new"), "the name was 'expert' and is 'new'"),
        (lambda stock: stock.entries[0].update(root="new"), "the model was 'hub/expert' and is 'new'"),
        (lambda stock: stock.entries[0].update(max_model_len=32), "the context was 64 and is 32"),
        (lambda stock: setattr(stock, "processed", False), "--logprobs-mode processed_logprobs"),
        (lambda stock: setattr(stock, "stops", ()), r"ended at the ids \[0\] and 'expert' ends at \[\]"),
        (lambda stock: setattr(stock, "tokenizer", make_letter_tokenizer("abdc")), "are not the policy's"),
        (lambda stock: setattr(stock, "key", "new"), "refuses the key"),
    ],
)
def test_other_options_after_a_restart_are_named(change, message, url, stock):
    expert = connect(url)
    stock.restart = lambda: change(stock)
    stock.script["/v1/completions"] = [200, "restart"]
    with pytest.raises(WrongServer, match=message):
        speak_all(expert, 8)


def test_a_server_that_was_silent_is_looked_at_again(url, stock, model, other, monkeypatch):
    """No request saw the restart."""
    monkeypatch.setattr(expert_server, "QUIET_SECONDS", 0.0)
    expert = connect(url)
    before = len(stock.calls)
    speak_all(expert, 1)
    assert not any(path == "/detokenize" for path, _ in stock.calls[before:])
    stock.model, stock.logits = other, {}
    with pytest.raises(WrongServer, match="came back as another server"):
        speak_all(expert, 4)


def test_nobody_waits_for_a_test_that_is_over(monkeypatch):
    server, shield = expert_server.ExpertServer(None, None), asyncio.shield

    def unfinished(test):
        assert not test.done()  # to wait for it would not let the loop go on
        return shield(test)

    async def tested():
        server._trusted, server._answered = True, expert_server.time.monotonic()
        late.append(asyncio.ensure_future(server.prove()))  # begins before the loop comes to `_tested`

    async def race():
        await server.prove()
        await late[0]

    late, server._test = [], tested
    monkeypatch.setattr(expert_server.asyncio, "shield", unfinished)
    asyncio.run(race())


def test_servers_that_keep_failing_are_given_up(url, stock):
    expert = connect(url)
    rows, completed = [3], stock.complete
    stock.complete = lambda body: completed(body) if body["max_tokens"] not in rows else _answer({}) | {"choices": 1}
    with pytest.raises(ServerError, match="something that cannot be used"):
        speak_all(expert, 2)
    stock.complete = lambda body: (
        completed(body) if body["max_tokens"] not in rows else {"choices": [{"finish_reason": "abort"}]}
    )
    with pytest.raises(Exhausted, match="failed 4 times at one request.*'abort'"):
        speak_all(expert, 2)


def test_a_dead_server_is_given_up(model):
    with serving(StockServer(model, LETTERS)) as url:
        expert = connect(url)
    with pytest.raises(ServerError, match="No server answers"):
        speak_all(expert, 12)


def test_refusals_are_not_repeated(url, stock):
    expert = connect(url)
    stock.script["/v1/completions"] = [400] * 3
    before = len(stock.calls)
    with pytest.raises(ServerError, match="refused with 400: .*scripted 400"):
        speak_all(expert, 1)
    assert len(stock.calls) == before + 1


TOKENS = {"tokens": ["token_id:1"] * 3, "token_logprobs": [-0.1] * 3}


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "NoneType"),
        ({}, "no 'tokens'"),
        (TOKENS | {"tokens": ["b", "b", "b"]}, "'b' where an id"),
        (TOKENS | {"tokens": ["token_id:-1"] * 3}, "where an id"),
        (TOKENS | {"tokens": ["token_id:1"] * 2}, "2 tokens and 3 log-probabilities"),
        ({"tokens": ["token_id:1"], "token_logprobs": [-0.1]}, "1 tokens where 3 were due"),
        (TOKENS | {"tokens": ["token_id:1", "token_id:0", "token_id:1"]}, "3 tokens where 2 were due"),
        (TOKENS | {"token_logprobs": [-0.1, None, -0.1]}, "None where a log-probability"),
        (TOKENS | {"token_logprobs": [-0.1, math.nan, -0.1]}, "nan where a log-probability"),
        (TOKENS | {"token_logprobs": [-0.1, 0.5, -0.1]}, "0.5 where a log-probability"),
    ],
)
def test_completions_of_another_shape_are_named(logprobs, message, url, stock):
    expert = connect(url)
    stock.raw = {"/v1/completions": {"choices": [{"finish_reason": "length", "logprobs": logprobs}]}}
    with pytest.raises(ServerError, match=message) as refused:
        speak_all(expert, 1)
    assert url in str(refused.value)


# Replicas


def test_rows_stay_with_their_server(model, other):
    stocks = [StockServer(model, LETTERS) for _ in range(2)]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(stock)) for stock in stocks]
        expert = connect(", ".join(urls))
        for stock in stocks:
            stock.calls.clear()
        rows = speak_all(expert, 40)
        seeds = [{body["seed"] for path, body in stock.calls if path == "/v1/completions"} for stock in stocks]
        assert [len(found) for found in seeds] == [20, 20]
        speak_all(expert, 40)
        again = [{body["seed"] for path, body in stock.calls if path == "/v1/completions"} for stock in stocks]
        assert again == seeds
        assert rows == speak_all(connect(urls[0]), 40)
        traffic = expert.traffic
        assert traffic["requests"] > 80 and traffic["received"] > traffic["requests"] < traffic["sent"]
        stocks[1].model, stocks[1].logits = other, {}
        with pytest.raises(WrongServer, match=f"{urls[1]} is not like {urls[0]}: both are called 'expert'"):
            connect(urls)
        with pytest.raises(SetupError, match="is given twice"):
            connect([urls[0], urls[0] + "/"])
