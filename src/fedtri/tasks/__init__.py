"""All tasks, by name. A task is one file; the keyword-only options of its function are the keys of [task_options]."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from fedtri.config.strict import checked_options
from fedtri.errors import FedtriError
from fedtri.tasks.base import Batch, Examples, LearningTask, Loaded, Recipe, Scores
from fedtri.tasks.causal_lm import causal_lm
from fedtri.tasks.image_classification import image_classification
from fedtri.tasks.image_text import image_text
from fedtri.tasks.text_classification import text_classification
from fedtri.tasks.token_classification import token_classification
from fedtri.tasks.vision_language import vision_language

__all__ = ["TASKS", "Batch", "Examples", "LearningTask", "Loaded", "Recipe", "Scores", "build"]

TASKS: dict[str, Callable[..., Recipe]] = {
    "text_classification": text_classification,
    "image_classification": image_classification,
    "image_text": image_text,
    "vision_language": vision_language,
    "token_classification": token_classification,
    "causal_lm": causal_lm,
}


def build(name: str, options: Mapping[str, Any] | None = None, columns: Mapping[str, str] | None = None) -> Recipe:
    """The task of this name, with its options. `columns` is checked only for roles that the task does not use.

    Raises FedtriError for an unknown task or option, or for such a role.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(TASKS)}"
        raise FedtriError(f"task: unknown task {name!r}; {hint}")
    recipe = TASKS[name](**checked_options(TASKS[name], options or {}, "task_options", name))
    if unused := [role for role in columns or {} if role not in recipe.roles]:
        raise FedtriError(
            f"columns.{unused[0]}: {name} has no use for it, expected some of {', '.join(recipe.roles)}; "
            "leave it out or choose another task"
        )
    return recipe
