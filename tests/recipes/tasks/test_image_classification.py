"""Images: learnt, drawn at random in one way only, of any size a model takes, and refused with a reason."""

import numpy as np
import pytest
import torch

from tests.recipes.tasks import medias

NAME = "image-classification"
COUNTS = {"train": 72, "validation": 30}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    return medias.saved(tmp_path_factory.mktemp("vit"), (ViTModel, config), processor)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return medias.pictures(tmp_path_factory.mktemp("pictures"), COUNTS)


def test_it_learns_colours_and_answers_files(vit, pictures, tmp_path):
    run = medias.trained(NAME, vit, pictures, tmp_path / "run", steps=20, augment=True, progressive=[8, 16])
    before, after = run.result["evaluations"][0], run.result["final"]["validation"]
    assert before["accuracy"] < 0.8 and after["accuracy"] > 0.9
    assert [entry["size"] for entry in run.result["sizes"]] == [8, 16]
    confusion = run.result["shown"][0]
    assert confusion["names"] == sorted(medias.COLOURS) and np.sum(confusion["counts"]) == COUNTS["validation"]

    from peft_fast.recipes import use

    folder = tmp_path / "run"
    path = pictures["validation"].removesuffix("validation.csv") + "validation-1.png"
    (answer,) = use.predict(folder, [path])
    assert answer["label"] == "green" and answer["score"] == max(answer["scores"].values())


def test_lora_trains_adapters_and_head_on_the_fast_path(vit, pictures, tmp_path):
    run = medias.trained(NAME, vit, pictures, tmp_path / "run", steps=2, method="lora")
    assert not run.result["fast"]["slow"] and len(run.result["fast"]["fast"]) == 12
    assert run.result["fast"]["fast_calls"] > 0
    trained = {name.split(".")[-3] for name, p in run.model.named_parameters() if p.requires_grad}
    assert "modules_to_save" in trained or any("classifier" in name for name in trained)


def test_augmentation_is_a_function_of_torch_s_generator(vit, pictures):
    task, splits = medias.made(NAME, vit, pictures, augment=True)
    task.see(task.load_model(torch.float32))
    features = task.encode(splits["train"], "train")
    rows = [features[i] for i in range(4)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, state = task.collate(rows)["pixel_values"], torch.get_rng_state()
        second = task.collate(rows)["pixel_values"]
        torch.set_rng_state(state)
        again = task.collate(rows)["pixel_values"]
    assert torch.equal(second, again) and not torch.equal(first, second)
    held = task.encode(splits["validation"], "validation")
    state = torch.get_rng_state()
    still = [task.collate([held[0]])["pixel_values"] for _ in range(2)]
    assert torch.equal(*still) and torch.equal(state, torch.get_rng_state())


def test_a_crop_lies_in_the_image_and_keeps_its_share():
    from peft_fast.recipes.tasks import media

    for width, height in ((100, 60), (3, 200), (1, 1)):
        for _ in range(200):
            left, top, right, low = media.crop_of(width, height, 0.6)
            assert 0 <= left < right <= width and 0 <= top < low <= height
            if (width, height) == (100, 60):
                assert (right - left) * (low - top) > 0.55 * width * height


def test_positions_are_interpolated_at_other_sizes(vit, pictures):
    task, splits = medias.made(NAME, vit, pictures, image_size=24)
    model = task.load_model(torch.float32)
    features = task.encode(splits["validation"], "validation")
    batch = task.collate([features[0], features[1]])
    assert batch["pixel_values"].shape == (2, 3, 24, 24) and batch["interpolate_pos_encoding"] is True
    smaller = task.resize(batch, 16)
    assert smaller["pixel_values"].shape[-1] == 16 and smaller["interpolate_pos_encoding"] is False
    assert model(**task.inputs(batch))["logits"].shape == (2, 3)
    assert task.count(batch) == 2


def test_a_centre_crop_grows_with_the_size():
    from transformers import BitImageProcessorPil

    from peft_fast.recipes.tasks import media

    processor = BitImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    media.set_size(processor, 112)
    assert processor.size["shortest_edge"] == 128 and processor.crop_size["height"] == 112
    media.set_size(processor, 112)
    assert processor.size["shortest_edge"] == 128


def test_weights_and_smoothing_change_the_loss(vit, pictures):
    task, _ = medias.made(NAME, vit, pictures, class_weights={"red": 0.0})
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    names = task.facts["labels"]
    loss = task.loss({"logits": logits}, {"labels": labels})
    kept = labels != names.index("red")
    # a mean over all rows: what a batch weighs does not depend on its classes
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits[kept], labels[kept]) * kept.float().mean())
    smooth, _ = medias.made(NAME, vit, pictures, label_smoothing=0.2)
    wanted = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.allclose(smooth.loss({"logits": logits}, {"labels": labels}), wanted)


def test_a_progressive_that_ends_below_the_size_of_evaluation_is_said(vit, pictures):
    for sizes, side, said in (([8, 12], 0, True), ([8, 16], 0, False), ([8, 16], 24, True)):
        task, _ = medias.made(NAME, vit, pictures, progressive=sizes, image_size=side)
        note = f"progressive ends at {sizes[-1]} pixels, and evaluation is at {side or 16}"
        assert task.ends_small(None).startswith(note) == said and bool(task.ends_small(None)) == said


def test_what_cannot_be_learnt_is_refused(vit, pictures, tmp_path, tiny_bert):
    assert "no class pink" in medias.stopped(NAME, vit, pictures, tmp_path / "a", class_weights={"pink": 2.0})
    assert "image" in medias.stopped(NAME, tiny_bert, pictures, tmp_path / "b")
    said = medias.stopped(NAME, vit, pictures, tmp_path / "c", progressive=[2, 16])
    assert "2 pixels" in said and "ViT" in said
    broken = tmp_path / "train-0.png"
    broken.write_bytes(b"no image")
    rows = [{"image": str(broken), "label": "red"}, {"image": str(tmp_path / "gone.png"), "label": "blue"}]
    said = medias.stopped(NAME, vit, medias.table(tmp_path / "bad.csv", rows), tmp_path / "d")
    assert "bad.csv" in said and "row" in said
