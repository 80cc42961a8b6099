"""The fast executor gives what the reference gives: every architecture of its table, task, and kind of adapter.

Three clients of ranks 3, 1 and 2 train, are scored, and give features, by both; all in float64 to 1e-9.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from execution.clients import DECODERS, ENCODERS, EVERYTHING, HOW, adapted, client, examples, executor, run
from fedtri.execution.fast import attention, packing
from fedtri.execution.fast.kept import Keeping
from fedtri.execution.fast.table import ARCHITECTURES
from tiny import assert_same

TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}
ALL = [np.arange(0, 13), np.arange(13, 20), np.arange(20, 40)]
RANKS = (3, 1, 2)


def agree(on, task="classify", *, clients=None, held=None, how=HOW, learns=EVERYTHING, other=None, **more):
    """Both executors do the same; returns what they found. `other` is the reference's model where it is another."""
    held = held or examples(task)
    clients = clients or [client(on, number, rank) for number, rank in enumerate(RANKS)]
    fast = executor(on, task, examples=held, **more)
    assert fast.describe().startswith("fast executor")
    found = run(fast, clients, how, learns)
    plain = run(executor(other or on, task, "reference", examples=held), clients, how, learns)
    assert_same(found, plain, **TOLERANCE)
    return found


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_classifying_on_every_architecture(kind):
    """Seen to fail with keys that are not turned, with the first token read in place of the last, without a mask."""
    agree(adapted(kind))


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_tagging_on_every_architecture(kind):
    """Seen to fail with scores that lie end to end in place of the batch's grid."""
    agree(adapted(kind, "tag"), "tag")


@pytest.mark.parametrize("prompts", [True, False], ids=["prompts", "plain text"])
@pytest.mark.parametrize("kind", DECODERS)
def test_continuing_on_every_decoder(kind, prompts):
    """Seen to fail with the queries of another token, and with rows of clients in another order."""
    agree(adapted(kind, "continue"), "continue", held=examples("continue", prompts=prompts))


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_pairs_of_texts_have_two_kinds_of_token(kind):
    agree(adapted(kind), held=examples(pairs=True))


KINDS = {
    "dora": {"kind": "dora"},
    "hira": {"kind": "hira"},
    "heads": {"extra": "S", "heads": 2},
    "dense": {"extra": "W"},
    "second adapter": {"extra": "ab"},
    "second adapter, dora": {"extra": "ab", "kind": "dora"},
    "full": {"extra": "P"},
}


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_every_kind_of_adapter(kind, how):
    """On linear layers with and without bias, and on GPT-2's transposed ones. Seen to fail without DoRA's norm,
    with the second adapter's factors swapped, and with one client's W for all."""
    on = adapted(kind, **KINDS[how])
    ranks = (4, 2, 2) if how == "heads" else RANKS
    agree(on, clients=[client(on, number, rank) for number, rank in enumerate(ranks)])


@pytest.mark.parametrize("how", ["dora", "second adapter"])
def test_kinds_of_adapter_where_texts_are_continued(how):
    agree(adapted("llama", "continue", targets="q_proj,down_proj", **KINDS[how]), "continue")


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("bert", r"bert\.(encoder\..*|pooler\.)dense"),
        ("distilbert", "lin1,lin2,out_lin"),
        ("llama", "k_proj,o_proj,gate_proj,up_proj,down_proj"),
        ("gpt2", "c_fc,c_proj,c_attn"),
        ("gpt_neox", "dense,dense_4h_to_h"),
        ("electra", r"electra\.(embeddings_project|encoder\..*key)"),
    ],
)
def test_any_linear_layer_may_be_adapted(kind, targets):
    """Behind the last layer and before the first, too. Seen to fail with a pooler that leaves its adapter out."""
    agree(adapted(kind, targets=targets))


@pytest.mark.parametrize("learns", ["A", "CB", "H", "MB"])
def test_what_does_not_learn_stays(learns):
    """Bit for bit. Seen to fail with every tensor given back from the model."""
    on = adapted("bert", kind="dora")
    before = client(on, 0)
    found = agree(on, clients=[before], learns=frozenset(learns))
    for key, value in found.trained[0].items():
        assert torch.equal(value, before.factors[key]) == (key.factor not in learns), key


def test_factors_with_learning_rates_of_their_own():
    """C moves by its own rate, which is larger. Seen to fail with one group for all."""
    on = adapted("bert")
    before = client(on, 0)
    how = replace(HOW, steps=1, clip=None, weight_decay=0.0, schedule="cosine", learning_rates={"C": 0.5, "H": 1e-3})
    found = agree(on, clients=[before], how=how)
    moved = {f: max(float((v - before.factors[k]).abs().max()) for k, v in found.trained[0].items() if k.factor == f)
             for f in "ABCH"}  # fmt: skip
    assert moved == pytest.approx({"A": 0.01, "B": 0.01, "C": 0.5, "H": 1e-3}, rel=1e-3)


def test_clients_with_heads_of_their_own_classes():
    """Seen to fail with a head's rows taken as the first classes."""
    on = adapted("bert")
    held = examples()
    classes = [np.array([0, 2]), np.array([1, 3]), None]
    for rows, own in zip(ALL, classes, strict=True):
        held.labels[rows] = (own if own is not None else np.arange(4))[held.labels[rows] % (4 if own is None else 2)]
    clients = [client(on, number, rank, own) for number, (rank, own) in enumerate(zip(RANKS, classes, strict=True))]
    agree(on, clients=clients, held=held)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, None) for kind in sorted(ARCHITECTURES)), ("bert", torch.bfloat16)]
)
def test_kept_states_change_nothing(kind, dtype, tmp_path):
    """From memory and from a file. Seen to fail with states of the wrong rows, and with layers below run once more."""
    on, held = adapted(kind, layers="last:1"), examples()
    clients = [client(on, number, rank) for number, rank in enumerate(RANKS)]
    found = []
    for budget in (1 << 20, 0):
        fast = executor(on, examples=held, token_budget=40, keeping=Keeping(ALL, budget, tmp_path, dtype))
        found.append(run(fast, clients))
        assert fast.kept is not None
        assert fast.kept.of(np.arange(3)).dtype == (dtype or torch.float64)
    plain = run(executor(on, name="reference", examples=held), clients)
    assert_same(found[0], found[1], **TOLERANCE)
    assert_same(found[0], plain, **(TOLERANCE if dtype is None else {"atol": 0.5, "rtol": 0.5}))
    assert not list(tmp_path.iterdir())
    assert (dtype is None) or not torch.equal(found[0].losses, plain.losses)


def test_layers_below_the_first_adapter_run_once_for_an_example():
    """Its whole group with it, and no more than the examples that are kept. Seen to fail with groups computed at every
    pass."""
    on, held, seen = adapted("bert", layers="last:1"), examples(), []
    on.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: seen.append(1))
    fast = executor(on, examples=held, token_budget=10**6, keeping=Keeping(ALL[:2], 1 << 20))
    for rows in ([0], [1, 0], [13, 2], [14, 13, 1, 0]):
        assert len(fast.kept.of(np.array(rows))) == held.lengths[rows].sum()
    assert len(seen) == 2
    assert fast.kept.of(np.array([0, 20])) is None


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_gradient_checkpointing_changes_memory_alone(kind):
    """It is really used: a training pass keeps less. Seen to fail with layers that are called as they are."""
    on, kept = adapted(kind), []
    held = examples()
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def pack(value: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        fast = executor(on, examples=held, gradient_checkpointing=recompute)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            run(fast, [client(on, 0)], replace(HOW, steps=1))
        kept.append(sum(sizes.values()))
    agree(on, gradient_checkpointing=True, other=adapted(kind))
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
        ("mistral", {"num_key_value_heads": 1}),
        ("llama", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("bert", {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}),
        ("distilbert", {"sinusoidal_pos_embds": True, "activation": "relu"}),
        ("electra", {"embedding_size": 16}),
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["classify", "continue"])
def test_what_a_configuration_may_change(kind, options, task):
    """Texts of up to 14 tokens. Seen to fail without the window, with one window for all layers, and with grouped heads
    in another order."""
    if task == "continue" and kind in ENCODERS:
        return
    agree(adapted(kind, task, model_options=options), task)


@pytest.mark.parametrize("way", ["fused kernel", "filled up", "one text a row"])
@pytest.mark.parametrize(("kind", "task"), [("bert", "classify"), ("mpnet", "tag"), ("qwen2", "continue")])
def test_ways_to_lay_texts_out_change_nothing(kind, task, way, monkeypatch):
    """Rows too wide to write attention out; tokens filled up to a multiple that nobody reads; rows of one text.
    Seen to fail with filling tokens that are read, and without the scale in one gradient."""
    on = adapted(kind, task)
    if way == "fused kernel":
        monkeypatch.setattr(attention, "WRITTEN_OUT", 0)
    if way == "one text a row":
        monkeypatch.setattr(packing, "WIDER", 0)
    held = examples(task)
    fast = executor(on, task, examples=held)
    if way == "filled up":
        fast.__dict__["frozen"] = replace(fast.frozen, fill=64)
    clients = [client(on, number, rank) for number, rank in enumerate(RANKS)]
    plain = run(executor(on, task, "reference", examples=held), clients)
    assert_same(run(fast, clients), plain, **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "budget", "group"),
    [
        ("bert", 1, 0),
        ("bert", 30, 0),
        ("bert", 200, 0),
        ("bert", 30, 1),
        ("bert", 200, 2),
        ("llama", 30, 0),
        ("llama", 1, 2),
    ],
)
def test_group_size_and_token_budget_change_nothing(kind, budget, group):
    """Seen to fail with the mean over passes in place of the mean over the minibatch."""
    agree(adapted(kind), token_budget=budget, group=group)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_workers_change_nothing(how):
    """Two processes, or one. Seen to fail with tensors that a worker keeps to itself."""
    on, held = adapted("bert", extra="P" if how == "full" else ""), examples()
    clients = [client(on, number, rank) for number, rank in enumerate(RANKS)]
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        found.append(run(executor(on, examples=held), clients))
    assert_same(found[0], found[1], **TOLERANCE)


def test_float32_agrees_to_its_rounding():
    """1e-4 of a tensor's norm."""
    on, held = adapted("bert"), examples()
    on.model.float()
    clients = [client(on, number, rank) for number, rank in enumerate(RANKS)]
    found, plain = (run(executor(on, name=name, examples=held), clients) for name in ("auto", "reference"))
    for number, own in plain.trained.items():
        for key, value in own.items():
            assert found.trained[number][key].dtype == torch.float32
            assert (found.trained[number][key] - value).norm() <= 1e-4 * value.norm(), key


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("task", ["classify", "tag"])
def test_a_client_whose_numbers_are_none_any_more_spoils_no_other(kind, task):
    """One holds NaN and shares passes. Seen to fail with attention's rows of any client, and with filling tokens of
    another's."""
    on, held = adapted(kind, task), examples(task)
    clients = [client(on, number, rank) for number, rank in enumerate(RANKS)]
    clean = run(executor(on, task, examples=held), clients)
    bad = {key: torch.full_like(value, torch.nan) for key, value in clients[1].factors.items()}
    spoilt = run(executor(on, task, examples=held), [clients[0], replace(clients[1], factors=bad), clients[2]])
    assert spoilt.losses[1].isnan()
    for number in (0, 2):
        assert_same(spoilt.trained[number], clean.trained[number], **TOLERANCE)
        assert_same(spoilt.scores[number], clean.scores[number], **TOLERANCE)


@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_inputs_are_not_changed(proximal):
    on = adapted("bert")
    one = client(on, 0)
    before = {key: value.clone() for key, value in one.factors.items()}
    for name in ("auto", "reference"):
        run(executor(on, name=name), [one], proximal=proximal)
        assert_same(dict(one.factors), before)
    assert not any(value.requires_grad for value in on.model.parameters())
