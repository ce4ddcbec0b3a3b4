"""One class of each kind as people use it: the Trainer, evaluation and generation between steps, saved adapters."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel

import peft_fast
from tests.architectures import structure, training
from tests.architectures.architecture import ROWS
from tests.architectures.zoo import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")


def each(*names):
    return pytest.mark.parametrize("architecture", [ARCHITECTURES[name] for name in names], ids=names)


def items(architecture, batches):
    """A data set of single examples."""
    found = []
    for batch in training.batches(architecture, batches):
        found += [{name: value[row] for name, value in batch.items()} for row in range(ROWS)]
    return found


def trainer(model, architecture, folder, **options):
    """The Trainer with evaluations in between, clipping and accumulation."""
    options = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": ROWS,
            "per_device_eval_batch_size": ROWS,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "label_names": ["labels"],
            **options,
        }
    )
    data = items(architecture, 4)
    return transformers.Trainer(model=model, args=options, train_dataset=data, eval_dataset=data[:2])


def history(run):
    """Losses in training and evaluation, in order."""
    return torch.tensor([log[k] for log in run.state.log_history for k in ("loss", "eval_loss") if k in log])


@each("BERT", "Llama", "T5", "ViT", "Wav2Vec2")
def test_trainer(architecture, tmp_path):
    checkpointing = architecture.name in ("Llama", "T5", "Wav2Vec2")
    stock = architecture.adapted()
    ours = peft_fast.accelerate(copy.deepcopy(stock))
    losses = []
    for model in (stock, ours):
        run = trainer(model, architecture, tmp_path, gradient_checkpointing=checkpointing)
        run.train()
        losses.append(history(run))
    assert len(losses[0]) == 6
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    expected = {name: p.double() for name, p in training.trainable(stock).items()}
    got = {name: p.double() for name, p in training.trainable(ours).items()}
    assert training.distance(got, expected) < 1e-5
    structure.assert_found(architecture, ours)


@each("Llama", "T5")
def test_trainer_saves_and_resumes(architecture, tmp_path):
    """Dropout, autocast, a checkpoint on disk: the resumed run is the uninterrupted one, and PEFT alone can load it."""
    model = architecture.adapted(dropout=0.1, lora_dropout=0.1)
    options = dict(bf16=True, save_strategy="steps", save_steps=2, max_steps=4, eval_strategy="no")
    whole = peft_fast.accelerate(copy.deepcopy(model))
    run = trainer(whole, architecture, tmp_path / "whole", **options)
    run.train()
    resumed = peft_fast.accelerate(copy.deepcopy(model))
    again = trainer(resumed, architecture, tmp_path / "whole", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = {name: p.double() for name, p in training.trainable(whole).items()}
    got = {name: p.double() for name, p in training.trainable(resumed).items()}
    assert training.distance(got, expected) < 1e-2

    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path / "whole" / "checkpoint-4").eval()
    batch = training.batches(architecture, 1)[0]
    whole = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(training.loss_of(whole, batch), training.loss_of(loaded, batch), rtol=1e-5, atol=0)


@each("GPT-2", "Llama", "Gemma3", "T5", "flan-T5", "BART", "Whisper")
def test_generation_between_steps(architecture):
    """Cross-attention's k and v are called at the first token only, the others at every one, each time with one row."""
    stock = architecture.adapted()
    ours = peft_fast.accelerate(copy.deepcopy(stock))
    data = training.batches(architecture, 3)
    prompt = {k: v for k, v in data[0].items() if k in ("input_ids", "input_features", "attention_mask")}
    for batch in data:
        gradients = []
        for model in (stock, ours):
            loss = training.loss_of(model.train(), batch)
            loss.backward()
            found = training.trainable(model)
            gradients.append({name: p.grad.double() for name, p in found.items()})
            torch.optim.SGD(found.values(), lr=training.RATE).step()
            model.zero_grad()
        assert training.distance(gradients[1], gradients[0]) < 1e-4
        words = [
            model.eval().generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams)
            for beams in (1, 2)
            for model in (stock, ours)
        ]
        assert torch.equal(words[0], words[1]) and torch.equal(words[2], words[3])
    structure.assert_found(architecture, ours)


@each("GPT-2", "Llama", "T5")
def test_preferences_against_the_model_without_adapters(architecture):
    """As DPO does it: two forwards with gradients, two of the reference in between, one backward that recomputes."""
    stock = architecture.adapted()
    stock.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = peft_fast.accelerate(copy.deepcopy(stock))
    data = training.batches(architecture, 6)
    for chosen, rejected in zip(data[::2], data[1::2], strict=True):
        gradients = []
        for model in (stock, ours):
            with torch.no_grad(), model.disable_adapter():
                reference = training.loss_of(model, chosen) - training.loss_of(model, rejected)
            margin = training.loss_of(model, chosen) - training.loss_of(model, rejected)
            with torch.no_grad(), model.disable_adapter():
                reference = (reference + training.loss_of(model, chosen) - training.loss_of(model, rejected)) / 2
            torch.nn.functional.softplus(margin - reference).backward()
            found = training.trainable(model)
            gradients.append({name: p.grad.double() for name, p in found.items()})
            torch.optim.SGD(found.values(), lr=training.RATE).step()
            model.zero_grad()
        assert training.distance(gradients[1], gradients[0]) < 1e-4
    structure.assert_found(architecture, ours)


@each("DistilBERT", "GPT-2", "Phi-3", "flan-T5", "CLIP")
def test_restore_gives_every_class_its_forward_back(architecture):
    model = architecture.adapted()
    classes = {type(module) for module in model.modules()}
    forwards = {cls: cls.forward for cls in classes}
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    peft_fast.restore(peft_fast.accelerate(model))
    assert {cls: cls.forward for cls in classes} == forwards
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@each("BERT", "Llama", "T5", "CLIP", "Time series transformer")
def test_enable_finds_the_same_without_a_walk(architecture):
    stock = architecture.adapted()
    ours = copy.deepcopy(stock)
    data = training.batches(architecture, 4)
    truth = training.exact(stock, data)
    expected = training.train(stock, data)
    peft_fast.enable()
    training.assert_rounding(architecture, 4, training.train(ours, data), expected, truth)
    structure.assert_found(architecture, ours)
