"""Writes results into a model card, as `model-index` and as a table, in a local folder or on the Hub."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_trl.errors import SetupError
from mentor_trl.evaluation.summary import to_table


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard


# What lies between is replaced when there are new results
_START, _END = "<!-- mentor-trl eval: results -->", "<!-- end of results -->"


def update_card(card: "ModelCard", entries: "list[EvalResult]", model_name: str) -> "ModelCard":
    """
    Put results into a card: its `model-index`, and a table below the text. An entry of the same set and metric is
    replaced, others stay.

    Args:
        card ([`~huggingface_hub.ModelCard`]):
            Card, which is changed.
        entries (`list[EvalResult]`):
            Results, of [`~mentor_trl.evaluation.summary.model_index`].
        model_name (`str`):
            Name of the model, where the card gives none.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card.
    """
    kept = [old for old in card.data.eval_results or [] if not any(_same_place(old, new) for new in entries)]
    card.data.eval_results = kept + entries
    card.data.model_name = card.data.model_name or model_name
    section = results_section(card.data.eval_results)
    pattern = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)
    if pattern.search(card.text):
        card.text = pattern.sub(lambda _: section, card.text, count=1)
    else:
        before, heading, after = card.text.partition("\n## Citations\n")
        card.text = f"{before.rstrip()}\n\n{section}\n{heading}{after}"
    return card


def results_section(entries: "list[EvalResult]") -> str:
    """
    The section of a card that shows its results.

    Args:
        entries (`list[EvalResult]`):
            Results; only those of [`~mentor_trl.evaluation.summary.model_index`] are shown.
    """
    rows = [["set", "metric", "%", "95% interval", "samples a problem", "temperature"]]
    for entry in entries:
        details = entry.metric_args or {}
        if "confidence_interval" in details:
            low, high = details["confidence_interval"]
            rows.append(
                [
                    entry.dataset_name,
                    entry.metric_name or entry.metric_type,
                    f"{entry.metric_value:.2f}",
                    f"{low:.2f} to {high:.2f}",
                    f"{details['num_samples']}",
                    f"{details['temperature']:g}",
                ]
            )
    note = "Measured by `mentor-trl eval`; the intervals are over the problems of a set."
    return "\n\n".join([_START, "## Results", note, to_table(rows), _END])


def _same_place(one: "EvalResult", other: "EvalResult") -> bool:
    # Not `EvalResult.is_equal_except_value`: its identity includes the metric's arguments, which hold the interval.
    names = ("task_type", "dataset_type", "dataset_config", "dataset_split", "metric_type", "metric_name")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def write_card(folder: str | Path, entries: "list[EvalResult]", model_name: str) -> Path:
    """
    Write results into the `README.md` of a folder, which is made if there is none.

    Args:
        folder (`str` or `Path`):
            Folder of the model.
        entries (`list[EvalResult]`):
            Results.
        model_name (`str`):
            Name of the model.
    """
    from huggingface_hub import ModelCard

    path = Path(folder).expanduser() / "README.md"
    if not path.parent.is_dir():
        raise SetupError(f"The folder {path.parent} (`model_card`) does not exist")
    card = ModelCard.load(path, ignore_metadata_errors=False) if path.exists() else _new_card(model_name)
    update_card(card, entries, model_name).save(path)
    return path


def _new_card(model_name: str) -> "ModelCard":
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="transformers", tags=["mentor-trl"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {model_name}\n")


def push_card(repo_id: str, entries: "list[EvalResult]", **kwargs: Any) -> str:
    """
    Write results into the card of a model on the Hub.

    Args:
        repo_id (`str`):
            Model on the Hub, which must exist.
        entries (`list[EvalResult]`):
            Results.
        **kwargs:
            Passed to [`~huggingface_hub.ModelCard.push_to_hub`], such as `token` or `create_pr`.

    Returns:
        `str`: address of the commit.

    Raises:
        [`SetupError`]: if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    from mentor_trl.publishing.hub import HUB_ERRORS, one_line

    name = repo_id.rpartition("/")[2]
    kwargs = {"commit_message": "Results of mentor-trl eval", **kwargs}
    try:
        try:
            card = ModelCard.load(repo_id, token=kwargs.get("token"))
        except RemoteEntryNotFoundError:
            card = _new_card(name)
        return str(update_card(card, entries, name).push_to_hub(repo_id, **kwargs))
    except (*HUB_ERRORS, LocalEntryNotFoundError) as error:
        raise SetupError(
            f"The results cannot be pushed to the card of {repo_id!r}: {one_line(error)}; log in (`hf auth login`), "
            "check the name and the connection. The results that were written are not lost"
        ) from error
