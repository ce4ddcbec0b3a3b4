"""`python -m peft_fast doctor`: what is here, which backends are live, which are not, why, and what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from pathlib import Path

from peft_fast.cli import gpu
from peft_fast.errors import PeftFastError, UnsupportedError, fail

NEEDED = {
    "torch": ("2.11", ""),
    "transformers": ("5", "to fine-tune its models"),
    "peft": ("0.19", "to have adapters at all"),
    "accelerate": ("1", "for the Trainer"),
    "triton": ("3.6", "for the kernels on a GPU"),
}
WITHOUT_GPU = {"triton"}  # not needed where torch sees none
CPU_FLAGS = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}


def app(args: list[str], prog_name: str) -> int:
    """Prints the report, as tables or as JSON."""
    parser = argparse.ArgumentParser(prog=prog_name, description="What is here, what is live, what to do.")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(args)
    if importlib.util.find_spec("torch") is None:
        fail(UnsupportedError, "a Python without torch", "torch >= 2.11", "run `pip install 'torch>=2.11'`")
    from peft_fast import settings

    wrong = settings.set_aside()
    report = gather()
    report["to_do"] = wrong + report["to_do"]
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return 1 if wrong else 0


def gather() -> dict:
    """Everything doctor knows, as plain JSON types."""
    report = {
        "versions": versions(),
        "machine": machine(),
        "extension": extension(),
        "backends": backends(),
        "gpu_kernels": gpu.facts(),
        "peft_forward": peft_forward(),
        "settings": settings_rows(),
    }
    report["to_do"] = to_do(report)
    return report


# ---- what is here


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def versions() -> list[dict]:
    """One row a package: name, installed version or None, the least that is needed, and what for."""
    rows = [{"name": "python", "version": platform.python_version(), "needs": "3.10", "ok": True, "for": ""}]
    for name, (least, purpose) in NEEDED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        ok = bool(version) and _numbers(version) >= _numbers(least) if least else True
        ok = ok or (name in WITHOUT_GPU and not _sees_gpu())
        rows.append({"name": name, "version": version, "needs": least, "ok": ok, "for": purpose})
    from peft_fast import __version__

    return [{"name": "peft_fast", "version": __version__, "needs": "", "ok": True, "for": ""}, *rows]


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _cpuinfo() -> tuple[str, set[str]]:
    """(model name, flags) of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1) if model else platform.machine(), set(flags.group(1).split()) if flags else set()


def machine() -> dict:
    """Processor, instruction sets found and used, threads, memory, GPU."""
    import torch

    from peft_fast import native

    model, flags = _cpuinfo()
    # the extension asks the processor itself; /proc answers where there is no extension
    has = native.capabilities() or {name: flags.issuperset(need) for name, need in CPU_FLAGS.items()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    has_memory = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if has_memory else 0
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "cores": cores,
        "memory_gib": round(memory / 2**30, 1),
        "isa_found": [name for name in CPU_FLAGS if has.get(name)],
        "isa_used": native.isa(),
        "torch_threads": torch.get_num_threads(),
        **gpu.machine(),
    }


def extension() -> dict:
    """What peft_fast/build_info.json says, whether it loads, and whether the sources changed since."""
    from peft_fast import build, native

    info = build.read_info()
    try:
        changed = bool(info.get("sources_hash")) and info["sources_hash"] != build.sources_hash()
    except build.CannotBuild:
        changed = False
    return {"loads": native.load(), "why_not": native.reason(), "sources_changed": changed, "build": info}


def backends() -> list[dict]:
    """name, live, and why (not), in the order they are tried."""
    from peft_fast import dispatch

    return [{"name": name, "live": live, "why": why} for name, live, why in dispatch.backends()]


def peft_forward() -> dict:
    """Whether PEFT's LoRA forward is one that the patch knows; if not, every call goes to PEFT."""
    from peft_fast.patch import forward_known

    try:
        known, why = forward_known()
    except (PeftFastError, ImportError) as error:
        return {"known": None, "why": str(error).splitlines()[0].removeprefix("given: ")}
    return {"known": known, "why": why}


def settings_rows() -> list[dict]:
    """Each setting: its value now, the variable that changes it, and whether it differs from the default."""
    import dataclasses

    from peft_fast import settings

    default = dataclasses.asdict(settings.Settings())
    rows = []
    for name, value in dataclasses.asdict(settings.get()).items():
        variable = "PEFT_FAST_CACHE" if name == "cache_dir" else f"PEFT_FAST_{name.upper()}"
        text = "not set" if value is None else str(value)
        rows.append({"name": name, "value": text, "variable": variable, "changed": value != default[name]})
    return rows


# ---- what to do


def to_do(report: dict) -> list[str]:
    """One sentence for each thing that keeps this machine from its best; empty when there is none."""
    todo = []
    for row in report["versions"]:
        if not row["ok"]:
            have = f"{row['name']} {row['version']} is too old" if row["version"] else f"{row['name']} is missing"
            todo.append(f"{have} ({row['for']}): pip install '{row['name']}>={row['needs']}'")
    extension = report["extension"]
    if not extension["loads"]:
        build = extension["build"]
        known = build.get("reason") and f"no C++ kernels, because {build['reason']}: {build['do']}"
        todo.append(known or f"no C++ kernels: {extension['why_not']}")
    elif extension["sources_changed"]:
        todo.append("the C++ kernels are older than their sources: run `python -m peft_fast build`")
    if report["peft_forward"]["known"] is False:
        todo.append(f"every call goes to PEFT itself, because {report['peft_forward']['why']}")
    if any(row["name"] == "disable" and row["value"] == "True" for row in report["settings"]):
        todo.append("PEFT_FAST_DISABLE is set, so nothing is accelerated: unset it")
    return todo + gpu.to_do(report)


# ---- how it looks

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def tables(report: dict) -> list[Table]:
    """(title, header, rows) of every table on the screen."""
    machine, extension = report["machine"], report["extension"]
    build = extension["build"]
    found = ", ".join(machine["isa_found"]) or "none beyond the portable code"
    gpus = "; ".join(machine["gpus"]) or ("a card without a driver" if machine["gpu_cards"] else "none")
    state = {True: "loaded", False: "not loaded"}[extension["loads"]]
    ext = [("state", state if extension["loads"] else f"{state}: {extension['why_not']}")]
    if build:
        ext += [("built", f"{build['date']}, Python {build['python']}, torch {build.get('torch', 'not found')}")]
        ext += [("compiler", build.get("compiler_version", "none"))]
    if cuda := build.get("cuda"):
        made = "for {}, and PTX {} for later ones".format(cuda["archs"].replace(";", ", "), cuda.get("ptx"))
        ext += [("CUDA kernels", made if cuda["archs"] else f"none: {cuda['reason']}")]
    if extension["loads"]:
        ext += [("sources", "changed since: build again" if extension["sources_changed"] else "the same as built")]
    known = {True: "known", False: "not known", None: "cannot be seen"}[report["peft_forward"]["known"]]
    why = report["peft_forward"]["why"]
    return [
        (
            "versions",
            ("package", "installed", "needed", "for"),
            [_version_row(row) for row in report["versions"]],
        ),
        (
            "machine",
            ("", ""),
            [
                ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"),
                ("instruction sets", f"{found}; used: {machine['isa_used']}"),
                ("torch threads", str(machine["torch_threads"])),
                ("GPU", gpus + f"; torch: CUDA {machine['torch_cuda'] or 'none'}"),
                ("system", machine["system"]),
            ],
        ),
        *gpu.table(report["gpu_kernels"]),
        ("C++ kernels", ("", ""), ext),
        (
            "backends, in the order they are tried",
            ("backend", "state", "why"),
            [(row["name"], "live" if row["live"] else "off", row["why"]) for row in report["backends"]],
        ),
        ("PEFT", ("", ""), [("LoRA forward", f"{known}: {why}" if why else known)]),
        (
            "settings",
            ("setting", "value", "variable", ""),
            [(r["name"], r["value"], r["variable"], "changed" if r["changed"] else "") for r in report["settings"]],
        ),
    ]


def _version_row(row: dict) -> tuple[str, str, str, str]:
    state = row["version"] or "not installed"
    return (
        row["name"],
        state if row["ok"] else f"{state} !",
        row["needs"] and f">= {row['needs']}",
        row["for"],
    )


def show(report: dict) -> None:
    """Prints the tables with rich, or without it where it is not installed."""
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError:
        _show_plain(report)
        return
    console = rich.console.Console(highlight=False)
    for title, header, rows in tables(report):
        table = rich.table.Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=rich.box.SIMPLE_HEAD if any(header) else None,
            show_header=any(header),
            pad_edge=True,
        )
        for index, name in enumerate(header):
            table.add_column(name, style="cyan" if index == 0 else None, overflow="fold")
        for row in rows:
            table.add_row(*(_coloured(cell) for cell in row))
        console.print(table)
        console.print()
    if report["to_do"]:
        console.print("what to do", style="bold")
        for index, line in enumerate(report["to_do"], 1):
            console.print(f" {index}. {line}", markup=False)
    else:
        console.print("nothing to do: everything this machine offers is in use", style="green")


def _coloured(cell: str):
    from rich.text import Text

    bad = (
        cell in ("off",)
        or cell.endswith(" !")
        or cell.startswith(("not loaded", "not known", "changed since", "failed"))
    )
    good = cell in ("live", "loaded", "agrees") or cell.startswith("known")
    return Text(cell, style="red" if bad else "green" if good else "")


def _show_plain(report: dict) -> None:
    for title, header, rows in tables(report):
        print(title)
        rows = [header, *rows] if any(header) else rows
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        for row in rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print()
    print("\n".join(["what to do", *(f" {i}. {line}" for i, line in enumerate(report["to_do"], 1))]))
