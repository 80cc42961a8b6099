"""DoRA and HiRA are their dense definitions, run under the methods they are defined for, and load in PEFT."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from fedtri.adapters.layer import AdaptedLinear, LayerFactors, adapt
from fedtri.errors import FedtriError
from fedtri.methods import METHODS, build
from fedtri.models import peft
from fedtri.models.loading import Weights
from fedtri.runs import simulation
from fedtri.tasks.text_classification import load
from tiny import carry, rounds

KINDS = ("dora", "hira")
DEFINED = ("fedit", "ffa_lora", "fedsa_lora", "flexlora", "flora_na")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_its_dense_definition(kind):
    """With d_in ≠ d_out, a bias, and a core that is not the identity; gradients too."""
    torch.manual_seed(0)
    base = nn.Linear(5, 3).double()
    layer = AdaptedLinear(base, "layer", kind)
    A, C, B = (nn.Parameter(torch.randn(shape).double()) for shape in ((2, 5), (2, 2), (3, 2)))
    M = torch.rand(3).double() + 1
    x = torch.randn(4, 5).double()
    got = adapt(base(x), x, layer, LayerFactors(A, C, B, 0.5, M=M if kind == "dora" else None))
    update = 0.5 * B @ C @ A
    W = base.weight * (1 + update) if kind == "hira" else base.weight + update
    if kind == "dora":
        W = M[:, None] * W / W.norm(dim=1, keepdim=True).detach()
    expected = x @ W.mT + base.bias
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    one, other = (torch.autograd.grad(y.sum(), (A, C, B), retain_graph=True) for y in (got, expected))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_starts_as_the_base_model(lab, tmp_path, kind):
    logits = []
    for name in (kind, "lora"):
        built = lab.federation(tmp_path / name, method="fedit", adapter=name, double=True)
        client = built.transport.clients()[0]
        logits.append(_logits(built, carry(built, client, built.site.initial(client))))
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", DEFINED)
def test_the_methods_of_flora_nas_evaluation_run_with_it(lab, tmp_path, kind, method):
    built = lab.federation(tmp_path, method=method, adapter=kind, clients=2, steps=1)
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
    mine = _logits(built, carry(built, name))
    peft.write_peft(
        tmp_path / "out",
        factors,
        built.opened.adapted,
        alpha=6.0,
        base_model=str(lab.model(model)),
        task_type="SEQ_CLS",
    )
    plain = load(str(lab.model(model)), built.spec.labels, Weights()).model
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    torch.testing.assert_close(_logits(built, loaded), mine, atol=1e-5, rtol=0)
    merged = load(str(lab.model(model)), built.spec.labels, Weights()).model
    peft.merge(merged, factors, built.spec.layout, 2.0, kind)
    torch.testing.assert_close(_logits(built, merged.eval()), mine, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "full", "ravan"])
def test_merging_is_what_the_client_computes(lab, tmp_path, method):
    built = lab.federation(tmp_path, method=method, rank=4)
    list(rounds(built))
    site, name = built.site, built.transport.clients()[0]
    factors = site.store.load(name)
    mine = _logits(built, carry(built, name))
    merged = load(str(lab.model()), built.spec.labels, Weights()).model
    peft.merge(merged, factors, built.spec.layout, 1.5)
    torch.testing.assert_close(_logits(built, merged.eval()), mine, atol=1e-5, rtol=0)
    if method != "ravan":
        with pytest.raises(FedtriError, match="--merge"):
            peft.write_peft(
                tmp_path / "out", factors, built.opened.adapted, alpha=6.0, base_model="x", task_type="SEQ_CLS"
            )


def _logits(built: simulation.Federation, model: nn.Module) -> torch.Tensor:
    batch = built.site.executor.examples.batch(built.site.splits[built.transport.clients()[0]].test)
    with torch.no_grad():
        return built.site.executor.task.logits(model, batch)
