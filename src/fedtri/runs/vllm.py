"""Whether a serving engine will take an exported adapter: what vLLM accepts of PEFT's format.

vLLM takes plain LoRA on linear layers of causal models: no DoRA, no bias, no whole layers beside it (modules_to_save),
nothing but lora_A and lora_B in the file, and a rank up to the largest it is started for. Elsewhere it fails when the
adapter is loaded, or serves the base model.
"""

import json
from pathlib import Path

from safetensors import safe_open

from fedtri.errors import FedtriError

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""


def check_vllm(folder: Path) -> str:
    """The command that serves this adapter. Raises FedtriError where vLLM would not take it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
    }
    for key, value in expected.items():
        if config.get(key) != value:
            _refuse(f"{key} = {json.dumps(value)}", json.dumps(config.get(key)))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    if others := [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        _refuse("lora_A and lora_B alone", others[0])
    rank = config["r"]
    if rank > VLLM_RANKS[-1]:
        _refuse(f"a rank up to {VLLM_RANKS[-1]}", str(rank))
    largest = next(allowed for allowed in VLLM_RANKS if rank <= allowed)
    base = config["base_model_name_or_path"]
    return f"vllm serve {base} --enable-lora --max-lora-rank {largest} --lora-modules {folder.name}={folder}"


def _refuse(expected: str, got: str) -> None:
    raise FedtriError(f"--for vllm: vLLM takes {expected}, this adapter has {got}; write the whole model with --merge")
