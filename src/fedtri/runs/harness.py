"""EleutherAI's lm-evaluation-harness on a model that was written to a folder."""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fedtri.errors import FedtriError

Scores = dict[str, dict[str, float]]
SWITCH = "HF_ALLOW_CODE_EVAL"
"""The harness's own switch for tasks that run what a model writes."""


def evaluate(
    model: Path, tasks: Sequence[str], *, limit: int | None = None, include: Path | None = None, device: str = "cpu"
) -> Scores:
    """Each task's metrics, by task and "metric,filter" as the harness names them.

    Args:
        limit: At most so many examples a task.
        include: A folder with further tasks in the harness's own YAML format.

    Raises:
        FedtriError: Without the extra [eval], for an unknown task, and for one that runs generated code where
            HF_ALLOW_CODE_EVAL is not 1.
    """
    try:
        lm_eval: Any = import_module("lm_eval")
        lm_eval_tasks: Any = import_module("lm_eval.tasks")
    except ImportError:
        raise FedtriError("--tasks: needs lm-evaluation-harness; run: pip install 'fedtri[eval]'") from None
    manager = lm_eval_tasks.TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise FedtriError(f"--tasks: the harness has no task {unknown[0]!r}; see `lm_eval ls tasks`, or give --include")
    allowed = os.environ.get(SWITCH) == "1"
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model)},
            tasks=list(tasks),
            limit=limit,
            device=device,
            task_manager=manager,
            confirm_run_unsafe_code=allowed,
        )
    except (ValueError, OSError) as error:
        if not allowed and "unsafe" in str(error).lower():
            raise FedtriError(
                f"--tasks: {', '.join(tasks)} would run code that the model writes; in a machine made for that, "
                f"set {SWITCH}=1"
            ) from None
        raise FedtriError(f"--tasks: the harness failed: {str(error).splitlines()[0]}; see its documentation") from None
    results: dict[str, dict[str, object]] = found["results"]
    return {
        task: {
            name: float(value)
            for name, value in scores.items()
            if "," in name and "stderr" not in name and isinstance(value, float | int)
        }
        for task, scores in results.items()
    }
