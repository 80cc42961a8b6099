"""Which executor trains and scores the clients of a model."""

from fedtri.adapters.model import AdaptedModel
from fedtri.errors import FedtriError
from fedtri.execution.executor import Executor
from fedtri.execution.fast.executor import FastExecutor
from fedtri.execution.fast.kept import Keeping
from fedtri.execution.fast.table import why_not
from fedtri.execution.recompute import Recomputation
from fedtri.execution.reference import ReferenceExecutor
from fedtri.tasks import Examples, LearningTask


def build(
    adapted: AdaptedModel,
    task: LearningTask,
    examples: Examples,
    *,
    name: str = "auto",
    group: int = 0,
    token_budget: int = 1536,
    gradient_checkpointing: bool = False,
    keeping: Keeping | None = None,
) -> Executor:
    """An executor of this model's clients.

    Args:
        name: "reference": plain code, one client at a time; "fast": clients share passes; "auto": the fast one where
            the model is in its table, else the plain code on clients side by side.
        group: How many clients are worked on side by side; 0: all. Alone, a client has all cores.
        token_budget: Tokens that go through the model at once.
        gradient_checkpointing: Whether layers keep no activations while they learn, and are run again.
        keeping: The examples whose states below the first adapted layer are kept, where the executor can.

    Raises:
        FedtriError: For "fast" and a model that is not in the table, and for gradient checkpointing of one whose layers
            cannot be run again.
    """
    reason = why_not(adapted)
    if name == "fast" and reason is not None:
        raise FedtriError(f'simulation.executor: "fast" cannot be, since {reason}; set it to "auto"')
    if name != "reference" and reason is None:
        return FastExecutor(adapted, task, examples, group, token_budget, gradient_checkpointing, keeping)
    recomputation = Recomputation(adapted.model) if gradient_checkpointing else None
    if name == "reference":
        return ReferenceExecutor(adapted, task, examples, token_budget, recomputation)
    beside = 1 if adapted.quantised or adapted.layout.backbone else group
    return ReferenceExecutor(
        adapted, task, examples, token_budget, recomputation, beside, f"{reason}, so clients share no pass"
    )
