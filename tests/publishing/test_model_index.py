from pathlib import Path

import httpx
import pytest
from evaluation.test_summary import make_results
from huggingface_hub import ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError

from mentor_trl.errors import SetupError
from mentor_trl.publishing.model_index import model_index, push_card, write_card


def test_model_index():
    entries = model_index(make_results())
    assert [(e.dataset_name, e.metric_name) for e in entries] == [
        ("AIME24", "avg@32"),
        ("AIME24", "pass@32"),
        ("MATH500", "pass@1"),
    ]
    assert entries[1].metric_value == 66.67 and entries[1].dataset_type == "org/aime24"


def test_model_index_of_a_trial_run():
    with pytest.raises(SetupError, match="first 20 problems"):
        model_index(make_results(limit=20))


def test_card_in_a_folder(tmp_path):
    path = write_card(tmp_path, model_index(make_results()), "model")
    write_card(tmp_path, model_index(make_results(aime24=32)), "model")  # again: replaced, the rest stays
    card = ModelCard.load(path)
    found = {(e.dataset_name, e.metric_name): e.metric_value for e in card.data.eval_results}
    assert len(card.data.eval_results) == len(found) == 3
    assert found["MATH500", "pass@1"] == 66.67
    assert card.data.model_name == "model" and "# model" in card.text


def test_card_keeps_its_text_and_other_results(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nmodel-index:\n- name: mine\n  results:\n  - task: {type: text-generation}\n"
        "    dataset: {name: Other, type: org/other}\n    metrics: [{type: accuracy, value: 5}]\n"
        "---\n\n# Mine\n\nText.\n"
    )
    card = ModelCard.load(write_card(tmp_path, model_index(make_results()), "model"))
    assert "Text." in card.text and card.data.license == "mit" and card.data.model_name == "mine"
    assert {e.dataset_name for e in card.data.eval_results} == {"Other", "AIME24", "MATH500"}


def test_card_needs_a_folder(tmp_path):
    with pytest.raises(SetupError, match="does not exist"):
        write_card(tmp_path / "no", model_index(make_results()), "model")


def test_card_shows_its_results_once(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nText.\n\n## Citations\n\nMe.\n")
    write_card(tmp_path, model_index(make_results(aime24=32)), "model")
    text = ModelCard.load(write_card(tmp_path, model_index(make_results(math500=1)), "model")).text
    assert text.count("## Results") == 1
    # The first results are still there, and of the metadata, so that table and `model-index` agree
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[1:] == [
        "| AIME24 | avg@32 | 34.38 | 6.49 to 79.80 | 32 | 0.6 |",
        "| AIME24 | pass@32 | 66.67 | 20.77 to 93.85 | 32 | 0.6 |",
        "| MATH500 | pass@1 | 66.67 | 20.77 to 93.85 | 1 | 0.6 |",
    ]
    assert text.index("Text.") < text.index("## Results") < text.index("## Citations") < text.index("Me.")


class Stored:
    """The card of a model on the Hub."""

    def __init__(self, monkeypatch, folder, text: str | None):
        self.folder, self.text, self.calls = folder, text, []
        monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", self.download)
        monkeypatch.setattr("huggingface_hub.repocard.upload_file", self.upload)
        monkeypatch.setattr(ModelCard, "validate", lambda card, repo_type: None)

    def download(self, repo_id, filename, **kwargs):
        if self.text is None:
            response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
            raise RemoteEntryNotFoundError("no such file", response=response)
        (self.folder / filename).write_text(self.text)
        return str(self.folder / filename)

    def upload(self, path_or_fileobj, **kwargs):
        self.text = Path(path_or_fileobj).read_text()
        self.calls.append(kwargs)
        return "url"


@pytest.mark.parametrize("text", [None, "---\nlicense: mit\n---\n\n# Mine\n"])
def test_push(monkeypatch, tmp_path, text):
    stored = Stored(monkeypatch, tmp_path, text)
    assert push_card("org/model", model_index(make_results()), create_pr=True) == "url"
    (call,) = stored.calls
    assert (call["repo_id"], call["path_in_repo"], call["create_pr"]) == ("org/model", "README.md", True)
    card = ModelCard(stored.text)
    assert [entry.metric_value for entry in card.data.eval_results] == [
        entry.metric_value for entry in model_index(make_results())
    ]
    assert card.data.model_name == "model" and "| MATH500 | pass@1 | 66.67 |" in card.text
    assert "# model" in card.text if text is None else "# Mine" in card.text and card.data.license == "mit"


def test_push_offline():
    with pytest.raises(SetupError, match="cannot be pushed to the card of 'org/model'.*hf auth login"):
        push_card("org/model", model_index(make_results()))
