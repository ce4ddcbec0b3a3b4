"""A GPU record as a page of its own: targets, layers with every plan, training steps, how the steps went."""

from __future__ import annotations

from collections import Counter

from . import machine
from .table import ALL, OPS, SINGLE, cells, lora_linear, of_op, single, train_step


def page(found: dict) -> str:
    """The record as Markdown."""
    goals = [["target", "needed", "found", ""], ["---"] * 4]
    goals += [[t["name"], t["need"], t["found"], t["verdict"]] for t in found["targets"]]
    went = [["step", "status", "seconds", ""], ["---"] * 4]
    went += [[s["name"], s["status"], f"{s['seconds']:g}", s["note"].replace("|", "/")] for s in found["steps"]]
    runs = [run for run in found["runs"] if run["rows"]]
    parts = [f"# {machine.line(found['machine'])}"]
    if found["scale"] != "full":
        parts += ["A dry run with toy sizes on a CPU: it proves the script and measures nothing."]
    parts += ["\n".join(map(cells, goals))]
    parts += ["## One layer: forward / backward, multiples of the frozen layer's", lora_linear(runs, ALL)]
    for op, title in OPS.items():
        parts += [f"## {title}"] * any(run["bench"] == op for run in runs) + [of_op(op, runs, ALL)]
    for bench, title in SINGLE.items():
        parts += [f"## {title}", single(bench, runs)] * any(run["bench"] == bench for run in runs)
    parts += ["## One training step: multiples of the frozen step", train_step(runs, ALL)]
    parts += ["\n".join(lines) for lines in (_clocks(found), _without_figures(found["runs"])) if lines]
    parts += ["## Steps", "\n".join(map(cells, went))]
    return "\n\n".join(parts) + "\n"


def _clocks(found: dict) -> list[str]:
    """What the card did while something was measured."""
    units = {"sm_mhz": ("MHz", "most_sm_mhz"), "watts": ("W", "most_watts"), "celsius": ("°C", "")}
    lines = []
    for step in found["steps"]:
        if step["name"] not in ("lora_linear", *OPS, *SINGLE, "train_step") or "clocks" not in step:
            continue
        parts = []
        for name, (unit, limit) in units.items():
            if name in step["clocks"]:
                low, mid, high = step["clocks"][name]
                most = f" of {found['limits'][limit]:g}" if limit in found.get("limits", {}) else ""
                parts.append(f"{mid:g} {unit} ({low:g}–{high:g}{most})")
        lines.append(f"- clocks during {step['name']}: {', '.join(parts)}")
    return lines


def _without_figures(runs: list[dict]) -> list[str]:
    """Rows and providers that a reader may miss, with the reason."""
    lines, refusing = [], Counter()
    for run in runs:
        lines += [f"- no time for or no room: {title}" for title in run.get("skipped", ())]
        lines += [f"- refused: {r['title']}: {' '.join(r['reason'].split())}" for r in run.get("refused", ())]
        lines += [f"- {why}" for why in run.get("kernel_failures", ())]
        for row in run["rows"]:
            left = row.get("left_out", {}).items()
            refusing.update((n, w) for n, w in left if n in row.get("not_for_these", ()))
            # ours that failed are among the refused
            lines += [f"- {row['title']}: without {n}: {' '.join(w.split())}" for n, w in left if "peft_fast" not in n]
            if "starved" in row:
                lines += [f"- {row['title']}: the GPU waited for the host in {', '.join(row['starved'])}"]
    lines += [f"- {n}, {count} rows: {' '.join(w.split())}" for (n, w), count in refusing.items()]
    return ["## Without figures", "", *lines] if lines else []
