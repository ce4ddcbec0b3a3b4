"""The GPU targets, judged on a document's rows: met, missed, or not measured; a figure and the row it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import kinds
from .shapes import ALONE, GPU_SQUARE, LAYER, OPS

LIMIT, AIM = 1.10, 1.06  # adapted / frozen at the headline shape
LAYER_LIMIT = 1.05  # and of a whole decoder layer, its siblings and its block joined
JOINED = {"peft_fast": "layer by layer"}
# times stock's speed at least, and of the experts' memory a half at most
REACH = {
    "lora_experts": ("a mixture's experts", 4.0),
    "dora_linear": ("DoRA's layers", 3.0),
    "lora_mixed": ("16 adapters in a batch", 4.0),
}
LEAN = 0.5
GENERATION = 1.10  # of merged weights' time
# ours -> the stock PEFT with adapters of the same dtype
PAIRS = {"peft_fast": "stock", "peft_fast bf16": "stock bf16", "peft_fast fp16": "stock fp16"}


class Target(NamedTuple):
    """`met` is None where nothing was measured that it speaks of."""

    name: str
    need: str
    found: str
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def judge(runs: Sequence[dict]) -> list[Target]:
    """The targets of a set of documents, layers first; toy sizes measure nothing."""
    runs = [run for run in runs if run["scale"] != "tiny"]
    layers = [row for run in runs if run["bench"] == "lora_linear" for row in run["rows"] if "providers" in row]
    steps = [row for run in runs if run["bench"] == "train_step" for row in run["rows"] if "providers" in row]
    joined = [row for run in runs if run["bench"] in OPS for row in run["rows"] if "providers" in row]
    whole = [row for row in steps if not _is(row, model=LAYER)]
    alone = {bench: _first_table(bench, runs) for bench in (*ALONE, "generate")}
    M, K, N = GPU_SQUARE
    usual = [row for row in layers if _is(row, r=16)]  # more ranks are more arithmetic, however they are computed
    headline = [row for row in usual if _is(row, M=M, K=K, N=N)]
    where = f"adapted / frozen, M={M} K={K} N={N} r=16"
    return [
        _worst(where, headline, LIMIT),
        _worst(f"{where}, the aim", headline, AIM),
        _worst("adapted / frozen, every layer with r=16", usual, AIM),
        _worst("adapted / frozen, a whole model forward and backward", whole, AIM),
        _worst("adapted / frozen, a Llama-3-8B layer", [row for row in steps if row not in whole], LAYER_LIMIT),
        _slower("never slower than stock: layers", layers),
        _slower("never slower than stock: groups, blocks, embeddings", joined),
        _slower("never slower than stock: training steps", steps),
        *(_slower(f"times stock's speed: {what}", alone[op], need=need) for op, (what, need) in REACH.items()),
        _share("peak memory / stock's: a mixture's experts", alone["lora_experts"], LEAN),
        _worst("generation with adapters on / merged", alone["generate"], GENERATION),
        _slower("never slower than layer by layer: groups and blocks", joined, pairs=JOINED),
        _slower("never slower than layer by layer: training steps", steps, pairs=JOINED),
        _slower("the host launches a layer no slower than stock's", layers, "cpu_ms"),
    ]


def _first_table(bench: str, runs: Sequence[dict]) -> list[dict]:
    """A benchmark's rows; what has a table of its own has no target."""
    rows = [row for run in runs if run["bench"] == bench for row in run["rows"] if "providers" in row]
    return [row for row in rows if not kinds.heading(bench, row["settings"])]


def lines(found: Sequence[Target]) -> list[list[str]]:
    """One row of cells a target, for any table."""
    return [[target.name, target.need, target.found, target.word] for target in found]


def _is(row: dict, **settings: int | str) -> bool:
    return all(row["settings"].get(name) == value for name, value in settings.items())


def _ours(rows: Sequence[dict], pairs: dict[str, str]) -> Iterator[tuple[dict, str]]:
    return ((row, name) for row in rows for name in pairs if name in row["providers"])


def _worst(name: str, rows: Sequence[dict], limit: float) -> Target:
    """The largest ratio to frozen of what dispatch runs, forward and backward together."""
    ratios = [(_ratio(row["providers"], ours), _label(row, ours)) for row, ours in _ours(rows, PAIRS)]
    if not ratios:
        return Target(name, f"<= {limit:.2f}", "", None)
    kept = sum(ratio <= limit for ratio, _ in ratios)
    worst, label = max(ratios)
    many = f"{kept} of {len(ratios)}; " if len(ratios) > 1 else ""
    return Target(name, f"<= {limit:.2f}", f"{many}worst {worst:.3f} ({label})", kept == len(ratios))


def _ratio(providers: dict, ours: str) -> float:
    """Without the optimizer's update, of which the frozen model has none."""
    if "update" not in providers[ours]:
        return providers[ours]["total"]["ratio"][0]
    mine, frozen = (sum(providers[n][phase]["ms"] for phase in ("forward", "backward")) for n in (ours, "frozen"))
    return mine / frozen


def _share(name: str, rows: Sequence[dict], limit: float) -> Target:
    """The largest peak of ours as a share of its pair's."""
    shares = [
        (row["bytes"][ours]["peak"] / max(1, row["bytes"][PAIRS[ours]]["peak"]), _label(row, ours))
        for row, ours in _ours(rows, PAIRS)
        if PAIRS[ours] in row["bytes"]
    ]
    if not shares:
        return Target(name, f"<= {limit:.2f}", "", None)
    kept = sum(share <= limit for share, _ in shares)
    worst, label = max(shares)
    return Target(name, f"<= {limit:.2f}", f"{kept} of {len(shares)}; worst {worst:.3f} ({label})", kept == len(shares))


def _slower(
    name: str, rows: Sequence[dict], time: str = "ms", pairs: dict[str, str] = PAIRS, need: float = 1.0
) -> Target:
    """The least theirs / ours, by medians, each of ours against its pair: stock with adapters of the same dtype."""
    speeds = []
    for row, ours in _ours(rows, pairs):
        stock = row["providers"].get(pairs[ours])
        if stock:
            least = 1e-4  # milliseconds: a document has no more digits
            theirs, mine = (max(p["total"][time], least) for p in (stock, row["providers"][ours]))
            speeds.append((theirs / mine, _label(row, ours)))
    if not speeds:
        return Target(name, f">= {need:.2f}", "", None)
    kept = sum(speed >= need for speed, _ in speeds)
    least, label = min(speeds)
    return Target(name, f">= {need:.2f}", f"{kept} of {len(speeds)}; least {least:.3f} ({label})", kept == len(speeds))


def _label(row: dict, name: str) -> str:
    s = row["settings"]
    what = f"{s['M']}×{s['K']}×{s['N']} r={s['r']}" if "N" in s else s.get("shape", s["model"])
    return f"{name}, {what} p={s['p']:g}"
