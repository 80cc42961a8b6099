"""Gradient checkpointing by transformers: a layer keeps no activations, and is run again in the backward pass."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedtri.errors import FedtriError


class Recomputation:
    """The layers of a model that keep no activations while it learns."""

    def __init__(self, model: nn.Module) -> None:
        """Prepare the model. Raises FedtriError where it has no layers that transformers can run again."""
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not self._layers:
            raise FedtriError(
                f"model_options.gradient_checkpointing: {type(model).__name__} has no layers that can be run again; "
                "leave it out"
            )
        # newer transformers call it by the first name, and warn of the second
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
        for layer in self._layers:  # `training` switches a layer's own dropout on too, and dropout is off for good
            for name, value in vars(layer).items():
                if "drop" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)

    def learning(self, learns: bool) -> None:
        """Whether gradients are about to be asked for: transformers goes by the layers' own training mode."""
        for layer in self._layers:
            layer.training = learns
