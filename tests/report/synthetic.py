"""Run directories as a real run would leave them, made of random numbers: any size, in milliseconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fedtri.methods import METHODS
from fedtri.storage import run_directory

LABELS = ["numpy", "python", "scikit-learn", "scipy", "torch", "transformers"]
COST = {"local": 0, "fedit": 73_728, "flora_na": 73_728, "ce_lora": 768, "ffa_lora": 36_864}
SKILL = {"local": 0.70, "fedit": 0.78, "flora_na": 0.80, "ce_lora": 0.79, "ffa_lora": 0.75}


def write(
    folder: Path,
    method: str = "ce_lora",
    *,
    clients: int = 8,
    rounds: int = 10,
    seed: int = 0,
    finished: bool = True,
    **config: Any,
) -> Path:
    """A run directory; ce_lora has similarity matrices, flora_na and fedit have ρ."""
    rng = np.random.default_rng([seed, len(method)])
    names = [f"client-{i:02}" for i in range(clients)]
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "method": method, "model": "minilm", "data": "docstrings", "partition": "dirichlet:0.3", "clients": clients,
        "rounds": rounds, "steps": 15, "batch_size": 16, "learning_rate": 5e-3, "rank": 8, "lora_alpha": 16.0,
        "head": "personal", "seed": seed, "evaluate": True, "out": str(folder), "wire": {"up": "float32"},
    } | config  # fmt: skip
    (folder / "config.toml").write_text(tomli_w.dumps(settings))
    (folder / "method.json").write_text(json.dumps(METHODS[method]().described()))
    machine = {"layout": run_directory.LAYOUT, "device": "cpu", "processor": "Test", "seed": seed}
    (folder / "environment.json").write_text(json.dumps(machine))
    level = np.clip(SKILL[method] + rng.normal(0, 0.1, clients), 0.05, 0.98)
    lines = [_line(rng, method, names, level, r, rounds) for r in range(1, rounds + 1)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "summary.json").write_text(json.dumps(_summary(rng, method, names, lines), indent=2))
    return folder


def _line(
    rng: np.random.Generator, method: str, names: list[str], level: np.ndarray, round: int, rounds: int
) -> dict[str, Any]:
    grown = level * (1 - 0.6 * np.exp(-4 * round / rounds))
    payload = 4 * COST[method]
    line: dict[str, Any] = {
        "round": round,
        "clients": names,
        "loss": float(2 * np.exp(-3 * round / rounds) + 0.3),
        "accuracy": _spread(names, grown + rng.normal(0, 0.01, len(names))),
        "accuracy_local": _spread(names, grown - 0.02 + rng.normal(0, 0.02, len(names))),
        "test_loss": _spread(names, 1.5 - grown, lowest_is_best=True),
        "test_loss_local": _spread(names, 1.55 - grown, lowest_is_best=True),
        "bytes": {way: dict.fromkeys(names, payload + 190) for way in ("up", "down")},
        "seconds": {"sketch": 0.0, "train": 9 + rng.random(), "aggregate": 0.05, "evaluate": 3 + rng.random()},
    }
    if method == "ce_lora":
        if round == 1:
            line["bytes"]["sketch"] = dict.fromkeys(names, 21_000)
            line["seconds"]["sketch"] = 6.2
        same = np.abs(np.subtract.outer(level, level))
        data, model = np.exp(-same / 0.1), 1 - same * round / rounds
        weights = (data + model) / (data + model).sum(1, keepdims=True)
        matrices = {"data": data, "model": model, "weights": weights}
        line["similarity"] = {"clients": names} | {k: m.round(4).tolist() for k, m in matrices.items()}
    if method in ("fedit", "flora_na"):
        layers = [f"encoder.layer.{i}.attention.self.{part}" for i in range(6) for part in ("query", "value")]
        exact = {layer: float(rng.random() * (0.4 if method == "fedit" else 0.2)) for layer in layers}
        line["rho"] = {"exact": exact, "best_rank_r": {layer: value / 3 for layer, value in exact.items()}}
    return line


def _spread(names: list[str], values: np.ndarray, lowest_is_best: bool = False) -> dict[str, Any]:
    ends = (float(values.max()), float(values.min())) if lowest_is_best else (float(values.min()), float(values.max()))
    by_client = dict(zip(names, values.round(6).tolist(), strict=True))
    return {"mean": float(values.mean()), "worst": ends[0], "best": ends[1], "clients": by_client}


def _summary(rng: np.random.Generator, method: str, names: list[str], lines: list[dict[str, Any]]) -> dict[str, Any]:
    table = {}
    for name in names:
        counts = rng.multinomial(int(rng.integers(80, 900)), rng.dirichlet([0.3] * len(LABELS)))
        guess = float(counts.max() / counts.sum())
        table[name] = {
            "train": int(counts.sum()),
            "validation": 9,
            "test": 40,
            "labels": counts.tolist(),
            "guess": guess,
        }
    return {
        "method": method, "rounds": len(lines), "clients": len(names), "accuracy": lines[-1]["accuracy"],
        "accuracy_local": lines[-1]["accuracy_local"], "guess": 0.5, "labels": LABELS, "client_table": table,
        "bytes": {
            "payload_up_per_client_round": 4 * COST[method], "numbers_up_per_client_round": COST[method],
        },
    }  # fmt: skip
