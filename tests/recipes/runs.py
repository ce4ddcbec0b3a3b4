"""What two runs are compared by, and what lies in a folder: for the tests of whole runs."""

import torch


def weights(made) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def same(one, other) -> bool:
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def course(made) -> list:
    """Everything a run measures that no clock has a part in."""
    timed = ("per_second", "memory_bytes")
    log = [{key: value for key, value in entry.items() if key not in timed} for entry in made.result["log"]]
    return [log, made.result["evaluations"], made.result["best"], made.result["final"]]


def tree(folder) -> dict:
    """Every path below, and what is in the files."""
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}
