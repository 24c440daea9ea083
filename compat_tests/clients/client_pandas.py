"""pandas: a DataFrame cut into pieces that workers transform and group, and put together again."""

from typing import Any

import numpy as np
import pandas as pd

from compat_tests.clients.doors import Doors, worked, workload


def _frame() -> Any:
    rng = np.random.default_rng(7)
    return pd.DataFrame({"kind": rng.choice(["a", "b", "c"], 20_000), "value": rng.normal(size=20_000),
                         "when": pd.date_range("2024-01-01", periods=20_000, freq="min")})


def transform(frame: Any) -> Any:
    worked()
    return frame.assign(rank=frame["value"].rank(), hour=frame["when"].dt.hour, kind=frame["kind"].str.upper())


def describe(group: Any) -> Any:
    worked()
    kind, frame = group
    return pd.Series({"kind": kind, "mean": frame["value"].mean(), "last": frame["when"].max()})


def _plain(frame: Any) -> Any:
    return [str(kind) for kind in frame.dtypes], frame.to_dict("list"), list(frame.index)


@workload
def pieces(doors: Doors) -> Any:
    frame = _frame()
    with doors.Pool() as pool:
        return _plain(pd.concat(pool.map(transform, [frame.iloc[at:at + 2500] for at in range(0, 20_000, 2500)])))


@workload
def groups(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return _plain(pd.DataFrame(list(executor.map(describe, _frame().groupby("kind")))))
