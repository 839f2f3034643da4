import importlib.util
import json
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parent.parent / "examples"
ROW = {"question": "1 + 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"}


def load_example(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_expert_writes_the_rewarded_format(tmp_path):
    from mentor_trl.rewards import accuracy_reward, format_reward

    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (row,) = load_example("gsm8k/make_expert.py").load_rows(str(tmp_path / "rows.jsonl"), "main", None)
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    content = row["completion"][0]["content"]
    assert content == "<think>\n1 + 2 = 3\n</think>\nThe answer is \\boxed{3}."
    assert accuracy_reward([row["completion"]], ["3"]) == format_reward([row["completion"]]) == [1.0]


def test_make_expert_saves_a_model(tmp_path, monkeypatch, tiny_model_dir):
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps(ROW) + "\n"))
    expert = tmp_path / "expert"
    argv = ["make_expert.py", "--model_name_or_path", str(tiny_model_dir), "--output_dir", str(expert)]
    argv += ["--dataset_name", str(tmp_path / "rows.jsonl"), "--max_steps", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    load_example("gsm8k/make_expert.py").main()
    before, after = ((folder / "model.safetensors").read_bytes() for folder in (tiny_model_dir, expert))
    assert (expert / "tokenizer.json").exists() and before != after


def test_continuous_integration_runs_what_the_readme_names():
    root = EXAMPLES.parent
    section = (root / "README.md").read_text().split("## Tests")[1].split("```")[1]
    named, run = (
        [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("make ")]
        for text in (section, (root / ".ci" / "run").read_text())
    )
    assert named and named == run
