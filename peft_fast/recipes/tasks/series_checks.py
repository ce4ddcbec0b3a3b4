"""What can be wrong with series before anything trains: too short, still, doubled, or judged by what was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from peft_fast.recipes.tasks import Problem, media, series


def each(splits: Any, split: str, found: list[series.Series], past: int, horizon: int) -> Iterator[Problem]:
    """Series long enough, one row a time, and something that moves."""
    need = past + horizon
    if not any(len(one.values) >= need for one in found):
        longest = max(len(one.values) for one in found)
        what = f"{longest} rows in the longest series; {past} are read to forecast {horizon}"
        yield media.problem(splits, split, 0, "time", what, "Pass longer series, or lower context or horizon")
    for one in found:
        name, first = _named(one), int(one.places[0])
        twice = np.flatnonzero(one.times[1:] == one.times[:-1]) + 1
        for place in twice.tolist():
            what = f"{name}two rows of one time, {splits[split]['time'][int(one.places[place])]}"
            fix = "Remove one, or name the column that tells the series apart: columns: {series: …}"
            yield media.problem(splits, split, int(one.places[place]), "time", what, fix)
        if split == "train" and not np.ptp(one.values, axis=0).any():
            what = f"{name}every value is {one.values[0].tolist()}"
            yield media.problem(splits, split, first, "value", what, "There is nothing to learn", stops=len(found) == 1)
        steps = np.diff(one.times)
        days = one.step / np.timedelta64(1, "D") if one.dated else 0
        gaps = 0 if len(twice) or 28 <= days <= 366 else int((steps != one.step).sum())
        if gaps:
            what = f"{name}{gaps} step{'s' * (gaps > 1)} of time other than {_spoken(one.step)}"
            fix = "Rows are taken as evenly spaced: fill the gaps if they are not"
            yield media.problem(splits, split, first, "time", what, fix, stops=False)
        if len(one.values) < need and any(len(other.values) >= need for other in found):
            what = f"{name}{len(one.values)} rows, too few for a window of {need}"
            yield media.problem(splits, split, first, "time", what, "The series is not used", stops=False)


def seen(splits: Any, split: str, found: list[series.Series], past: int) -> Iterator[Problem]:
    """Nothing that is to be forecast was trained on. The first values of a series are read alone."""
    trained = {one.name: one for one in series.grouped(splits["train"])}
    for one in found:
        known = trained.get(one.name)
        if known is None or known.dated != one.dated:
            continue
        there = {time: value for time, value in zip(known.times.tolist(), known.values.tolist(), strict=True)}
        asked = range(min(past, len(one.times)), len(one.times))
        same = [i for i in asked if there.get(one.times[i].item()) == one.values[i].tolist()]
        for i in same:
            place = int(one.places[i])
            what = f"{_named(one)}{splits[split]['time'][place]} with this value is a training row, too"
            fix = "Give training rows that end before, or leave the validation split to the last part of them"
            yield media.problem(splits, split, place, "time", what, fix)
        early = sum(one.times[i] <= known.times[-1] for i in asked) - len(same)
        if early and one.name:
            what = f"{_named(one)}{early} values to forecast are from times that training covers"
            fix = "Judge by what comes after the training rows"
            yield media.problem(splits, split, int(one.places[asked[0]]), "time", what, fix, stops=False)


def _named(one: series.Series) -> str:
    return f"series {one.name}: " if one.name else ""


def _spoken(step: Any) -> str:
    import pandas

    return str(pandas.Timedelta(step)).removeprefix("0 days ") if isinstance(step, np.timedelta64) else str(step)
