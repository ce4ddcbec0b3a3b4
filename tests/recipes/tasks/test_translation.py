"""Encoder-decoders: targets, languages, prefixes, scores; T5, BART, mBART and NLLB begin as they were taught."""

import json
import random

import datasets
import pytest
import torch
import transformers as tf

from peft_fast.errors import SettingsError, UnsupportedError
from peft_fast.recipes import config, data, examples, run, use
from peft_fast.recipes.tasks import loading, translation

ROWS = [("the house", "la maison"), ("the red house is big", "la maison rouge est grande"), ("yes", "oui")]


def rows_of(pairs=ROWS):
    return datasets.Dataset.from_list(
        [{"source": a, "target": b, "row": place} for place, (a, b) in enumerate(pairs, 1)]
    )


def task_for(model="example:tiny-t5", **options):
    made = translation.Task(config.read(task="translation", model=str(model), data="-", **options))
    made.learn({"train": rows_of()})
    made.load_processor()
    return made


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-bart"])
def test_a_batch_is_what_the_model_makes_of_labels_itself(name):
    task = task_for(f"example:{name}")
    model = task.load_model(torch.float32).eval()
    batch = task.collate(list(task.encode(rows_of(), "train")))
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    outputs = model(**task.inputs(batch))
    torch.testing.assert_close(task.loss(outputs, batch), theirs.loss)
    assert "labels" not in task.inputs(batch) and not model.config.use_cache
    words = [task.processor.decode(row[row != -100], skip_special_tokens=True) for row in batch["labels"]]
    assert words == [target for _, target in ROWS]
    closed = [row[row != -100][-1] == task.processor.eos_token_id for row in batch["labels"]]
    assert all(closed)
    assert task.count(batch) == int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum())


def test_smoothing_spares_the_padding_and_evaluation():
    task = task_for(label_smoothing=0.3)
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[3, 2, -100, -100], [1, 1, 4, 5]])
    shares, kept = logits.log_softmax(-1), labels != -100
    plain = -shares[kept].gather(1, labels[kept][:, None]).mean()
    even = -shares[kept].mean()
    torch.testing.assert_close(task.loss({"logits": logits}, {"labels": labels}), 0.7 * plain + 0.3 * even)
    with torch.no_grad():
        torch.testing.assert_close(task.loss({"logits": logits}, {"labels": labels}), plain)


def test_a_prefix_stands_before_every_source():
    task = task_for(prefix="translate: ")
    first = task.encode(rows_of(), "train")[0]
    assert task.processor.decode(first["input_ids"], skip_special_tokens=True) == "translate: the house"
    assert task.predict(task.load_model(torch.float32), rows_of().select_columns(["source"]))[0].keys() == {
        "translation"
    }


def test_cutting_keeps_the_closing_token_of_a_source():
    task = task_for(max_length=6, max_target_length=3)
    row = task.encode(rows_of([("the " * 30, "la " * 30)]), "train")[0]
    assert len(row["input_ids"]) == 6 and row["input_ids"][-1] == task.processor.eos_token_id
    assert len(row["labels"]) == 3
    sizes = task.too_long(rows_of())
    assert sizes["source"][1] == 6 and sizes["target"][1] == 3
    assert sizes["source"][0][0] == len(task.processor("the house")["input_ids"])


def test_progressive_resizing_cuts_both_sides():
    task = task_for()
    task.load_model(torch.float32)
    batch = task.collate(list(task.encode(rows_of(), "train")))
    cut = task.resize(batch, 4)
    assert {name: value.shape[1] for name, value in cut.items()} == dict.fromkeys(batch, 4)
    assert torch.equal(cut["decoder_input_ids"], batch["decoder_input_ids"][:, :4])
    lengths = batch["attention_mask"].sum(1)
    assert (cut["input_ids"][lengths > 4, -1] == task.processor.eos_token_id).all()


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-bart"])
def test_answers_do_not_depend_on_the_batch(name):
    task = task_for(f"example:{name}", max_new_tokens=10, beams=2)
    model = task.load_model(torch.float32)
    for weight in model.parameters():
        weight.data *= 2.0
    together = task.predict(model, rows_of())
    assert together == [task.predict(model, rows_of([pair]))[0] for pair in ROWS]


# ---- languages


def pieces(*words):
    return [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -2.0) for w in words), ("▁", -3.0)]


WORDS = sorted({word for pair in ROWS for text in pair for word in text.split()})
SHAPE = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SHAPE |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128}


def nllb(folder):
    vocab = {piece: place for place, (piece, _) in enumerate(pieces(*WORDS))}
    tokenizer = tf.NllbTokenizer(vocab=vocab, merges=[])
    shape = {**SHAPE, "vocab_size": len(tokenizer) + 4, "pad_token_id": 1, "decoder_start_token_id": 2}
    tf.M2M100ForConditionalGeneration(tf.M2M100Config(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mbart50(folder):
    tokenizer = tf.MBart50Tokenizer(vocab=pieces(*WORDS))
    shape = {**SHAPE, "vocab_size": len(tokenizer) + 4, "pad_token_id": 1, "decoder_start_token_id": 2}
    tf.MBartForConditionalGeneration(tf.MBartConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mbart(folder):
    tokenizer = tf.MBartTokenizer(vocab=pieces(*WORDS))
    shape = {**SHAPE, "vocab_size": len(tokenizer) + 4, "pad_token_id": 1}
    tf.MBartForConditionalGeneration(tf.MBartConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CODES = {
    "nllb": (nllb, "eng_Latn", "fra_Latn"),
    "mbart50": (mbart50, "en_XX", "fr_XX"),
    "mbart": (mbart, "en_XX", "fr_XX"),
}


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    made = {}
    for name, (make, _, _) in CODES.items():
        made[name] = tmp_path_factory.mktemp(name)
        with loading.quiet():
            make(made[name])
    return made


@pytest.mark.parametrize("name", CODES)
def test_a_multilingual_model_begins_as_it_was_taught(name, multilingual):
    """What generation feeds the decoder first is what training feeds it first."""
    _, source, target = CODES[name]
    task = task_for(multilingual[name], source_language=source, target_language=target, max_new_tokens=4)
    model = task.load_model(torch.float32)
    batch = task.collate(list(task.encode(rows_of(), "train")))
    codes = [task.processor.convert_tokens_to_ids(code) for code in (source, target)]
    assert ((batch["input_ids"] == codes[0]).sum(1) == 1).all()
    assert ((batch["labels"] == codes[1]).sum(1) == 1).all()
    fed = batch["decoder_input_ids"]
    written = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=model.generation_config
    )
    known = 2 if name != "mbart" else 1  # start and language, or the language as start
    assert torch.equal(written[:, :known], fed[:, :known]) and (fed[:, known - 1] == codes[1]).all()
    assert len(task.predict(model, rows_of())) == 3


def test_languages_are_asked_for_and_checked(multilingual):
    with pytest.raises(SettingsError, match="(?s)source_language: missing.*multilingual"):
        task_for(multilingual["nllb"])
    with pytest.raises(SettingsError, match="(?s)target_language: fra.*fra_Latn"):
        task_for(multilingual["nllb"], source_language="eng_Latn", target_language="fra")
    with pytest.raises(SettingsError, match="(?s)has no languages.*>>fra<<"):
        task_for(target_language="fra_Latn")


# ---- traps


def test_t5_in_float16_is_refused():
    with pytest.raises(UnsupportedError, match="(?s)fp16 with t5.*bf16"):
        task_for(dtype="fp16").load_model(torch.float16)


def test_t5_with_adapters_in_bfloat16_is_near_float32():
    from peft import LoraConfig, get_peft_model

    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        task = task_for()
        model = get_peft_model(
            task.load_model(dtype), LoraConfig(target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
        )
        batch = task.collate(list(task.encode(rows_of(), "train")))
        loss = task.loss(model(**task.inputs(batch)), batch)
        loss.backward()
        assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_more_than_the_positions_is_refused():
    with pytest.raises(SettingsError, match="(?s)max_target_length: 600.*512 positions"):
        task_for("example:tiny-bart", max_target_length=600).load_model(torch.float32)


def test_what_belongs_to_a_model_stays_in_its_generation(tmp_path):
    """Its length and sampling are somebody's choice for other data; its tokens are its own."""
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(examples.path("example:tiny-bart"))
    model.generation_config.update(num_beams=4, length_penalty=2.0, min_length=56, max_length=142, bad_words_ids=[[7]])
    model.save_pretrained(tmp_path)
    task_for("example:tiny-bart").processor.save_pretrained(tmp_path)
    how = task_for(tmp_path, max_new_tokens=5).load_model(torch.float32).generation_config
    assert (how.num_beams, how.max_new_tokens, how.bad_words_ids, how.forced_eos_token_id) == (1, 5, [[7]], 1)
    assert not how.min_length and how.length_penalty in (None, 1.0)


def test_what_a_run_should_know_is_said(tmp_path):
    task = task_for(max_new_tokens=2)
    splits = data.Splits()
    splits.add("train", rows_of(), "train.csv")
    splits.add("validation", rows_of(), "validation.csv")
    model = tf.AutoConfig.from_pretrained(examples.path("example:tiny-t5"))
    model.task_specific_params = {"translation_en_to_fr": {"prefix": "translate English to French: "}}
    model.save_pretrained(tmp_path)
    task.config = task.config.model_copy(update={"model": str(tmp_path)})
    first, second = task.check(splits)
    assert "3 of 3 are longer than max_new_tokens: 2" in str(first) and first.file == "validation.csv"
    assert "translate English to French: " in str(second)
    assert not first.stops and not second.stops


# ---- scores


def test_scores_are_sacrebleus():
    import sacrebleu

    task = task_for()
    answers, truths = ["la maison est rouge", "oui"], ["la maison rouge est grande", "oui"]
    found = task.judge(answers, truths)
    assert found["bleu"] == sacrebleu.corpus_bleu(answers, [truths]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, [truths]).score
    assert task.judge(truths, truths) == pytest.approx({"bleu": 100, "chrf": 100})


def test_answers_are_judged_by_the_rows_texts_not_by_what_was_cut():
    task = task_for(max_target_length=2)
    features = task.encode(rows_of(), "test")
    ids = task.processor([target for _, target in ROWS], padding=True)["input_ids"]
    padded = [[-100 if token == task.processor.pad_token_id else token for token in row] for row in ids]
    found = task.metrics(tf.EvalPrediction(predictions=padded, label_ids=None), features)
    assert found["chrf"] == pytest.approx(100)
    shown = task.show(tf.EvalPrediction(predictions=padded, label_ids=None), features, rows_of())
    assert shown[0]["rows"][0] == ["the house", "la maison", "la maison"]


@pytest.mark.parametrize(
    ("text", "tokens"), [("la maison", "13a"), ("这房子很大", "zh"), ("この家は大きい", "char"), ("บ้านหลังใหญ่", "char")]
)
def test_bleu_counts_characters_where_there_are_no_spaces(text, tokens):
    task = translation.Task(config.read(task="translation", model="m", data="-"))
    task.learn({"train": rows_of([("x", text)])})
    assert task.facts["bleu_tokens"] == tokens
    near = text[:-1] + "x"
    assert task.judge([near], [text])["chrf"] > 0


# ---- a run


NOUNS = {"house": "maison", "table": "table", "city": "ville", "tower": "tour", "street": "rue", "lamp": "lampe"}
NOUNS |= {"window": "fenêtre", "door": "porte", "letter": "lettre", "voice": "voix", "key": "clé", "apple": "pomme"}
FRAMES = {
    "the {}": "la {}", "this is a {}": "ceci est une {}", "where is the {}": "où est la {}",
    "a big {}": "une grande {}", "two of the {}s": "deux des {}s", "I see the {}": "je vois la {}",
    "not this {}": "pas cette {}",
}  # fmt: skip


def test_a_run_learns_to_translate(tmp_path):
    """Held-out pairs of a frame and a noun, each of which was seen with others."""
    pairs = [(a.format(x), b.format(y)) for x, y in NOUNS.items() for a, b in FRAMES.items()]
    random.Random(0).shuffle(pairs)
    for split, part in (("train", pairs[16:]), ("validation", pairs[:4]), ("test", pairs[4:16])):
        rows = [json.dumps({"translation": {"en": a, "fr": b}}) for a, b in part]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    done = run.train(
        task="translation", model="example:tiny-t5", data=str(tmp_path), method="full", learning_rate=3e-3, steps=70,
        columns={"source": "translation.en", "target": "translation.fr"}, batch_size=16, max_new_tokens=20,
        evaluate_every=10**6, device="cpu", out=tmp_path / "run", group_by_length=False, say=None,
    )  # fmt: skip
    final = done.result["final"]
    assert final["test"]["chrf"] > 80 and final["test"]["bleu"] > 50
    (answer,) = use.predict(tmp_path / "run", [pairs[16][0]])
    assert answer["translation"] == pairs[16][1]
