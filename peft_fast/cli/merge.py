"""`peft-fast merge RUN --out DIR`: a finished run as a plain transformers model."""

from __future__ import annotations

from pathlib import Path

from peft_fast.cli.eval import machine_flags, machine_options
from peft_fast.cli.parser import Parser


def app(args: list[str], prog_name: str = "peft-fast merge") -> int:
    """Writes the model and says what was compared; exit status 0 only when its outputs are the run's."""
    parser = Parser(
        prog=prog_name,
        description="Write a finished run's adapter into its base model: a folder that transformers loads alone. "
        "It is loaded again and its outputs are compared with the run's before it is said to be there.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder that `train` wrote")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the model, new or empty")
    add(
        "--dtype",
        choices=("keep", "fp32", "bf16", "fp16"),
        default="keep",
        help="of its weights (default: that of the frozen weights)",
    )
    add("--overwrite", action="store_true", help="replace what is in that folder")
    machine_flags(parser)
    given = parser.parse_args(args)
    options = machine_options(given)
    from peft_fast.pages import words
    from peft_fast.recipes import use

    found = use.merge(given.run, given.out, given.dtype, given.overwrite, **options)
    print(f"{found['out']}: {found['class']}, {words.count(found['parameters'])} parameters, {found['dtype']}")
    against = "" if found["learnt"] is None else f"; without its adapter the model is {found['learnt']:.1e} away"
    print(f"outputs differ from the run's by {found['difference']:.1e} of their size{against} ({found['asked']})")
    if found["lost"]:
        print(f"note: {found['lost']:.0%} of what was learnt may be lost in the digits of {found['dtype']}")
        print("      --dtype fp32 keeps them, or keep the adapter and its base model apart")
    return 0
