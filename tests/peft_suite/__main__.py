"""PEFT's own test-suite without and with peft_fast, compared test by test: `python -m tests.peft_suite`.

Fetches the source distribution of the installed PEFT (its wheel has no tests), puts small random models where its
tests expect the hub's, and runs every file twice, each time in a process of its own, with the tests' few tokens taken
by the fast path. A test that ends differently is run once more both ways before it counts. Exit status 1 if any does,
or if a file cannot be imported, which compares nothing.

`--record tests/peft_suite/outcome.json` keeps the outcomes in the repository, a line a file, whole files only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from peft_fast import settings
from peft_fast.benchmarks import machine
from tests.peft_suite import hub, record, suite


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("files", nargs="*", help="test files, as test_mixed; default: all that need no GPU")
    parser.add_argument("-k", default="", help="pytest's expression")
    parser.add_argument("--all", action="store_true", help="the tests of PEFT's other methods too, not LoRA's alone")
    parser.add_argument("--folder", type=Path, default=settings.get().cache_dir / "peft_suite")
    parser.add_argument("--json", type=Path, help="where the outcomes go; files that are in it already are not run")
    parser.add_argument("--record", type=Path, help="the record that each file's line is written to, when it has run")
    args = parser.parse_args()
    if args.record and (args.k or args.json):
        parser.error("--record is of whole files that are run now: leave -k and --json out")
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    place = args.folder.expanduser()
    with suite.alone(place):
        place = suite.fetch(place)
        for failure in hub.write(place.parent / "hub"):
            print(f"no stand-in for {failure}")
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    select = "all" if args.all else "lora"
    every: tuple[dict, dict] = {}, {}
    commit = machine.commit()  # of what is imported, whatever is committed meanwhile
    for file in suite.files(place, args.files):
        start = time.monotonic()
        if file not in known:
            both = [suite.run(place, file, on, select, args.k, []) for on in (False, True)]
            if differ := list(suite.differing(*both)):
                again = [suite.run(place, file, on, select, "", differ) for on in (False, True)]
                for outcomes, new in zip(both, again, strict=True):
                    outcomes |= new
            known[file] = both
        for outcomes, new in zip(every, known[file], strict=True):
            outcomes |= {test: suite.Outcome(*outcome) for test, outcome in new.items()}
        if args.json:
            args.json.write_text(json.dumps(known))
        off, on = ({t: suite.Outcome(*o) for t, o in new.items()} for new in known[file])
        if args.record:
            recorded = record.add(args.record, file, select, off, on, commit)["files"]
        print(f"== {file} ({time.monotonic() - start:.0f} s)\n{suite.summary(off, on)}", flush=True)
    print(f"== PEFT's own tests\n{suite.summary(*every)}")
    if args.record:
        left = [file for file in suite.files(place, []) if file not in recorded]
        print(f"{len(recorded)} files are recorded in {args.record}" + ", not yet: " * bool(left) + ", ".join(left))
    return int(bool(suite.differing(*every) or suite.uncollected(*every)))


if __name__ == "__main__":
    sys.exit(main())
