"""Loads models and processors from a folder or a hub name. An incomplete checkpoint is refused in one line."""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedtri.errors import FedtriError
from fedtri.models.loading import Weights, locate

ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def load_model(
    auto: Any,
    model: str,
    what: str,
    weights: Weights,
    head: Callable[[nn.Module], list[str]],
    **more: Any,
) -> tuple[nn.Module, frozenset[str]]:
    """The checkpoint as the class `auto` loads it, and the names of the parameters that the checkpoint did not have.

    Args:
        auto: A class with `from_pretrained`, such as AutoModelForCausalLM.
        model: As in a configuration: the embedded model, a folder, or a hub name.
        what: What the model should be ("a text classifier"), for the error message.
        weights: How the frozen weights are stored.
        head: (model) to the layers that the checkpoint may lack. If it lacks anything else, that is an error.
        more: Passed on to `from_pretrained`.

    Raises:
        FedtriError: If it cannot be loaded, or lacks weights of its backbone.
    """
    where = locate(model)
    try:
        with quiet():
            quantised = _quantisation(auto, where, weights, head) if weights.quantization != "none" else {}
            loaded, info = auto.from_pretrained(
                where, dtype=weights.dtype, output_loading_info=True, **quantised, **more
            )
    except ERRORS as error:
        _refuse(model, what, error)
    fresh = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    _check_whole(model, head(loaded), fresh)
    return loaded, frozenset(fresh)


def load_config(model: str, what: str) -> PretrainedConfig:
    """The checkpoint's configuration. Raises FedtriError if there is none."""
    try:
        with quiet():
            return AutoConfig.from_pretrained(locate(model))
    except ERRORS as error:
        _refuse(model, what, error)


def skeleton(auto: Any, what: str, config: PretrainedConfig) -> nn.Module:
    """The model without weights as the class `auto` makes it. Raises FedtriError if it has none of this type."""
    try:
        return auto.from_config(config)
    except ValueError as error:
        _refuse(str(config.name_or_path), what, error)


def _quantisation(auto: Any, where: str, weights: Weights, head: Callable[[nn.Module], list[str]]) -> dict[str, Any]:
    """The arguments with which `from_pretrained` quantises the backbone's linear layers, but not the head's.

    Raises FedtriError if bitsandbytes is missing.
    """
    if find_spec("bitsandbytes") is None:
        raise FedtriError(
            f"model_options.quantization: {weights.quantization} needs bitsandbytes, which is not installed here; "
            "run: pip install 'fedtri[quantized]', or set it to none"
        )
    # at every product it reports that it casts the input
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with torch.device("meta"):
        layers = head(auto.from_config(AutoConfig.from_pretrained(where)))
    config = BitsAndBytesConfig(
        load_in_8bit=weights.quantization == "8bit",
        load_in_4bit=weights.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=layers or None,
    )
    return {"quantization_config": config, "device_map": {"": weights.device}}


def load_processor(auto: Any, model: str, what: str, **more: Any) -> Any:
    """The tokenizer or processor beside the weights. Raises FedtriError if there is none."""
    try:
        with quiet():
            return auto.from_pretrained(locate(model), **more)
    except ERRORS as error:
        _refuse(model, what, error)


def load_tokenizer(model: str, loaded: nn.Module, what: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token and a length limit. Sets the padding token in the model's configuration too.

    Raises FedtriError if the tokenizer is missing or has no vocabulary.
    """
    tokenizer = load_processor(AutoTokenizer, model, what)
    # transformers makes an empty vocabulary if there is none; a run must not start with it
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FedtriError(f"model: {model} has no vocabulary, expected a tokenizer beside the weights; save one there")
    config: Any = loaded.config
    shape = config.get_text_config()
    if tokenizer.model_max_length > 1e6:  # no limit: take the model's positions, of which some models reserve two
        tokenizer.model_max_length = getattr(shape, "max_position_embeddings", 10**6) - 2
    if shape.pad_token_id is None and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if shape.pad_token_id is None:
        shape.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the padding token, or of the end-of-sequence token if there is none."""
    pad = tokenizer.convert_tokens_to_ids(str(tokenizer.pad_token or tokenizer.eos_token))
    assert isinstance(pad, int)
    return pad


def _refuse(model: str, what: str, error: Exception) -> NoReturn:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    raise FedtriError(
        f"model: {model} cannot be loaded as {what}: {reason}; expected a folder or hub name with "
        "config.json, weights and tokenizer (or image processor)"
    ) from None


def _check_whole(model: str, head: Collection[str], fresh: Collection[str]) -> None:
    """Refuse a checkpoint that lacks weights outside the head: transformers would draw them at random."""
    if lacking := sorted(name for name in fresh if name.rpartition(".")[0] not in head):
        others = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise FedtriError(
            f"model: {model} has no weights for {lacking[0]}{others}, expected all of the backbone's; "
            "choose a complete checkpoint"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading report: a fresh head is expected here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
