"""outcome.json: what became of PEFT's own tests without and with peft_fast, a line for each file of them.

It is put together from runs of one file or of many: a file that is run again replaces its line, which has the commit
that it was run with, and other versions of the packages begin anew, so that all lines are of those that it names.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.peft_suite import suite
from tests.peft_suite.suite import Outcome

PACKAGES = ("peft", "transformers", "torch", "peft_fast")
ALWAYS = ("passed", "failed", "skipped")


def versions() -> dict[str, str]:
    """Package -> version as it is released, without what a build of it adds."""
    import peft_fast

    return {name: peft_fast.__version__ if name == "peft_fast" else _released(name) for name in PACKAGES}


def _released(name: str) -> str:
    return version(name).partition("+")[0]


def line(select: str, off: dict[str, Outcome], on: dict[str, Outcome]) -> dict:
    """What is kept of one file's two runs."""
    return {
        "select": select,
        "stock": _counts(off),
        "accelerated": _counts(on),
        "failed_by": dict(sorted(Counter(_kind(o) for o in off.values() if o.outcome == "failed").items())),
        "differing": sorted(suite.differing(off, on)),
        "fast_calls": sum(o.fast for o in on.values()),
    }


def _counts(outcomes: dict[str, Outcome]) -> dict[str, int]:
    found = Counter(o.outcome for o in outcomes.values())
    others = sorted(found.keys() - set(ALWAYS))
    return {"tests": len(outcomes), **{name: found[name] for name in (*ALWAYS, *others)}}


def _kind(outcome: Outcome) -> str:
    return outcome.error.partition(":")[0]


def add(path: Path, file: str, select: str, off: dict[str, Outcome], on: dict[str, Outcome], commit: str) -> dict:
    """Writes a file's line, of a run that began at ``commit``, into the record at ``path`` -> the record."""
    known = json.loads(path.read_text()) if path.exists() else {}
    now = versions()
    files = known["files"] if known.get("versions") == now else {}
    files[file] = {"commit": commit, **line(select, off, on)}
    record = {"versions": now, "files": dict(sorted(files.items()))}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in record["files"].items())
    path.write_text(f'{{\n "versions": {json.dumps(now)},\n "files": {{\n{lines}\n }}\n}}\n')
    return record


def problems(record: dict, peft: str) -> list[str]:
    """What is wrong with a record for this version of PEFT, in sentences."""
    if list(record) != ["versions", "files"] or list(record["versions"]) != list(PACKAGES) or not record["files"]:
        return ["not a record: versions and files"]
    out = []
    if record["versions"]["peft"] != peft:
        out.append(f"a record of PEFT {record['versions']['peft']}, but {peft} is pinned")
    for name, entry in record["files"].items():
        out += [f"{name}: {problem}" for problem in _problems_of(entry)]
    if not any(entry.get("fast_calls") for entry in record["files"].values()):
        out.append("no file made a fast call")
    return out


def _problems_of(entry: dict) -> list[str]:
    if list(entry) != ["commit", "select", "stock", "accelerated", "failed_by", "differing", "fast_calls"]:
        return ["other fields than a line has"]
    out = []
    for way in ("stock", "accelerated"):
        counts = entry[way]
        if not {"tests", *ALWAYS} <= counts.keys() or any(type(n) is not int or n < 0 for n in counts.values()):
            out.append(f"{way}: no counts of tests, {', '.join(ALWAYS)}")
        elif counts["tests"] != sum(counts.values()) - counts["tests"]:
            out.append(f"{way}: outcomes that do not add up to {counts['tests']} tests")
        if counts.get("not collected"):
            out.append(f"{way}: cannot be imported, so nothing was compared")
    if not entry["commit"] or entry["commit"].endswith("+"):
        out.append("not of a commit, but of sources that nobody else has")
    if entry["select"] not in ("lora", "all"):
        out.append(f"a choice of tests that nobody knows: {entry['select']!r}")
    if sum(entry["failed_by"].values()) != entry["stock"].get("failed"):
        out.append("reasons of failures that do not add up")
    if entry["differing"]:
        out.append("ended differently: " + ", ".join(entry["differing"]))
    elif entry["stock"] != entry["accelerated"]:
        out.append("other counts, but no test that differs")
    if type(entry["fast_calls"]) is not int or entry["fast_calls"] < 0:
        out.append("no count of fast calls")
    return out
