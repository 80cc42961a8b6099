"""What a language model is taught: which tokens carry loss, however long, templated or padded; and what it is not."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtri import tasks
from fedtri.data import load_pool
from fedtri.errors import FedtriError
from fedtri.models import loading
from fedtri.runs import finished, lifecycle
from fedtri.tasks.responses import IGNORED, final_number, same
from tiny import carry, rounds

ASKED, SAID = "the big cat", "dog mouse bird"
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "dog"},
    {"role": "user", "content": "the oak was old"},
    {"role": "assistant", "content": "rose grass"},
]


@pytest.fixture
def made(lab, tmp_path):
    """The examples of these rows, and the tokenizer."""

    def make(rows, *, chat=False, max_length=40, columns=None, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        config = lab.language(chat=chat)
        recipe = tasks.build("causal_lm", options)
        loaded = recipe.load(config.model, (), loading.Weights())
        pool = load_pool(str(path), recipe.pool, columns=columns)
        return recipe.examples(pool, loaded.processor, max_length), loaded.processor

    return make


def shown(examples, tokenizer, row: int = 0) -> tuple[list[str], list[str]]:
    """(all tokens, those that carry loss) of one example."""
    batch = examples.batch(np.array([row]))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    return [tokenizer.convert_ids_to_tokens(x.tolist()) for x in (ids, ids[labels != IGNORED])]


def test_a_response_carries_loss_and_its_prompt_does_not(made):
    examples, tokenizer = made([{"prompt": ASKED, "response": SAID}])
    everything, learned = shown(examples, tokenizer)
    assert everything == ["[CLS]", "the", "big", "cat", "dog", "mouse", "bird", "[SEP]"]
    assert learned == ["dog", "mouse", "bird", "[SEP]"]
    assert examples.terms.tolist() == [4]
    assert examples.prompts([0])["input_ids"].tolist() == [examples.batch(np.array([0]))["input_ids"][0, :4].tolist()]


def test_plain_text_carries_loss_everywhere(made):
    examples, tokenizer = made([{"text": "the big cat"}])
    everything, learned = shown(examples, tokenizer)
    assert (everything, learned) == (["[CLS]", "the", "big", "cat", "[SEP]"], ["the", "big", "cat", "[SEP]"])


def test_every_reply_of_a_conversation_carries_loss(made):
    """Seen to fail with the last reply alone, and with the template rendered without its generation prompt."""
    examples, tokenizer = made([{"messages": TALK}], chat=True)
    everything, learned = shown(examples, tokenizer)
    assert learned == ["dog", "[SEP]", "rose", "grass", "[SEP]"]
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert everything == tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    last = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    prompt = examples.prompts([0])["input_ids"][0]
    assert prompt.tolist() == tokenizer(last, add_special_tokens=False)["input_ids"]


def test_a_prompt_goes_through_the_chat_template_where_there_is_one(made):
    row = [{"prompt": ASKED, "response": SAID}]
    chat, tokenizer = made(row, chat=True)
    said = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    whole = tokenizer(tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False)["input_ids"]
    assert chat.batch(np.array([0]))["input_ids"][0].tolist() == whole
    plain, tokenizer = made(row, chat=True, template="plain")
    assert shown(plain, tokenizer)[0][0] == "[CLS]"


@pytest.mark.parametrize(
    ("limit", "side", "left", "learned"),
    [
        (8, "left", "[CLS] the big cat dog mouse bird [SEP]", "dog mouse bird [SEP]"),
        (6, "left", "big cat dog mouse bird [SEP]", "dog mouse bird [SEP]"),
        (4, "left", "cat dog mouse bird", "dog mouse bird"),
        (6, "right", "[CLS] the big cat dog mouse", "dog mouse"),
    ],
)
def test_an_overlong_example_is_cut_where_it_is_said(limit, side, left, learned, made):
    examples, tokenizer = made([{"prompt": ASKED, "response": SAID}], max_length=limit, truncation=side)
    assert tuple(map(" ".join, shown(examples, tokenizer))) == (left, learned)


def test_a_response_that_is_cut_off_whole_is_an_error(made):
    rows = [{"prompt": "cat", "response": "dog"}, {"prompt": ASKED, "response": SAID}]
    with pytest.raises(FedtriError, match=r"example 2: no token of its response is left within 4 tokens behind a "):
        made(rows, max_length=4, truncation="right")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss(side, lab, tmp_path):
    """Whatever side the tokenizer prefers; against each example alone, token by token, by PyTorch's own loss."""
    built = lab.federation(tmp_path, of="language", double=True)
    built.processor.padding_side = side
    site, rows = built.site, np.arange(12)
    model = carry(built, "client-00")
    task, examples = site.executor.task, site.executor.examples
    batch = examples.batch(rows)
    assert not batch["attention_mask"].bool().all()
    with torch.no_grad():
        scores = task.scores(model, batch)
        for row, loss, hits in zip(rows, scores.loss, scores.correct, strict=True):
            alone = examples.batch(np.array([row]))
            logits = model(input_ids=alone["input_ids"]).logits[0, :-1]
            wanted = alone["labels"][0, 1:]
            torch.testing.assert_close(loss, cross_entropy(logits, wanted, reduction="sum"), atol=1e-9, rtol=1e-9)
            assert hits == (logits.argmax(-1) == wanted).sum()
            assert (wanted != IGNORED).sum() == examples.terms[row]


def test_answers_are_those_of_the_exported_model_one_at_a_time(lab, tmp_path):
    """Greedy, from left-padded prompts in one batch. Seen to fail with prompts padded on the right."""
    config = lab.language(out=str(tmp_path / "run"), rounds=1, learning_rate=0.05, steps=8)
    config = config.model_copy(update={"task_options": {"max_new_tokens": 5}})
    list(lifecycle.run(config))
    asked = ["the cat", "a very old and not big oak", "slate"]
    said = [answer.tuned for answer in finished.predict(tmp_path / "run", "client-01", asked)]
    finished.export(tmp_path / "run", "client-01", tmp_path / "merged", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text, answer in zip(asked, said, strict=True):
        ids = torch.tensor([[2, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        start = ids.shape[1]
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(ids[0, start:], skip_special_tokens=True) == answer
    assert len(set(said)) > 1


def test_exact_answers_are_counted_for_each_client_by_its_own_model(lab, tmp_path, monkeypatch):
    """Seen to fail with every prompt answered by the first client's model."""
    values = {"of": "language", "task_options": {"exact_match": "text", "max_new_tokens": 6, "generations": 4}}
    built = lab.federation(tmp_path, **values, method="local", learning_rate=0.05, steps=30)
    line = list(rounds(built, rounds=1))[-1].line
    found = line["metrics"]["exact_match"]["clients"]
    site = built.site
    for client in built.transport.clients():
        model, examples = carry(built, client), site.executor.examples
        rows = site.splits[client].test[:4].tolist()
        words = built.processor.convert_ids_to_tokens
        prompts = [" ".join(words(examples.prompts([row])["input_ids"][0, 1:])) for row in rows]
        answers = built.recipe.answers(model, built.processor, (), prompts, 40)
        hits = [said == examples.responses[row] for said, row in zip(answers, rows, strict=True)]
        assert found[client] == pytest.approx(sum(hits) / len(hits))


def test_perplexity_is_the_exponential_of_the_loss(lab, tmp_path):
    line = list(rounds(lab.federation(tmp_path, of="language"), rounds=1))[-1].line
    for client, perplexity in line["metrics"]["perplexity"]["clients"].items():
        assert perplexity == pytest.approx(np.exp(line["test_loss"]["clients"][client]), rel=1e-4)


def test_a_sketch_has_a_mixture_for_each_domain_or_one_for_all(lab, tmp_path):
    domains = lab.federation(tmp_path / "a", of="language", method="ce_lora")
    assert domains.spec.sketch.classes == 3
    assert domains.describe_clients()["client-00"]["guess"] is None
    state = list(rounds(domains, rounds=1))[-1].state
    assert any(len(sketch.mixtures) > 1 for sketch in state.sketches.values())
    one = lab.federation(tmp_path / "b", of="language", method="ce_lora", columns={}, partition="iid")
    assert one.spec.sketch.classes == 1
    state = list(rounds(one, rounds=1))[-1].state
    assert all(set(sketch.mixtures) == {0} for sketch in state.sketches.values())


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 48/2 = 24.\n#### 1,072", 1072), ("#### -3.50 dollars", -3.5), ("it is 4, no, 5", 5), ("none", None),
     ("", None), ("#### 7\n#### $8", 8)],
)  # fmt: skip
def test_the_final_number(text, number):
    assert final_number(text) == number


def test_judging():
    assert same("I say 7 and 24", "#### 24", "number")
    assert not same("nothing", "nothing", "number")
    assert same(" yes\n", "yes", "text")
    assert not same("yes 24", "24", "text")


GOOD = {"prompt": ASKED, "response": SAID}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": ASKED, "response": " "}, {}, 'column "response" is empty in 1 of 3 rows, first in example 3'),
        ({"prompt": "", "response": SAID}, {}, 'column "prompt" is empty in 1 of 3 rows'),
        ({"prompt": ASKED, "response": None}, {}, 'column "response" is empty in 1 of 3 rows'),
        (GOOD, {"template": "chat"}, "conversations need a chat template, which this tokenizer does not have"),
        (GOOD, {"template": "jinja"}, "task_options.template of causal_lm: expected"),
        (GOOD, {"generations": 0}, "expected generations and max_new_tokens of at least 1, got 0"),
    ],
)
def test_what_cannot_be_learned_is_one_line(row, options, message, made):
    with pytest.raises(FedtriError) as caught:
        made([GOOD, GOOD, row], **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "example 2: holds no messages"),
        (TALK[:3], "example 2: the last message is the user's"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
            "a reply of the assistant's is empty",
        ),
        ([{"role": "robot", "content": "a"}], "found \"{'role': 'robot'"),
        ([{"role": "user", "content": None}, TALK[1]], "a message has no text"),
    ],
)
def test_what_is_no_conversation_is_one_line(messages, message, made):
    with pytest.raises(FedtriError) as caught:
        made([{"messages": TALK}, {"messages": messages}], chat=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_conversations_without_a_chat_template_are_one_line(made):
    with pytest.raises(
        FedtriError, match="need a chat template, which this tokenizer does not have; choose a chat mod"
    ):
        made([{"messages": TALK}])
    with pytest.raises(FedtriError, match=r"which task_options\.template = plain rules out"):
        made([{"messages": TALK}], chat=True, template="plain")


def test_data_without_the_columns_are_one_line(made):
    with pytest.raises(FedtriError, match=r'no column "prompt", found a; name the right one with columns\.prompt'):
        made([{"a": "b"}])
    with pytest.raises(FedtriError, match=r"exact_match needs prompts and responses, found plain text"):
        made([{"text": "the cat"}], exact_match="text")


@pytest.mark.parametrize("how", ["8bit", "4bit"])
def test_quantised_weights_carry_adapters(how, lab, tmp_path):
    """Seen to fail, in 4 bits, with layers in evaluation mode: no gradient came through them."""
    values = {"of": "language", "model_options__quantization": how, "learning_rate": 2e-2, "steps": 6}
    built = lab.federation(tmp_path, **values)
    adapted = built.opened.adapted
    carry(built, "client-00")
    layer = adapted.layer(adapted.layout.layers[0].name)
    assert layer.base.weight.dtype in (torch.int8, torch.uint8)
    assert layer.factors["A"].dtype == torch.float32
    losses = [progress.line["loss"] for progress in rounds(built, rounds=3)]
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("values", [{"method": "full"}, {"method": "fedit", "adapter": "dora"}])
def test_what_needs_plain_weights_says_so(values, lab, tmp_path):
    with pytest.raises(FedtriError, match=r"model_options\.quantization: .* needs plain weights; set it to none"):
        lab.federation(tmp_path, of="language", model_options__quantization="8bit", **values)


def test_without_bitsandbytes_quantised_weights_are_refused(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("fedtri.tasks.checkpoints.find_spec", lambda name: None)
    with pytest.raises(FedtriError, match=r"4bit needs bitsandbytes, which is not installed here; run: pip install"):
        lab.federation(tmp_path, of="language", model_options__quantization="4bit")


@pytest.mark.parametrize("executor", ["fast", "reference"])
def test_gradient_checkpointing_changes_memory_alone(executor, lab, tmp_path):
    """That layers are run again is seen in how often they run; that generation still works, in its metric."""
    values = {"of": "language", "double": True, "task_options": {"exact_match": "text", "max_new_tokens": 3}}
    values |= {"simulation__executor": executor}
    runs_of = {}
    for again in (False, True):
        built = lab.federation(tmp_path / str(again), **values, model_options__gradient_checkpointing=again)
        calls = []
        built.opened.adapted.model.model.layers[0].input_layernorm.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        lines = [progress.line for progress in rounds(built, rounds=1)]
        runs_of[again] = (len(calls), {key: value for key, value in lines[0].items() if key != "seconds"})
    assert runs_of[True][1] == runs_of[False][1]
    assert runs_of[True][0] > runs_of[False][0]
    assert not any(layer.training for layer in built.opened.adapted.model.model.layers)
