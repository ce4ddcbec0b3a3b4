"""Loaded into pytest while it runs PEFT's own tests: switches peft_fast on or leaves it, writes down every outcome.

The folder that holds PEFT's tests is a package called `tests` as well, so this file imports nothing of ours but the
package under test.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types

import pytest

ON = os.environ["PEFT_SUITE_ON"] == "1"
SELECT = os.environ.get("PEFT_SUITE_SELECT", "lora")
DONE = frozenset(json.loads(os.environ.get("PEFT_SUITE_DONE", "[]")))
SECONDS = int(os.environ.get("PEFT_SUITE_SECONDS", "300"))
# of these files every test, of the others those that say LoRA or DoRA somewhere in their name
WHOLE = (
    *("lora", "mixed", "arrow", "initialization", "low_level", "trainable_tokens", "target_parameters", "helpers"),
    *("tuners_utils", "integrations", "vision", "other"),
)

_results = open(os.environ["PEFT_SUITE_RESULTS"], "a", buffering=1)  # noqa: SIM115 (open as long as the process)
_outcomes: dict[str, dict] = {}


class Everything(dict):
    """What hub_online_once takes for its list of models that were fetched already: it then stays offline."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return 0


def _write(**record):
    _results.write(json.dumps(record) + "\n")


def pytest_configure(config):
    try:
        import diffusers  # noqa: F401
    except ImportError:
        # the tests import one name of it at the top, or its version; whatever uses that needs a model from the hub
        sys.modules["diffusers"] = types.ModuleType("diffusers")
        sys.modules["diffusers"].__version__ = "0.0"
        sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    import tests.testing_utils

    tests.testing_utils._HUB_MODEL_ACCESSES = Everything()
    tests.testing_utils.load_cat_image = _image
    tests.testing_utils.load_dataset_english_quotes = _quotes
    if ON:
        import peft_fast.auto  # noqa: F401


def _image():
    """In place of a photograph on the hub, which one file loads while it is imported."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))


def _quotes():
    """In place of a data set of quotations on the hub."""
    import datasets

    words = "one may say of it that the more often it is said the less it says".split()
    rows = [{"quote": " ".join(words[: 4 + i % 11]), "author": "nobody", "tags": ["none"]} for i in range(40)]
    return datasets.DatasetDict(train=datasets.Dataset.from_list(rows))


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if item.nodeid not in DONE and _selected(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _selected(item) -> bool:
    file = item.nodeid.partition("::")[0]
    name = item.nodeid.lower()
    return SELECT == "all" or "lora" in name or "dora" in name or any(word in file for word in WHOLE)


def pytest_collectreport(report):
    if report.failed:
        _write(test=report.nodeid, outcome="not collected", error=str(report.longrepr)[-300:], fast=0, slow=0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    _write(started=item.nodeid)
    before = _calls()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        record = _outcomes.pop(item.nodeid, {"outcome": "no report", "error": ""})
        fast, slow = _calls()
        _write(test=item.nodeid, **record, fast=fast - before[0], slow=slow - before[1])


def _too_long(*_):
    raise TimeoutError(f"longer than {SECONDS} s")


def _calls() -> tuple[int, int]:
    if not ON:
        return 0, 0
    import peft_fast

    report = peft_fast.report()
    return report.fast_calls, sum(report.handed_back.values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    known = _outcomes.get(item.nodeid)
    outcome = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    elif report.failed and report.when != "call":
        outcome = f"error in {report.when}"
    if known is None or known["outcome"] == "passed":
        error = "" if call.excinfo is None else f"{call.excinfo.typename}: {str(call.excinfo.value)[:300]}"
        _outcomes[item.nodeid] = {"outcome": outcome, "error": error}
    return report
