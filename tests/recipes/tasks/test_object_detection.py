"""Objects: learnt, judged as COCO judges, in pixels of the original image, boxes checked before anything trains."""

import numpy as np
import pytest
import torch

from peft_fast.recipes.tasks import object_detection as detection
from tests.recipes.tasks import medias

NAME = "object-detection"
COUNTS = {"train": 64, "validation": 16}


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    config = YolosConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=[32, 32],
        patch_size=8, num_detection_tokens=3, use_mid_position_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    processor = YolosImageProcessorPil(size={"height": 32, "width": 32})
    places = ("vit.embeddings.detection_tokens", "vit.embeddings.position_embeddings")
    return medias.saved(tmp_path_factory.mktemp("yolos"), (YolosForObjectDetection, config), processor, spread=places)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return medias.scenes(tmp_path_factory.mktemp("scenes"), COUNTS)


def test_it_learns_squares_and_answers_in_pixels(yolos, scenes, tmp_path):
    run = medias.trained(NAME, yolos, scenes, tmp_path / "run", steps=120, learning_rate=5e-3)
    before, after = run.result["evaluations"][0], run.result["final"]["validation"]
    assert before["map_50"] < 0.2 and after["map_50"] > 0.6 and after["loss"] < before["loss"] / 2
    kinds = [part["kind"] for part in run.result["shown"]]
    assert kinds == ["table", "images"]

    from peft_fast.recipes import use

    folder = tmp_path / "run"
    (answer,) = use.predict(folder, [f"{scenes['validation']}/0.png"])
    (best, *_) = sorted(answer["objects"], key=lambda one: -one["score"])
    assert best["label"] == "red" and best["score"] >= 0.5
    x, y, w, h = best["box"]
    assert -4 < x < 36 and -4 < y < 36 and abs(w - 14) < 5 and abs(h - 14) < 5


def test_evaluation_is_in_the_precision_of_training():
    from types import SimpleNamespace

    from peft_fast.recipes.tasks import media

    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    model = torch.nn.Linear(4, 4).train()
    with media.judging(SimpleNamespace(model=model, accelerator=accelerator)) as device:
        answer = model(torch.ones(1, 4, device=device))
        assert answer.dtype == torch.bfloat16 and not answer.requires_grad and not model.training
    assert model.training


def test_average_precision_is_one_for_the_truth_and_falls_with_the_boxes():
    boxes, kinds = np.array([[0.0, 0, 10, 10], [20, 20, 10, 10]]), ["a", "b"]
    right = {"boxes": boxes, "labels": np.array([0, 1]), "scores": np.array([0.9, 0.8])}
    stats, by_class = detection.average_precision([(boxes, kinds)], [right], ["a", "b", "c"])
    assert np.allclose(stats, 1.0) and np.allclose(by_class, [1, 1, 0])
    moved = {**right, "boxes": boxes + [2.5, 0, 0, 0]}  # overlap 0.6
    stats, _ = detection.average_precision([(boxes, kinds)], [moved], ["a", "b", "c"])
    assert stats[1] == pytest.approx(1.0) and stats[2] == 0.0 and 0.2 < stats[0] < 0.35
    assert detection.average_precision([(boxes, kinds)], [{**right, "labels": np.array([1, 0])}], ["a", "b"])[0][1] == 0
    assert detection.average_precision([(boxes[:0], [])], [right], ["a", "b"])[0] == [0.0, 0.0, 0.0]


def test_boxes_survive_padding_resizing_and_both_forms(yolos, scenes, tmp_path):
    """A model that answers the truth itself is judged perfect, whatever its images were padded to."""
    from PIL import Image
    from transformers import DetrImageProcessorPil

    from peft_fast.recipes import data

    sizes, rows = [(40, 20), (20, 40), (30, 30)], []
    for number, (width, height) in enumerate(sizes):
        Image.new("RGB", (width, height), (9 * number, 9, 9)).save(tmp_path / f"{number}.png")
        box = [2.0, 3.0, 12.0, 10.0]
        rows.append({"image": str(tmp_path / f"{number}.png"), "boxes": {"bbox": [box], "category": ["red"]}})
    task, _ = medias.made(NAME, yolos, scenes)
    task.processor = DetrImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 60})
    features = task.encode(data.rows(rows, task, need_truth=True), "validation")
    batch = task.collate([features[i] for i in range(3)])
    assert batch["pixel_values"].shape[-2:] == (48, 48) and "pixel_mask" in batch

    queries = torch.full((3, 2, 3), -9.0)
    queries[:, 0, task.facts["labels"].index("red")] = queries[:, 1, 2] = 9.0
    truth = torch.stack([torch.cat([one["boxes"], torch.rand(1, 4)]) for one in batch["labels"]])
    output = type("Output", (dict,), {"__getattr__": dict.__getitem__})(logits=queries, pred_boxes=truth)
    for answer in task.answers(output, task.sizes_of(features, 0, batch)):
        assert answer["labels"][0] == task.facts["labels"].index("red")
        assert np.allclose(answer["boxes"][0], [2, 3, 12, 10], atol=1e-2)

    corners, _ = medias.made(NAME, yolos, scenes, box_format="xyxy")
    found, kinds = corners.objects([{"bbox": [2, 3, 14, 13], "label": "red"}])
    assert found.tolist() == [[2, 3, 12, 10]] and kinds == ["red"]


def test_augmentation_moves_boxes_with_their_pixels():
    from PIL import Image

    picture = Image.new("RGB", (60, 40))
    picture.paste((255, 0, 0), (20, 10, 36, 30))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(40):
            image, boxes, kinds = detection.augmented(picture, np.array([[20.0, 10, 16, 20]]), ["red"])
            if not kinds:
                continue
            ys, xs = np.nonzero(np.asarray(image)[:, :, 0] > 128)
            seen = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
            assert np.allclose(boxes[0], seen)


def test_progressive_sizes_keep_the_form_and_the_boxes(yolos, scenes):
    task, splits = medias.made(NAME, yolos, scenes)
    model = task.load_model(torch.float32)
    features = task.encode(splits["train"], "train")
    batch = task.collate([features[0], features[1]])
    small = task.resize(batch, 16)
    assert small["pixel_values"].shape[-2:] == (16, 16)
    assert torch.equal(small["labels"][0]["boxes"], batch["labels"][0]["boxes"])
    assert torch.isfinite(model(**task.inputs(small))["loss"])


@pytest.mark.parametrize(
    ("box", "kind", "said"),
    [
        ([5, 5, 40, 5], "red", "reaches out of the image of 32 × 32"),
        ([5, 5, 0, 5], "red", "no area"),
        ([5, 5, -3, 5], "red", "no area"),
        ([5, 5, 5], "red", "not 4 numbers"),
        ([5, 5, 5, 5], "purple", "'purple', which no training row has"),
    ],
)
def test_bad_boxes_are_named_before_training(yolos, scenes, tmp_path, box, kind, said):
    import json

    rows = [{"image": f"{scenes['train']}/{i}.png", "boxes": {"bbox": [[1, 1, 14, 14]], "category": ["red"]}}
            for i in range(4)]  # fmt: skip
    wrong = {"image": f"{scenes['train']}/9.png", "boxes": {"bbox": [box], "category": [kind]}}
    for split, part in (("train", rows), ("validation", [wrong])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    text = medias.stopped(NAME, yolos, files, tmp_path / "run")
    assert said in text and "validation.jsonl, row 1, column boxes" in text
