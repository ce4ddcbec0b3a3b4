"""Series: learnt against the naive forecast, divided by time, and windows that never mix series or look ahead."""

import numpy as np
import pytest
import torch

from peft_fast.recipes import data
from peft_fast.recipes.tasks import series
from tests.recipes.tasks import medias

NAME = "time-series"
SHORT = dict(context=24, horizon=6)


def waves(folder, names=("a", "b"), count=400, noise=0.5):
    """Hourly rows of season 12 with a level of their own and noise, the series interleaved."""
    draw, rows = np.random.default_rng(3), []
    for hour in range(count):
        for place, name in enumerate(names):
            value = 20 * place + 5 * np.sin(2 * np.pi * hour / 12) + draw.normal(0, noise)
            time = np.datetime64("2024-01-01T00:00") + np.timedelta64(hour, "h")
            rows.append({"date": str(time), "id": name, "sales": round(float(value), 3)})
    return medias.table(folder / "waves.csv", rows), rows


@pytest.fixture(scope="module")
def patchtst(tmp_path_factory):
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        context_length=24, prediction_length=6, patch_length=4, patch_stride=4, d_model=32, ffn_dim=64,
        num_hidden_layers=2, num_attention_heads=2, num_input_channels=1, scaling="std", head_dropout=0.0, init_std=0.1,
    )  # fmt: skip
    return medias.saved(tmp_path_factory.mktemp("patchtst"), (PatchTSTForPrediction, config))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    from transformers import TimeSeriesTransformerConfig, TimeSeriesTransformerForPrediction

    config = TimeSeriesTransformerConfig(
        context_length=16, prediction_length=6, lags_sequence=[1, 2, 8], num_time_features=3, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, num_parallel_samples=20,
    )  # fmt: skip
    return medias.saved(tmp_path_factory.mktemp("transformer"), (TimeSeriesTransformerForPrediction, config))


@pytest.fixture(scope="module")
def mixer(tmp_path_factory):
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    config = PatchTSMixerConfig(context_length=24, prediction_length=6, patch_length=4, patch_stride=4, d_model=16)
    return medias.saved(tmp_path_factory.mktemp("mixer"), (PatchTSMixerForPrediction, config))


def test_it_learns_more_than_the_last_season_and_forecasts(patchtst, tmp_path):
    path, rows = waves(tmp_path)
    run = medias.trained(NAME, patchtst, path, tmp_path / "run", steps=90, learning_rate=5e-3)
    before, after = run.result["evaluations"][0], run.result["final"]["validation"]
    assert after["mase"] < 0.9 * after["naive_mase"] < before["mase"] and after["mae"] < 0.8
    assert run.task.facts["season"] == 12 and run.task.facts["channels"] == 1

    from peft_fast.recipes import use

    (first, second) = use.predict(tmp_path / "run", path)
    assert [first["series"], second["series"]] == ["a", "b"]
    assert [one["time"] for one in first["forecast"]][:2] == ["2024-01-17T16:00", "2024-01-17T17:00"]
    from peft_fast.cli import predict

    (tmp_path / "next").mkdir()
    assert predict.app([str(tmp_path / "run"), "--input", path, "--output", str(tmp_path / "next" / "a.csv")]) == 0
    lines = (tmp_path / "next" / "a.csv").read_text().splitlines()
    assert lines[0] == "series,time,value" and len(lines) == 13 and lines[1].startswith("a,2024-01-17T16:00,")

    hours = np.arange(400, 406)
    for place, answer in enumerate((first, second)):
        wanted = 20 * place + 5 * np.sin(2 * np.pi * hours / 12)
        assert np.abs(np.array([one["value"] for one in answer["forecast"]]) - wanted).mean() < 1.2


@pytest.mark.parametrize("model", ["transformer", "mixer"])
def test_the_other_kinds_train_and_draw_the_same_forecast_twice(model, tmp_path, request):
    path, _ = waves(tmp_path, count=120)
    folder = request.getfixturevalue(model)
    run = medias.trained(NAME, folder, path, tmp_path / "run", steps=25, learning_rate=5e-3)
    before, after = run.result["evaluations"][0], run.result["final"]["validation"]
    assert after["loss"] < before["loss"] and after["mae"] < before["mae"]
    rows = data.rows(path, run.task)
    assert run.task.predict(run.model, rows) == run.task.predict(run.model, rows)


def test_the_last_part_is_held_out_and_nothing_of_it_is_trained_on(patchtst, tmp_path):
    path, rows = waves(tmp_path, count=200)
    task, splits = medias.made(NAME, patchtst, path, validation_share=0.2)
    ends = {split: {name: [] for name in "ab"} for split in splits}
    for split in splits:
        features = task.encode(splits[split], split)
        for feature in features:
            one = task.held[split][feature["series"]]
            window = slice(feature["start"], feature["start"] + 30)
            assert np.all(np.diff(one.times[window]) == np.timedelta64(1, "h"))
            batch = task.collate([feature])
            values = np.concatenate([batch["past_values"][0], batch["future_values"][0]])[:, 0]
            values = values * task.facts["std"][0] + task.facts["mean"][0]
            assert np.allclose(values, one.values[window, 0], atol=1e-3)
            ends[split][one.name].append((one.times[window][24], one.times[window][-1]))
    for name in "ab":
        assert max(last for _, last in ends["train"][name]) < min(first for first, _ in ends["validation"][name])
        assert len(ends["validation"][name]) == 40 - 6 + 1
    newest = task.draw(splits["train"], 100, "train")
    assert len(newest) == 100 and newest["time"][-1] == splits["train"]["time"][-1]


def test_seasons_calendars_and_times():
    draw, hours = np.random.default_rng(0), np.arange(300)
    assert series.season_of(np.sin(2 * np.pi * hours / 24) + 0.01 * hours + draw.normal(0, 0.2, 300)) == 24
    assert series.season_of(draw.normal(0, 1, 300)) == 1 and series.season_of(np.ones(50)) == 1
    past = np.arange(7.0)[:, None]
    assert series.seasonal_naive(past, 5, 3)[:, 0].tolist() == [4, 5, 6, 4, 5]
    assert series.seasonal_naive(past, 2, 9)[:, 0].tolist() == [6, 6]
    times, bad = series.parsed(["2024-01-31", "31.12.", None])
    assert bad.tolist()[0] is False and bad[2]
    assert series.parsed(["3", "1", "2"])[0].tolist() == [3, 1, 2]
    months, _ = series.parsed(["2023-11-01", "2023-12-01", "2024-01-01"])
    one = series.Series("", np.zeros((3, 1)), months, np.arange(3))
    assert [str(t)[:10] for t in one.future(2)] == ["2024-02-01", "2024-03-01"]
    about = series.calendar(months, 0, 3)
    assert about.shape == (3, 3) and np.all(about[:, 0] == -0.5) and np.all(np.diff(about[:, 2]) > 0)


def test_a_season_longer_than_the_held_out_context_is_looked_up_in_training(patchtst, tmp_path):
    path, _ = waves(tmp_path, names=("a",), count=300, noise=0.0)
    task, splits = medias.made(NAME, patchtst, path, season=48)
    features = {split: task.encode(splits[split], split) for split in ("train", "validation")}
    naive = task._naive(features["validation"])
    truth = np.stack([one.values[start + 24 : start + 30] for one, start in task._windows(features["validation"])])
    assert np.allclose(naive, truth, atol=1e-2)  # without noise a season ago is the truth


def test_several_values_a_row(patchtst, tmp_path):
    rows = [{"time": i, "x": np.sin(i / 2), "y": 100 + i % 7} for i in range(120)]
    path = medias.table(tmp_path / "two.csv", rows)
    task, splits = medias.made(NAME, patchtst, path, columns={"value": "x, y"})
    model = task.load_model(torch.float32)
    assert task.facts["channels"] == 2 and task.facts["mean"][1] > 99
    batch = task.collate([task.encode(splits["train"], "train")[0]])
    assert batch["past_values"].shape == (1, 24, 2) and torch.isfinite(model(**batch)["loss"])
    (answer,) = task.predict(model, splits["train"])
    first = answer["forecast"][0]
    assert set(first["value"]) == {"x", "y"} and first["time"] == int(splits["train"]["time"][-1]) + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[5].update(date="soon"), "row 7, column time: 'soon'"),
        (lambda rows: rows[2].update(date=rows[0]["date"]), "two rows of one time"),
        (lambda rows: [row.update(sales=1.0) for row in rows], "every value is [1.0]"),
        (lambda rows: rows.__delitem__(slice(60, None)), "no series of 36 rows"),
    ],
)
def test_bad_series_are_named(patchtst, tmp_path, change, said):
    _, rows = waves(tmp_path, count=100, names=("a",))
    change(rows)
    rows = rows if len(rows) > 60 else rows[:30]
    assert said in medias.stopped(NAME, patchtst, medias.table(tmp_path / "bad.csv", rows), tmp_path / "run")


def test_what_was_trained_on_is_not_forecast_again(patchtst, tmp_path):
    _, rows = waves(tmp_path, count=150, names=("a",))
    for name, part, said in (("later", rows[70:], None), ("same", rows[50:], "with this value is a training row")):
        train = medias.table(tmp_path / "train.csv", rows[:100])
        test = medias.table(tmp_path / f"{name}.csv", part)
        task, splits = medias.made(NAME, patchtst, {"train": train, "validation": test})
        found = [problem for problem in task.check(splits) if problem.stops]
        if said is None:
            # its first 24 rows are read, six of the rest were trained on
            assert [problem.row for problem in found] == list(range(26, 32))
        else:
            assert said in found[0].what and found[0].row == 26 and len(found) == 26
    after = medias.table(tmp_path / "after.csv", rows[76:])
    task, splits = medias.made(NAME, patchtst, {"train": train, "validation": after})
    assert not [problem for problem in task.check(splits) if problem.stops]


def test_what_cannot_forecast_is_refused(patchtst, tiny_bert, tmp_path):
    path, _ = waves(tmp_path, count=100)
    assert "PatchTSTForPrediction" in medias.stopped(NAME, tiny_bert, path, tmp_path / "a")
    assert "dtype: bf16" in medias.stopped(NAME, patchtst, path, tmp_path / "b", dtype="bf16")
    said = medias.stopped(NAME, patchtst, path, tmp_path / "c", context=500)
    assert "500 to read" in said
