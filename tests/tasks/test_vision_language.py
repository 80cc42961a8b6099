"""Laws of questions about images: what carries loss, where the image stands, what cannot be, and what leaves."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fedtri.errors import FedtriError
from fedtri.runs import finished, lifecycle
from tiny import opened_again, rounds
from tiny_images import llava

CLIENT = "client-01"
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def asked(lab, **values) -> dict:
    return {
        "kind": "llava", "task": "vision_language", "data": str(lab.questions), "targets": "auto", "steps": 2,
        "columns": {"prompt": "question", "response": "answer"}, "partition": "iid", "method": "fedit", **values,
    }  # fmt: skip


def words_of(ids) -> str:
    return llava()[1].tokenizer.decode(ids)


def test_the_image_stands_first_and_the_response_alone_carries_loss(lab, tmp_path):
    """Token by token."""
    examples = lab.federation(tmp_path, **asked(lab)).site.executor.examples
    batch = examples.batch(np.array([0, 1]))
    image = ["<s>", *["<image>"] * 4]
    assert words_of(batch["input_ids"][0]).split() == [*image, "which", "colour", "deep", "red", "</s>"]
    assert words_of(batch["input_ids"][1]).split() == [*image, "name", "it", "deep", "blue", "</s>"]
    assert batch["labels"][0].tolist() == [-100] * 7 + batch["input_ids"][0][7:].tolist()
    assert examples.terms.tolist() == [3] * 60
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    cut = examples.prompts([1])
    assert words_of(cut["input_ids"][0]).split() == [*image, "name", "it"]


def test_a_chat_template_is_followed(lab, tmp_path):
    """The processor's own."""
    model, processor = llava()
    processor.chat_template = CHAT
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    built = lab.federation(tmp_path / "x", **asked(lab, model=str(tmp_path / "model")))
    batch = built.site.executor.examples.batch(np.array([0]))
    said = words_of(batch["input_ids"][0][batch["labels"][0] != -100])
    assert said.split() == ["deep", "red", "</s>"]
    assert (batch["input_ids"][0] == 4).sum() == 4
    with pytest.raises(FedtriError, match='"chat" needs a chat template, which this processor does not have'):
        lab.federation(tmp_path / "y", **asked(lab, task_options={"template": "chat"}))


def test_what_is_too_long_loses_its_end_and_never_its_image(lab, tmp_path):
    """Where nothing of a response is left, that is an error."""
    examples = lab.federation(tmp_path, **asked(lab, max_length=9)).site.executor.examples
    assert all((examples.batch(np.array([row]))["input_ids"] == 4).sum() == 4 for row in range(4))
    assert set(examples.terms.tolist()) == {1, 2}
    with pytest.raises(FedtriError, match="no token of its response is left within 6 tokens"):
        lab.federation(tmp_path / "x", **asked(lab, max_length=6))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "clip"}, "cannot be loaded as a model of images and text"),
        ({"columns": {"prompt": "question", "response": "nothing"}}, 'no column "nothing"'),
        ({"columns": {"prompt": "image", "response": "answer", "image": "question"}}, "cannot be read as an image"),
        ({"task_options": {"generations": 0}}, "expected generations and max_new_tokens of at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(values, said, lab, tmp_path):
    with pytest.raises(FedtriError) as caught:
        lab.federation(tmp_path, **asked(lab, **values))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_with_an_image_token_is_refused(lab, tmp_path):
    """It would take the image's place."""
    path = lab.questions.with_name("double.csv")
    path.write_text(lab.questions.read_text().replace("which colour", "which <image> colour", 1))
    with pytest.raises(FedtriError, match="example 1: a text holds '<image>'"):
        lab.federation(tmp_path, **asked(lab, data=str(path)))


def test_answers_are_generated_with_the_image_at_hand(lab, tmp_path):
    """And judged; a model that has learned the few there are is hardly surprised by them."""
    values = asked(lab, task_options={"exact_match": "text"}, steps=25, learning_rate=2e-2, rounds=1)
    line = list(rounds(lab.federation(tmp_path, **values)))[-1].line
    assert set(line["metrics"]) >= {"perplexity", "exact_match"}
    assert 0 <= line["metrics"]["exact_match"]["mean"] <= 1
    assert line["metrics"]["perplexity"]["mean"] < 8


def test_peft_and_the_merged_model_answer_as_the_client_did(lab, tmp_path):
    config = lab.config(**asked(lab, out=str(tmp_path / "run"), rounds=1, clients=2, steps=4, learning_rate=1e-2))
    list(lifecycle.run(config))
    own = finished.open_client(tmp_path / "run", CLIENT)
    model, _ = opened_again(config, own.factors, own.spec.labels)
    batch = lab.federation(tmp_path / "x", **asked(lab)).site.executor.examples.batch(np.array([0, 4]))
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    assert "attention_mask" not in batch
    untuned = LlavaForConditionalGeneration.from_pretrained(config.model).eval()
    with torch.no_grad():
        expected, before = model(**inputs).logits, untuned(**inputs).logits
        loaded = PeftModel.from_pretrained(untuned, tmp_path / "run" / "adapters" / CLIENT).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        finished.export(tmp_path / "run", CLIENT, tmp_path / "merged", merge=True)
        merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-3
    assert AutoProcessor.from_pretrained(tmp_path / "merged", backend="pil").image_token == "<image>"
