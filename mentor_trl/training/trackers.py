"""Experiment trackers whose newest versions transformers' callbacks do not fit."""

import importlib.util
import os

from transformers import TrainingArguments
from transformers.integrations import SwanLabCallback
from transformers.trainer_callback import CallbackHandler


def fit_trackers(handler: CallbackHandler, args: TrainingArguments) -> None:
    """
    Let SwanLab report through its own callback where it brings one. transformers' asks for the active run before there
    is one, which newer versions refuse.
    """
    given = [callback for callback in handler.callbacks if isinstance(callback, SwanLabCallback)]
    if not given or importlib.util.find_spec("swanlab.integration.transformers") is None:
        return
    import swanlab

    if not hasattr(swanlab, "has_run"):
        return
    from swanlab.integration.transformers import SwanLabCallback as OwnCallback

    for callback in given:
        handler.remove_callback(callback)
    # The name of the project by transformers' convention, which SwanLab itself would read as JSON
    project = os.environ.pop("SWANLAB_PROJECT", None)
    handler.add_callback(OwnCallback(project=project, experiment_name=args.run_name))
