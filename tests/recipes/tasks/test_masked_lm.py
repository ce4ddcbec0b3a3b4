"""Hidden tokens: how many, what is read in their place, blocks of text, and evaluations that compare."""

import math

import pytest
import torch

from peft_fast.errors import DataError, UnsupportedError
from peft_fast.recipes import examples, methods
from tests.recipes.tasks import texts

NAME = "masked-lm"
ROWS = {
    "train": [{"text": f"the {word} was very long and it is quite a scene"} for word in ("film", "plot", "cast")],
    "validation": [{"text": "the music was fine and the end dull"}, {"text": "a lovely scene"}],
}


def learns(result):
    assert result["final"]["validation"]["accuracy"] > 0.35
    assert result["evaluations"][0]["accuracy"] < 0.15
    assert result["final"]["validation"]["perplexity"] < 8


def test_learns(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.echoes, texts.SIZES | {"train": 200})
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", max_length=16, epochs=8)
    learns(made.result)
    validation = made.result["final"]["validation"]
    assert validation["perplexity"] == pytest.approx(math.exp(validation["loss"]), rel=1e-4)
    rows = texts.data.rows(["cold cold cold cold cold cold [MASK] cold cold cold cold [MASK]"], made.task)
    (answer,) = made.task.predict(made.model, rows)
    assert len(answer["masks"]) == 2 and "cold" in [one["token"] for one in answer["masks"][0]]
    assert answer["text"].split()[6] == answer["masks"][0][0]["token"] and "[MASK]" not in answer["text"]


def test_learns_nothing_without_a_learning_rate(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.echoes)
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", learning_rate=1e-12, steps=3, max_length=16)
    with pytest.raises(AssertionError):
        learns(made.result)


def test_the_share_and_kinds_of_masks(tiny_bert):
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS, mask_share=0.3)
    special = set(made.processor.all_special_ids)
    ids = torch.randint(5, len(made.processor), (400, 32))
    ids[:, 0], ids[:, -1] = made.processor.cls_token_id, made.processor.sep_token_id
    read, labels = made._mask(ids, torch.Generator().manual_seed(0))
    asked = labels != -100
    assert not asked[:, [0, -1]].any() and torch.equal(labels[asked], ids[asked])
    assert torch.equal(read[~asked], ids[~asked])
    assert asked[:, 1:-1].float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert (read[asked] == made.processor.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (read[asked] == ids[asked]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert special & set(ids[0].tolist())


def test_a_short_row_is_asked_something(tiny_bert):
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS, mask_share=0.01)
    _, labels = made._mask(torch.tensor([[2, 9, 3, 0], [2, 8, 7, 3]]), torch.Generator().manual_seed(0))
    assert ((labels != -100).sum(1) == 1).all()


def test_blocks_hold_every_token_once(tiny_bert):
    made, splits, _ = texts.ready(NAME, tiny_bert, ROWS, max_length=12)
    features = made.encode(splits["train"], "train")
    first, last, between = 2, 3, 3
    assert all(ids[0] == first and ids[-1] == last and len(ids) <= 12 for ids in features["input_ids"])
    stream = [token for ids in features["input_ids"] for token in ids[1:-1]]
    expected = []
    for row in ROWS["train"]:
        expected += [*made.processor(row["text"], add_special_tokens=False)["input_ids"], between]
    assert stream == expected and "labels" not in features.column_names


def test_training_masks_anew_and_evaluation_always_alike(tiny_bert):
    made, splits, _ = texts.ready(NAME, tiny_bert, ROWS)
    train = made.encode(splits["train"], "train")
    batches = [made.collate([train[0]])["input_ids"].tolist() for _ in range(4)]
    assert any(batch != batches[0] for batch in batches)
    torch.manual_seed(7)
    once = made.collate([train[0]])
    torch.manual_seed(7)
    assert torch.equal(made.collate([train[0]])["input_ids"], once["input_ids"])
    fixed = [made.encode(splits["validation"], "validation") for _ in range(2)]
    assert fixed[0]["input_ids"] == fixed[1]["input_ids"] and fixed[0]["labels"] == fixed[1]["labels"]


def test_runs_of_another_seed_are_asked_other_words_and_compare_says_so(tiny_bert, tmp_path):
    from peft_fast.pages import compare

    found = texts.files(tmp_path, texts.echoes)
    options = dict(steps=1, max_length=16)
    runs = [
        texts.trained(NAME, tiny_bert, found, tmp_path / f"run-{i}", **options, **more).result
        for i, more in enumerate(({}, {"learning_rate": 1e-5}, {"seed": 1}, {"mask_share": 0.3}))
    ]
    asked = "0.15 of the tokens of blocks of 16, drawn by seed 0"
    assert runs[0]["drawn"] == {"validation": asked} and runs[2]["drawn"]["validation"].endswith("by seed 1")
    said = [compare.warnings([runs[0], other]) for other in runs[1:]]
    assert [sum("not the same rows they are judged by" in text for text in each) for each in said] == [0, 1, 1]
    stars = [any("*" in row[1] for row in compare.rows([runs[0], other])[1]) for other in runs[1:]]
    assert stars == [True, False, False]


def test_metrics_are_of_hidden_tokens_alone(tiny_bert):
    made, splits, _ = texts.ready(NAME, tiny_bert, ROWS)
    model = made.load_model(torch.float32)
    prediction, features = texts.judged(made, model, splits["validation"])
    found = made.metrics(prediction, features)
    batch = made.collate([features[i] for i in range(len(features))])
    with torch.no_grad():
        logits = model(**made.inputs(batch)).logits
        loss = made.loss({"logits": logits}, batch)
    asked = batch["labels"] != -100
    assert found["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1)[asked] == batch["labels"][asked]).float().mean())
    shown = made.show(prediction, features, splits["validation"])
    assert texts.is_json(shown) and "[MASK]" in shown[0]["rows"][0][0]


def test_a_language_head_that_the_checkpoint_lacks_is_learnt(tiny_bert, tmp_path):
    from transformers import BertModel

    made, _, _ = texts.ready(NAME, tiny_bert, ROWS)
    assert made.head(made.load_model(torch.float32)) == []
    BertModel.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    made, splits, _ = texts.ready(NAME, tmp_path, ROWS, dtype="bf16")
    model = made.load_model(torch.float32)
    transform = [f"cls.predictions.transform.{name}" for name in ("LayerNorm", "dense")]
    assert made.head(model) == transform
    model = methods.prepare(made.load_model(torch.bfloat16), made, made.config)
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(name in one and "modules_to_save" in one for one in learnt) for name in transform)
    batch = made.collate([made.encode(splits["train"], "train")[0]])
    made.loss(model(**made.inputs(batch)), batch).backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any("decoder" in one or "embeddings" in one and "lora" not in one for one in learnt)


def test_byte_pairs_have_masks_too():
    folder = str(examples.path("example:tiny-roberta"))
    made, splits, _ = texts.ready(NAME, folder, ROWS, max_length=24)
    features = made.encode(splits["train"], "train")
    assert features[0]["input_ids"][0] == made.processor.cls_token_id
    model = made.load_model(torch.float32)
    (answer,) = made.predict(model, texts.data.rows(["a <mask> film"], made))
    assert len(answer["masks"][0]) == 5 and sum(one["score"] for one in answer["masks"][0]) <= 1


def test_a_text_without_a_mask_and_a_model_without_one(tiny_bert, tmp_path):
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS)
    with pytest.raises(DataError, match=r"row 2: 'no mask' without \[MASK\]"):
        made.predict(made.load_model(torch.float32), texts.data.rows(["a [MASK]", "no mask"], made))
    tokenizer = made.processor
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    with pytest.raises(UnsupportedError, match="no mask token"):
        texts.ready(NAME, tmp_path, ROWS)


def test_a_piece_of_a_word_is_joined_to_what_stands_before():
    for name, pieces in (("tiny-bert", ("film", "##ing")), ("tiny-roberta", ("Ġfilm", "ing"))):
        made, _, _ = texts.ready(NAME, str(examples.path(f"example:{name}")), ROWS)
        whole, part = made.processor.convert_tokens_to_ids(pieces)
        mask = made.processor.mask_token
        assert made._filled(f"the act {mask} is {mask}", whole) == f"the act film is {mask}"
        assert made._filled(f"the act {mask} is {mask}", part) == f"the acting is {mask}"
