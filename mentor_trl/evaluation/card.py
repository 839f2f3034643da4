"""Writes results into the metadata of a model card, in a local folder or on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_trl.errors import SetupError


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard


def update_card(card: "ModelCard", entries: "list[EvalResult]", model_name: str) -> "ModelCard":
    """
    Put results into the `model-index` of a card. An entry of the same set and metric is replaced, others stay.

    Args:
        card ([`~huggingface_hub.ModelCard`]):
            Card, which is changed.
        entries (`list[EvalResult]`):
            Results, of [`~mentor_trl.evaluation.report.model_index`].
        model_name (`str`):
            Name of the model, where the card gives none.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card.
    """
    kept = [old for old in card.data.eval_results or [] if not any(_same_place(old, new) for new in entries)]
    card.data.eval_results = kept + entries
    card.data.model_name = card.data.model_name or model_name
    return card


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
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder).expanduser() / "README.md"
    if not path.parent.is_dir():
        raise SetupError(f"The folder {path.parent} (`model_card`) does not exist")
    if path.exists():
        card = ModelCard.load(path, ignore_metadata_errors=False)
    else:
        data = ModelCardData(library_name="transformers", tags=["mentor-trl"])
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {model_name}\n")
    update_card(card, entries, model_name).save(path)
    return path


def push_card(repo_id: str, entries: "list[EvalResult]", **kwargs: Any) -> str:
    """
    Write results into the card of a model on the Hub.

    Args:
        repo_id (`str`):
            Model on the Hub, which must exist.
        entries (`list[EvalResult]`):
            Results.
        **kwargs:
            Passed to [`~huggingface_hub.metadata_update`], such as `token` or `create_pr`.

    Returns:
        `str`: address of the commit.
    """
    from huggingface_hub import metadata_update
    from huggingface_hub.repocard_data import eval_results_to_model_index

    metadata = {"model-index": eval_results_to_model_index(repo_id.rpartition("/")[2], entries)}
    kwargs = {"overwrite": True, "commit_message": "Results of mentor-trl eval", **kwargs}
    return metadata_update(repo_id, metadata, **kwargs)
