"""DoRA and HiRA are their dense definitions, run under the methods they are defined for, and load in PEFT."""

import pytest
import torch
from fedtri.execution.routing import Routing
from peft import PeftModel
from torch import nn

from fedtri.adapters.layer import TriLinear
from fedtri.errors import FedtriError
from fedtri.methods import METHODS, build
from fedtri.models import peft
from fedtri.models.loading import Weights
from fedtri.runs import simulation
from fedtri.tasks.text_classification import load
from tiny import rounds

KINDS = ("dora", "hira")
DEFINED = ("fedit", "ffa_lora", "fedsa_lora", "flexlora", "flora_na")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_its_dense_definition(kind):
    """With d_in ≠ d_out, a bias, two clients, and a core that is not the identity; gradients too."""
    torch.manual_seed(0)
    base = nn.Linear(5, 3).double()
    routing = Routing()
    layer = TriLinear(base, 2, 2, routing, kind=kind)
    with torch.no_grad():
        for parameter in (layer.A, layer.B, layer.C):
            parameter.normal_()
        layer.scale.copy_(torch.tensor([2.0, 0.5]))
        if kind == "dora":
            layer.M.uniform_(1, 2)
    routing.set(torch.tensor([1, 0, 1]))
    x = torch.randn(3, 4, 5).double()
    got = layer(x)
    for sample, slot in enumerate((1, 0, 1)):
        update = layer.scale[slot] * layer.B[slot] @ layer.C[slot] @ layer.A[slot]
        W = base.weight * (1 + update) if kind == "hira" else base.weight + update
        if kind == "dora":
            W = layer.M[slot][:, None] * W / W.norm(dim=1, keepdim=True).detach()
        expected = x[sample] @ W.mT + base.bias
        torch.testing.assert_close(got[sample], expected, atol=1e-12, rtol=0)
        one, other = (torch.autograd.grad(y.sum(), layer.B, retain_graph=True)[0] for y in (got[sample], expected))
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_starts_as_the_base_model(lab, tmp_path, kind):
    logits = []
    for name in (kind, "lora"):
        built = lab.federation(tmp_path / name, method="fedit", adapter=name, double=True)
        built.site.executor.cohort.write(0, built.site.initial(built.transport.clients()[0]), 3, 6.0)
        logits.append(_logits(built))
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", DEFINED)
def test_the_methods_of_flora_nas_evaluation_run_with_it(lab, tmp_path, kind, method):
    built = lab.federation(tmp_path, method=method, adapter=kind)
    state = list(rounds(built))[-1].state
    shares_b = "B" in built.method.plan(0).down
    assert any(key.factor == "M" for key in state.shared) == (kind == "dora" and shares_b)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DEFINED])
def test_the_others_refuse_it_in_one_line(method):
    with pytest.raises(FedtriError, match="is not defined for 'dora'"):
        build(method, adapter="dora")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_exported_it_loads_in_peft_with_the_same_logits(lab, tmp_path, kind, model):
    targets = {"bert": "query,intermediate.dense", "gpt2": "c_attn"}[model]
    built = lab.federation(tmp_path, kind=model, method="fedit", adapter=kind, targets=targets)
    list(rounds(built))
    site, name = built.site, built.transport.clients()[0]
    factors = site.store.load(name)
    site.executor.cohort.write(0, factors, 3, 6.0)
    mine = _logits(built)
    peft.write_peft(
        tmp_path / "out",
        factors,
        site.executor.cohort,
        alpha=6.0,
        base_model=str(lab.model(model)),
        task_type="SEQ_CLS",
    )
    plain = load(str(lab.model(model)), built.spec.labels, Weights()).model
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    torch.testing.assert_close(_logits(built, loaded), mine, atol=1e-5, rtol=0)
    merged = load(str(lab.model(model)), built.spec.labels, Weights()).model
    peft.merge(merged, factors, site.executor.cohort.layout, 2.0, kind)
    torch.testing.assert_close(_logits(built, merged.eval()), mine, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "full", "ravan"])
def test_merging_is_what_the_client_computes(lab, tmp_path, method):
    built = lab.federation(tmp_path, method=method, rank=4)
    list(rounds(built))
    site, name = built.site, built.transport.clients()[0]
    factors = site.store.load(name)
    site.executor.cohort.write(0, factors, 4, 6.0)
    mine = _logits(built)
    merged = load(str(lab.model()), built.spec.labels, Weights()).model
    peft.merge(merged, factors, site.executor.cohort.layout, 1.5)
    torch.testing.assert_close(_logits(built, merged.eval()), mine, atol=1e-5, rtol=0)
    if method != "ravan":
        with pytest.raises(FedtriError, match="--merge"):
            peft.write_peft(
                tmp_path / "out", factors, site.executor.cohort, alpha=6.0, base_model="x", task_type="SEQ_CLS"
            )


def _logits(built: simulation.Federation, model: nn.Module | None = None) -> torch.Tensor:
    batch = built.site.executor.examples.batch(built.site.splits[built.transport.clients()[0]].test)
    built.site.executor.cohort.route([0] * len(batch["labels"]))
    with torch.no_grad():
        return built.site.executor.task.logits(model or built.site.executor.cohort.model, batch)
