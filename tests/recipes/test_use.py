"""A finished run in use: its own figures again, answers, a plain model, and clear words where that cannot be."""

import json
import shutil

import pytest
import torch

from peft_fast.errors import DataError, SettingsError, UnsupportedError
from peft_fast.recipes import record, use


@pytest.fixture(scope="module")
def runs(tiny_bert, reviews, tmp_path_factory):
    """runs(method, dtype) -> the folder of a run, trained once."""
    from peft_fast.recipes import run

    made = {}

    def folder(method="lora", dtype="fp32", **more):
        key = method, dtype, *more
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / f"{method}-{dtype}"
            given = dict(task="sequence-classification", model=str(tiny_bert), data=reviews, out=str(out))
            given |= dict(method=method, dtype=dtype, epochs=3, batch_size=16, learning_rate=1e-2, device="cpu") | more
            if method in ("lora", "dora"):
                given["r"] = 4
            run.train(given, say=lambda text: None)
            made[key] = out
        return made[key]

    return folder


METHODS = [
    ("lora", "fp32"),
    ("lora", "bf16"),
    ("dora", "fp32"),
    ("head", "bf16"),
    ("full", "fp32"),
    ("full", "bf16"),
    ("gradual", "bf16"),
]


@pytest.mark.parametrize(("method", "dtype"), METHODS)
def test_a_loaded_run_has_the_very_figures_it_ended_with(runs, method, dtype):
    folder = runs(method, dtype)
    found = use.evaluate(folder)
    final = record.read(folder)["final"]
    assert found["metrics"] == final["test"]  # bit for bit
    assert found["rows"] == 32 and found["data"] == "test.csv (test)" and found["shown"][0]["kind"] == "confusion"
    if method == "lora":
        assert final["test"]["accuracy"] > 0.8
        assert use.evaluate(folder, split="validation")["metrics"] == final["validation"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_a_model_writes_in_eval_is_what_it_wrote_at_the_end(tmp_path, method):
    """A task with samples of its own, in the precision of training."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from peft_fast.recipes import run
    from tests.recipes.conftest import sentences

    rows = [text for text, _ in sentences(60, seed=5)]
    words = ["<end>", "<unknown>", *sorted({word for text in rows for word in text.split()})]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = {}
    for split, part in (("train", rows[:40]), ("validation", rows[40:50]), ("test", rows[50:])):
        (tmp_path / f"{split}.txt").write_text("\n".join(part))
        data[split] = str(tmp_path / f"{split}.txt")
    given = dict(task="causal-lm", model=str(tmp_path / "model"), data=data, out=str(tmp_path / "run"), epochs=1)
    given |= dict(method=method, dtype="bf16", device="cpu", learning_rate=1e-2, max_new_tokens=6, eval_batch_size=3)
    result = run.train(given, say=lambda text: None).result
    found = use.evaluate(tmp_path / "run")
    assert found["metrics"] == result["final"]["test"] and found["shown"] == result["shown"]
    assert use.evaluate(tmp_path / "run", split="validation")["metrics"] == result["final"]["validation"]


def test_other_rows_other_figures(runs, reviews):
    folder = runs()
    train = use.evaluate(folder, reviews["train"])
    assert train["rows"] == 96 and train["data"] == "train.csv"
    assert train["metrics"] != use.evaluate(folder)["metrics"]


def test_answers(runs):
    run = use.load(runs())
    first, second, again = use.predict(run, ["a lovely film", "a dull film", {"text": "a lovely film"}])
    assert first["label"] == "positive" and second["label"] == "negative" and again == first


def test_evaluating_leaves_the_process_as_it_was(runs):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    use.evaluate(runs())
    assert torch.equal(state, torch.get_rng_state())


# ---- merge


def outputs(folder, texts):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    batch = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model, model(**batch).logits.float()


@pytest.mark.parametrize(("method", "dtype"), [("lora", "fp32"), ("lora", "bf16"), ("dora", "fp32"), ("full", "fp32")])
def test_a_merged_model_needs_transformers_alone(runs, tmp_path, method, dtype):
    folder, out = runs(method, dtype), tmp_path / "merged"
    found = use.merge(folder, out)
    assert found["dtype"] == dtype and found["asked"] == "rows of its own data"
    assert not list(out.glob("adapter*")) and [path.name for path in tmp_path.iterdir()] == ["merged"]
    texts = ["a lovely film", "the plot was very dull"]
    model, logits = outputs(out, texts)
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    answers = use.predict(folder, texts)
    for row, answer in zip(logits.softmax(-1), answers, strict=True):
        want = [answer["scores"][name] for name in model.config.id2label.values()]
        assert row.tolist() == pytest.approx(want, abs=1e-4 if dtype == "fp32" else 3e-2)


def test_merging_refuses_what_is_not_the_same(runs, tmp_path, monkeypatch):
    write = use._write

    def damaged(run, part, dtype):
        with torch.no_grad():
            next(p for n, p in run.model.named_parameters() if "lora_B" in n).add_(0.5)
        write(run, part, dtype)

    monkeypatch.setattr(use, "_write", damaged)
    with pytest.raises(UnsupportedError, match="(?s)differ by .* nothing was written"):
        use.merge(runs(), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_merging_without_the_data_makes_inputs_up(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs(), folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("train.csv", "gone.csv"))
    assert "random inputs" in use.merge(folder, tmp_path / "merged")["asked"]


def test_merging_into_a_folder_in_use(runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(SettingsError, match="is there already"):
        use.merge(runs(), tmp_path / "mine")
    with pytest.raises(SettingsError, match="holds the run"):
        use.merge(runs(), runs().parent, overwrite=True)
    use.merge(runs(), tmp_path / "mine", overwrite=True)
    assert not (tmp_path / "mine" / "notes.txt").exists()


# ---- what cannot be


def test_no_folder_of_a_run(tmp_path):
    with pytest.raises(DataError, match="no folder of a run"):
        use.load(tmp_path)


def test_a_run_that_was_stopped(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs(), folder)
    shutil.rmtree(folder / "adapter")
    (folder / "metrics.json").write_text(json.dumps(record.read(folder) | {"state": "stopped"}))
    with pytest.raises(DataError, match="(?s)a run that is stopped.*--resume --out"):
        use.load(folder)
    (folder / "metrics.json").unlink()
    with pytest.raises(DataError, match="a run without metrics.json"):
        use.load(folder)


def test_a_base_model_that_is_gone(runs, tmp_path, tiny_bert):
    folder = tmp_path / "run"
    shutil.copytree(runs(), folder)
    text = (folder / "config.yaml").read_text().replace(str(tiny_bert), str(tmp_path / "gone"))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UnsupportedError, match="no such folder"):
        use.load(folder)
    run = use.load(folder, model=str(tiny_bert))
    assert use.predict(run, ["a lovely film"]) == use.predict(runs(), ["a lovely film"])


def test_another_base_model(runs, tmp_path, tiny_bert):
    from transformers import BertConfig, BertForMaskedLM

    shutil.copytree(tiny_bert, tmp_path / "other")
    config = BertConfig.from_pretrained(tiny_bert, hidden_size=48, intermediate_size=96)
    BertForMaskedLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedError, match="the adapter's own base model"):
        use.load(runs(), model=str(tmp_path / "other"))


def test_rows_without_the_column(runs, tmp_path):
    (tmp_path / "rows.csv").write_text("words,label\na lovely film,positive\n")
    with pytest.raises(DataError, match="words"):
        use.evaluate(runs(), str(tmp_path / "rows.csv"))
    run = use.load(runs(), columns={"text": "words"})
    assert use.evaluate(run, str(tmp_path / "rows.csv"))["rows"] == 1


def test_a_label_that_training_had_not(runs, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na lovely film,mixed\n")
    with pytest.raises(DataError, match="mixed"):
        use.evaluate(runs(), str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    "kept, error, learnt, refused, lost",
    [
        (torch.bfloat16, 2.7e-3, 5.7e-3, False, 0.47),
        (torch.bfloat16, 5.7e-3, 5.7e-3, True, 0),  # the adapter was dropped: nearer than bf16's digits are
        (torch.bfloat16, 1e-3, 5.7e-3, False, 0),
        (torch.bfloat16, 1e-2, 0.5, False, 0),
        (torch.bfloat16, 9e-2, 0.5, True, 0),
        (torch.float32, 9e-4, 0.0, False, 0),
    ],
)
def test_what_rounding_may_take_of_what_was_learnt(kept, error, learnt, refused, lost):
    want = torch.ones(100)
    go = lambda: use._compare([want], [want * (1 + error)], [want * (1 + learnt)], kept, kept)  # noqa: E731
    if refused:
        with pytest.raises(UnsupportedError, match="--dtype fp32"):
            go()
    else:
        assert go()["lost"] == pytest.approx(lost, abs=0.01)
