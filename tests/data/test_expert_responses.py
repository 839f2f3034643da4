import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from helpers import make_tiny_tokenizer
from mentor_trl.cli import data as script
from mentor_trl.data import DataError
from mentor_trl.data.preparation import TrajectoryArguments, prepare_trajectories
from mentor_trl.data.preparation.engines import Response, choose_engine, server_engine, transformers_engine
from mentor_trl.data.preparation.settings import OutputArguments


class ScriptedEngine:
    """Answers by the seed, which is the index of the row; dies at the batch of a row."""

    def __init__(self, answers: dict[int, list[Response]], dies_at: int | None = None):
        self.answers, self.dies_at, self.asked, self.prompts = answers, dies_at, [], []

    def __call__(self, prompt_ids, seeds):
        if self.dies_at in seeds:
            raise KeyboardInterrupt
        self.asked += seeds
        self.prompts += prompt_ids
        return [self.answers[seed] for seed in seeds]


def reply(answer: str, finished: bool = True) -> Response:
    return Response(f"<think>t</think>\\boxed{{{answer}}}", finished)


ANSWERS = {
    0: [reply("9"), reply("0")],
    1: [reply("1", finished=False), reply("9")],
    2: [reply("2"), reply("2")],
    3: [Response(" ", True), reply("3")],
}


def source(tmp_path, **columns) -> str:
    rows = {"prompt": [[{"role": "user", "content": f"q{i}"}] for i in range(4)], "solution": list("0123"), **columns}
    DatasetDict({"train": Dataset.from_dict(rows), "test": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "rows")
    return str(tmp_path / "rows")


@pytest.fixture
def draw(tmp_path, tiny_expert_dir):
    output = OutputArguments(output_dir=str(tmp_path / "out"))

    def prepare(engine, name=None, **options):
        options = {"num": 2, "seed": 0, "batch_size": 1, "expert": str(tiny_expert_dir), **options}
        args = TrajectoryArguments(dataset_name=name or source(tmp_path), **options)
        return prepare_trajectories(args, output, engine)

    return prepare


def test_the_first_finished_response_or_the_first_correct_one(draw):
    splits, report, _ = draw(ScriptedEngine(ANSWERS))
    texts = splits["train"]["trajectory"]
    assert list(texts) == [ANSWERS[0][0].text, ANSWERS[1][1].text, ANSWERS[2][0].text, ANSWERS[3][1].text]
    assert "trajectory" not in splits["test"].column_names
    assert dict(report.facts)["responses finished"] == "6 of 8"
    splits, report, _ = draw(ScriptedEngine(ANSWERS), keep_correct=True, all_trajectories=True)
    assert list(splits["train"]["trajectory"]) == [ANSWERS[0][1].text, None, ANSWERS[2][0].text, ANSWERS[3][1].text]
    assert [len(row) for row in splits["train"]["trajectories"]] == [1, 0, 2, 1]
    facts = dict(report.facts)
    assert facts["prompts with a response finished and correct"] == "3 of 4"
    assert facts["rows without (null)"] == "1"


def test_a_run_that_died_goes_on(draw, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        draw(ScriptedEngine(ANSWERS, dies_at=2))
    stored = tmp_path / "out.partial" / "responses.jsonl"
    with stored.open("a") as file:
        file.write('{"index": 2, "respon')  # torn while it was written
    again = ScriptedEngine(ANSWERS)
    splits, report, store = draw(again)
    assert again.asked == [2, 3]
    assert dict(report.facts)["responses of an earlier run"] == "2 of 4 prompts"
    assert list(splits["train"]["trajectory"]) == list(draw(ScriptedEngine({}))[0]["train"]["trajectory"])
    store.remove()
    assert not stored.parent.exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"index": 0}', "null"])
def test_a_damaged_store_is_named(draw, tmp_path, line):
    with pytest.raises(KeyboardInterrupt):
        draw(ScriptedEngine(ANSWERS, dies_at=1))
    with (tmp_path / "out.partial" / "responses.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="responses.jsonl is damaged .*remove the folder to begin anew"):
        draw(ScriptedEngine(ANSWERS))


def test_responses_of_other_settings_are_refused(draw):
    with pytest.raises(KeyboardInterrupt):
        draw(ScriptedEngine(ANSWERS, dies_at=1))
    with pytest.raises(DataError, match=r"temperature \(0.6 then, 0.7 now\)"):
        draw(ScriptedEngine(ANSWERS), temperature=0.7)


def test_rows_that_have_a_trajectory_keep_it(draw, tmp_path):
    name = source(tmp_path, trajectory=["mine", None, None, "too"])
    engine = ScriptedEngine(ANSWERS)
    splits, _, _ = draw(engine, name)
    assert engine.asked == [1, 2] and list(splits["train"]["trajectory"])[::3] == ["mine", "too"]


def test_prompts_are_rendered_by_the_chat_template(draw):
    engine = ScriptedEngine(ANSWERS)
    draw(engine)
    expected = make_tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "q0"}], add_generation_prompt=True, return_dict=True
    )
    assert engine.prompts[0] == expected["input_ids"]


def test_the_opening_tag_of_a_template_is_put_back(draw, tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    engine = ScriptedEngine({i: [Response("a</think>b", True)] for i in range(4)})
    splits, _, _ = draw(engine, num=1, tokenizer=str(tmp_path / "tokenizer"))
    assert set(splits["train"]["trajectory"]) == {"<think>\na</think>b"}


def test_transformers_engine_repeats_itself_and_stops_at_the_end_of_text(tiny_expert_dir):
    tokenizer = make_tiny_tokenizer()
    prompts = [tokenizer("<user>1+1<bot>")["input_ids"], tokenizer("<user>2<bot>")["input_ids"]]

    def make(**options):
        return transformers_engine(TrajectoryArguments(expert=str(tiny_expert_dir), **options), tokenizer)

    engine = make(num=3, temperature=1.0, max_new_tokens=40)
    first, second = engine(prompts, [7, 8]), engine(prompts, [7, 8])
    assert first == second and [len(row) for row in first] == [3, 3]
    assert first != engine(prompts, [9, 8])
    responses = [response for row in first for response in row]
    assert {response.finished for response in responses} == {True, False}
    assert all(len(r.text) <= 40 - r.finished for r in responses)
    # Padding does not change the likeliest tokens.
    greedy = make(temperature=0.0, max_new_tokens=10)
    assert greedy(prompts, [0, 1]) == [greedy([ids], [0])[0] for ids in prompts]
    with pytest.raises(DataError, match="`max_new_tokens`"):
        make(max_new_tokens=4000)(prompts, [0, 1])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"temperature": 0.0, "num": 2}, "all 2 responses are equal"),
        ({"top_p": 0.0}, "`top_p` 0.0"),
        ({"num": 0}, "`num` is 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
    ],
)
def test_sampling_mistakes_are_named(draw, options, part):
    with pytest.raises(DataError, match=part):
        draw(ScriptedEngine(ANSWERS), **options)


def test_choice_of_the_engine(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_engine("auto", None) == "transformers" and choose_engine("auto", "http://h") == "server"
    for engine, url, part in [("server", None, "`server_url`"), ("vllm", None, "pip"), ("vllm", "http://h", "leave")]:
        with pytest.raises(DataError, match=part):
            choose_engine(engine, url)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_engine("auto", None) == "vllm"


@pytest.mark.parametrize(
    ("columns", "options", "part"),
    [
        ({}, {"expert": None}, "`expert`"),
        ({}, {"dataset_split": "dev"}, "no split 'dev'"),
        ({}, {"batch_size": 0}, "`batch_size` is 0"),
        ({"trajectory": ["a"] * 4}, {}, "has a trajectory already"),
    ],
)
def test_mistakes_are_named(draw, tmp_path, columns, options, part):
    with pytest.raises(DataError, match=part):
        draw(ScriptedEngine(ANSWERS), source(tmp_path, **columns), **options)


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, self.server.models)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.bodies.append(body)
            if self.server.failures:
                self.server.failures -= 1
                return self.reply(503, {"error": "busy"})
            choice = {"index": 1, "text": "second", "finish_reason": "length"}
            first = {"index": 0, "text": f"prompt {body['prompt'][0]}", "finish_reason": "stop"}
            self.reply(200, {"choices": [choice, first]})

        def reply(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.bodies, server.failures, server.models = [], 0, {"data": [{"id": "expert"}]}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_server_engine(server):
    url = f"http://127.0.0.1:{server.server_port}"
    args = TrajectoryArguments(expert="expert", num=2, server_url=url + "/v1")
    server.failures = 1
    drawn = server_engine(args, pause=0.0)([[5, 6], [7]], [3, 4])
    assert drawn == [[Response(f"prompt {i}", True), Response("second", False)] for i in (5, 7)]
    assert {(body["seed"], *body["prompt"]) for body in server.bodies} == {(3, 5, 6), (4, 7)}
    assert len(server.bodies) == 3 and all(body["n"] == 2 and body["top_k"] == -1 for body in server.bodies)
    server.failures = 9
    with pytest.raises(DataError, match="503.*2 times"):
        server_engine(args, attempts=2, pause=0.0)([[5]], [3])
    with pytest.raises(DataError, match="serves expert, not other"):
        server_engine(TrajectoryArguments(expert="other", server_url=url))
    server.models = "<html>hello</html>"
    with pytest.raises(DataError, match="no list of `data`: '<html>hello"):
        server_engine(args)


def test_the_command_writes_the_column_and_removes_the_store(tmp_path, tiny_expert_dir):
    argv = ["trajectories", "--dataset_name", source(tmp_path), "--expert", str(tiny_expert_dir)]
    argv += ["--max_new_tokens", "5", "--engine", "transformers", "--output_dir", str(tmp_path / "out")]
    assert script.run(argv) == 0
    dataset = load_dataset(str(tmp_path / "out"))
    assert dataset["train"].features["trajectory"].dtype == "string" and len(dataset["train"]) == 4
    assert dataset["test"].num_rows == 4 and not (tmp_path / "out.partial").exists()
