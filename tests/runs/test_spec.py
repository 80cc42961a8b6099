"""Laws of the Spec: both ends derive the same one from every key, a machine's own keys change nothing, and every other
key changes what it is about.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import BaseModel

from fedtri.config import Config
from fedtri.deploy import site, terms
from fedtri.errors import FedtriError
from fedtri.methods import METHODS
from fedtri.runs import spec as specs
from fedtri.runs.opening import Machine, open_model
from fedtri.runs.spec import Spec
from tiny import DEFAULTS, LABELS, Lab

NOTHING = ""
REFUSED = "refused"
"""Both ends refuse the value, in the same words."""
ALWAYS = "fingerprint"
"""Every key that both ends share changes the fingerprint too."""

KEYS: dict[str, tuple[Any, str]] = {
    "model": ("{copy}", NOTHING),
    "data": ("{elsewhere}", NOTHING),
    "task": ("token_classification", ALWAYS),
    "method": ("flora", "layout"),
    "clients": (3, NOTHING),
    "partition": ("iid", NOTHING),
    "fraction": (0.5, "schedule"),
    "rounds": (9, "schedule"),
    "steps": (7, "optimization"),
    "epochs": (2.0, "optimization"),
    "batch_size": (2, "optimization"),
    "max_length": (12, "max_length"),
    "learning_rate": (0.5, "optimization"),
    "rank": (2, "scales"),
    "adapter": ("dora", "layout"),
    "basis": ("gradient", ALWAYS),
    "basis_examples": (8, "basis_examples"),
    "basis_factors": (2, "gradient_factors"),
    "lora_alpha": (3.0, "scales"),
    "targets": ("query", "layout"),
    "layers": ("last:1", "layout"),
    "head": ("shared", ALWAYS),
    "weights": ("uniform", ALWAYS),
    "head_start": ("fit", "fits_heads"),
    "labels": ("own", REFUSED),
    "seed": (4, "seed"),
    "device": ("auto", NOTHING),
    "evaluate": (False, "schedule"),
    "transport": ("flower-sim", NOTHING),
    "out": ("elsewhere", NOTHING),
    "init_adapter": ("adapter", "init_adapter"),
    **{f"columns.{role}": (None, NOTHING) for role in ("text", "text_pair", "label")},
    **{f"columns.{role}": ("x", REFUSED) for role in ("prompt", "response", "messages", "tokens", "tags", "image")},
    "method_options": ({"temperature": 0.5}, ALWAYS),
    "task_options": ({"generations": 5}, ALWAYS),
    "model_options.dtype": ("bfloat16", "model_options"),
    "model_options.quantization": ("8bit", "model_options"),
    "model_options.mixed_precision": ("bfloat16", "model_options"),
    "model_options.gradient_checkpointing": (True, "model_options"),
    "optimizer.schedule": ("cosine", "optimization"),
    "optimizer.warmup": (1, "optimization"),
    "optimizer.weight_decay": (0.1, "optimization"),
    "optimizer.betas": ([0.8, 0.9], "optimization"),
    "optimizer.clip": (False, "optimization"),
    "optimizer.learning_rates": ({"B": 0.5}, "optimization"),
    "data_options.limit": (20, NOTHING),
    "split.train": (0.6, "shares"),
    "split.validation": (0.2, "shares"),
    "split.test": (0.3, "shares"),
    "early_stopping.patience": (2, "schedule"),
    "simulation.executor": ("reference", NOTHING),
    "simulation.group": (1, NOTHING),
    "simulation.token_budget": (64, NOTHING),
    "simulation.prefix_budget": (0, NOTHING),
    "simulation.prefix_dtype": ("bfloat16", NOTHING),
    "simulation.client_cpus": (2, NOTHING),
    "simulation.client_gpus": (0.5, NOTHING),
    "wire.basis": ("int4", "wire"),
    "wire.down": ("sign", "wire"),
    "wire.up": ("int8", "wire"),
    "wire.norm_bound": (5.0, "wire"),
    "similarity.sketch_dims": (3, "sketch"),
    "server.optimizer": ("fedavgm", ALWAYS),
    "server.learning_rate": (0.5, ALWAYS),
    "server.betas": ([0.5, 0.5], ALWAYS),
    "network.clients": (["a", "b", "c"], "clients"),
    "network.labels": (["x", "y"], "labels"),
    "network.minimum": (1, "schedule"),
    "network.deadline": (1.0, NOTHING),
    "network.patience": (1.0, NOTHING),
    "network.retries": (0, NOTHING),
    "network.attempts": (7, "schedule"),
}
"""Every key of the configuration: another value than the base's, and the field of the Spec that it must change."""
NO_COLUMNS = {"columns.text": None, "columns.label": None}
CONTEXT: dict[str, dict[str, Any]] = {
    "head_start": {"head": "personal"},
    "similarity.sketch_dims": {"method": "ce_lora"},
    "method_options": {"method": "ce_lora"},
    "task_options": {"task": "causal_lm", "model": "{language}", **NO_COLUMNS},
}
"""What the configuration must already say where a key is to be changed."""
TOGETHER: dict[str, dict[str, Any]] = {
    "task": NO_COLUMNS,
    "split.train": {"split.test": 0.3},
    "split.validation": {"split.train": 0.6},
    "split.test": {"split.train": 0.6},
    "epochs": {"steps": None},
}
"""What must be changed with a key."""


def keys(schema: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, with its table."""
    for name, part in schema.model_fields.items():
        if inspect.isclass(part.annotation) and issubclass(part.annotation, BaseModel):
            yield from keys(part.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


@dataclass
class Ends:
    """A server and a site of one federation, whose files each end has under paths of its own."""

    lab: Lab
    folder: Path
    known: dict[str, tuple[Spec, Spec]] = field(default_factory=dict)

    def copied(self, model: str) -> str:
        """The same model in another place."""
        copy = self.folder / f"{Path(model).name} elsewhere"
        if not copy.exists():
            copy.symlink_to(model, target_is_directory=True)
        return str(copy)

    def specs(self, changes: dict[str, Any]) -> tuple[Spec, Spec]:
        """What the server and the site derive from one federation.toml."""
        if (name := repr(changes)) not in self.known:
            self.known[name] = self._specs(changes)
        return self.known[name]

    def _specs(self, changes: dict[str, Any]) -> tuple[Spec, Spec]:
        bert, llama = str(self.lab.model()), self.lab.language().model
        base: dict[str, Any] = {
            **DEFAULTS, "method": "fedit", "model": bert, "data": "-", "out": "run",
            "network": {"clients": ["a", "b"], "labels": sorted(LABELS)},
        }  # fmt: skip
        del base["clients"], base["partition"]
        for key, value in changes.items():
            table, _, last = key.rpartition(".")
            into = base
            if table:
                base[table] = into = dict(base.get(table, {}))
            if value is None:
                into.pop(last, None)
            else:
                places = {"copy": self.copied(bert), "language": llama, "elsewhere": self.folder}
                into[last] = value.format(**places) if isinstance(value, str) else value
        if base.get("task") == "causal_lm":
            base["targets"] = "auto"
        path = self.folder / "federation.toml"
        path.write_text(tomli_w.dumps(base))
        columns = {f"columns.{role}": "own" for role in base["columns"] if role in ("text", "label")}
        node = site.node_of({
            "client": "a", "data": "own.csv", "state": "state", "device": "cpu", "model": self.copied(base["model"]),
            **columns,
        })  # fmt: skip
        return terms.agreed(terms.common(path, {})), terms.agreed(site.configured(path, {}, node))


@pytest.fixture(scope="module")
def ends(lab, tmp_path_factory) -> Ends:
    return Ends(lab, tmp_path_factory.mktemp("ends"))


def changed(a: Spec, b: Spec) -> set[str]:
    """The fields in which two Specs differ."""
    return {one.name for one in fields(Spec) if one.compare and getattr(a, one.name) != getattr(b, one.name)}


def test_every_key_has_its_line_here():
    """Seen to fail with a key added to the configuration."""
    assert set(keys()) == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_both_ends_derive_the_same_spec_and_the_key_changes_what_it_is_about(key, ends):
    """Seen to fail for `layers` with a server that leaves it out of the layout, for `rank` with a site that counts its
    own rank alone, for `rounds` with it in the fingerprint, and for `model` with its path in the fingerprint.
    """
    value, where = KEYS[key]
    context = CONTEXT.get(key, {})
    given = context | {key: value} | TOGETHER.get(key, {})
    if where == REFUSED:
        with pytest.raises(FedtriError) as refused:
            ends.specs(given)
        assert key.partition(".")[0] in str(refused.value)
        return
    server, at_site = ends.specs(given)
    assert server == at_site
    found = changed(ends.specs(context)[0], server)
    if where == NOTHING:
        assert found == set()
        return
    assert where in found
    assert key.partition(".")[0] not in specs.OWN, f"{key} is a machine's own and must change nothing"
    of_server = key.startswith("network.") and key != "network.labels"
    assert (ALWAYS in found) != (key in specs.RESUMABLE or of_server)


def test_a_model_of_other_shapes_than_its_configuration_says_is_refused(ends, lab, tmp_path):
    """Seen to fail with the layouts not compared."""
    server, _ = ends.specs({})
    other = Machine(str(lab.model("roberta")), "cpu", Config().simulation)
    with pytest.raises(FedtriError, match=r"model: .*roberta is another model than"):
        open_model(server, other)


def test_a_method_states_its_learning_rates_and_the_configuration_wins():
    """Seen to fail with the method's rates over the configuration's."""
    core = METHODS["fed_sb"]()
    rated = replace(core, adapter=replace(core.adapter, learning_rates={"C": 0.02, "H": 0.1}))
    config = Config(method="fed_sb")
    assert specs.optimization_of(config, rated).learning_rates == {"C": 0.02, "H": 0.1}
    config = Config.model_validate({"method": "fed_sb", "optimizer": {"learning_rates": {"C": 0.5}}})
    assert specs.optimization_of(config, rated).learning_rates == {"C": 0.5, "H": 0.1}


def test_the_learning_rate_of_a_factor_that_a_method_does_not_train_is_refused():
    """RoLoRA trains A in odd rounds alone. Seen to fail with the plan of round 0 alone."""
    config = Config.model_validate({"rounds": 1, "optimizer": {"learning_rates": {"A": 0.5}}})
    assert specs.optimization_of(config, METHODS["rolora"]()).learning_rates == {"A": 0.5}
    with pytest.raises(FedtriError, match=r"^optimizer\.learning_rates\.A: fed_sb does not train A, expected .* C, H;"):
        specs.optimization_of(config, METHODS["fed_sb"]())
