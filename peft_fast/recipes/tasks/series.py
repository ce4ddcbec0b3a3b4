"""Rows of time, value and series into arrays in the order of time; seasons; the calendar as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

ONLY = ""  # name of the series where there is but one
LONGEST_SEASON = 400
LONG = ((28, 31, 1), (89, 92, 3), (365, 366, 12))  # days from … to: months
CLEAR = 0.2  # autocorrelation of a season that is one


@dataclasses.dataclass
class Series:
    """One series in the order of time."""

    name: str
    values: np.ndarray  # (n, C) float64
    times: np.ndarray  # (n,) datetime64[ns], or int64 where time is a number
    places: np.ndarray  # (n,) the rows it comes from

    @property
    def dated(self) -> bool:
        """Whether time is a date."""
        return np.issubdtype(self.times.dtype, np.datetime64)

    @property
    def step(self) -> Any:
        """The time from one row to the next, as most rows have it."""
        steps, counts = np.unique(np.diff(self.times), return_counts=True)
        return steps[counts.argmax()] if len(steps) else np.diff(np.array([0, 1], self.times.dtype))[0]

    def future(self, count: int) -> np.ndarray:
        """The next ``count`` times; months and years are as long as they are."""
        if self.dated and len(self.times) > 1:
            import pandas

            days = self.step / np.timedelta64(1, "D")
            if months := next((count for low, high, count in LONG if low <= days <= high), 0):
                last = pandas.Timestamp(self.times[-1])
                grown = [last + pandas.DateOffset(months=months * (i + 1)) for i in range(count)]
                return np.array(grown, dtype="datetime64[ns]")
        return self.times[-1] + self.step * np.arange(1, count + 1)


def parsed(cells: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Times of cells, and which of them are none: numbers if all are numbers, else dates."""
    import pandas

    words = pandas.Series(
        [None if cell is None or str(cell).strip() == "" else str(cell) for cell in cells], dtype=object
    )
    numbers = pandas.to_numeric(words, errors="coerce")
    if numbers.notna().all() and (numbers == numbers.round()).all():
        years = numbers.between(1000, 3000).all() and numbers.is_unique
        if not years:
            return numbers.to_numpy().astype(np.int64), np.zeros(len(words), bool)
        words = numbers.astype(int).astype(str)
    dates = pandas.to_datetime(words, errors="coerce", format="mixed", utc=True).dt.tz_localize(None)
    return dates.to_numpy().astype("datetime64[ns]"), dates.isna().to_numpy()


def grouped(rows: Dataset) -> list[Series]:
    """Every series of the rows, sorted by time."""
    times, _ = parsed(list(rows["time"]))
    values = np.array([value if isinstance(value, list) else [value] for value in rows["value"]], dtype=np.float64)
    names = [str(name) for name in rows["series"]] if "series" in rows.column_names else [ONLY] * len(times)
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(name, []).append(place)
    made = []
    for name, places in found.items():
        order = np.array(places)[np.argsort(times[places], kind="stable")]
        made.append(Series(name, values[order], times[order], order))
    return made


def season_of(values: np.ndarray) -> int:
    """The lag at which a series (n,) is most like itself, beyond its trend; 1 if there is none."""
    n = len(values)
    if n < 8 or not np.ptp(values):
        return 1
    flat = values - np.polyval(np.polyfit(np.arange(n), values, 1), np.arange(n))
    power = np.abs(np.fft.rfft(flat, 2 * n)) ** 2
    likeness = np.fft.irfft(power)[: min(LONGEST_SEASON, n // 2) + 1]
    if likeness[0] <= 0:
        return 1
    # the sum at a lag has fewer terms the longer the lag
    likeness = likeness / likeness[0] * n / (n - np.arange(len(likeness)))
    peaks = [i for i in range(2, len(likeness) - 1) if likeness[i - 1] < likeness[i] >= likeness[i + 1]]
    clear = [i for i in peaks if likeness[i] > CLEAR]
    if not clear:
        return 1
    best = max(likeness[i] for i in clear)
    return next(i for i in clear if likeness[i] >= best - 0.05)  # of multiples of a season the season


def seasonal_naive(past: np.ndarray, horizon: int, season: int) -> np.ndarray:
    """(n, C) -> (horizon, C): the last season again and again."""
    season = season if season <= len(past) else 1  # without a whole season behind it, the last value
    return past[len(past) - season + np.arange(horizon) % season]


def calendar(series_times: np.ndarray, start: int, count: int) -> np.ndarray:
    """(n,) times -> (n, count): the first of hour, weekday, day of the year, of the month, each -½ … ½; and the age."""
    n = len(series_times)
    parts = np.zeros((n, 4))
    if np.issubdtype(series_times.dtype, np.datetime64):
        import pandas

        dates = pandas.DatetimeIndex(series_times)
        parts[:, 0] = (dates.hour + dates.minute / 60) / 24 - 0.5
        parts[:, 1] = dates.day_of_week / 6 - 0.5
        parts[:, 2] = (dates.day_of_year - 1) / 365 - 0.5
        parts[:, 3] = (dates.day - 1) / 30 - 0.5
    age = np.log10(2.0 + start + np.arange(n))[:, None]
    # a model with one feature gets its age, as those of the field do
    return np.concatenate([parts[:, : count - 1], age], 1) if count else np.zeros((n, 0))


CALENDAR = 5  # features that `calendar` has at most


def windows(found: list[Series], past: int, horizon: int) -> Iterator[tuple[int, int]]:
    """(which series, first row) of every window of ``past`` and ``horizon`` rows."""
    for which, one in enumerate(found):
        for start in range(len(one.values) - past - horizon + 1):
            yield which, start
