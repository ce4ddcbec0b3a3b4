"""Saved and peak bytes are exact, shown on graphs small enough to count by hand."""

import torch

from peft_fast.benchmarks import memory

MIB = 2**20
CPU = torch.device("cpu")


def test_saved_bytes_of_a_known_graph():
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB
    w = torch.randn(1024, 1024, requires_grad=True)  # 4 MiB, a parameter
    held = []

    def forward():
        h = torch.relu(x @ w)  # saves x and w for the product, h (1 MiB) for the relu
        held.append((h * h).sum())  # h again, twice

    assert memory.saved_bytes(forward, [w]) == 2 * MIB
    assert memory.saved_bytes(forward, [w, x]) == 1 * MIB
    assert memory.saved_bytes(forward, []) == 6 * MIB


def test_a_saved_view_counts_its_whole_storage():
    buffer = torch.randn(512, 1024, requires_grad=True)  # 2 MiB
    held = []
    assert memory.saved_bytes(lambda: held.append(buffer[:1].exp() * buffer[1:2]), []) == 2 * MIB + 4096


def test_nothing_saved_without_gradients():
    x = torch.randn(64, 64)
    assert memory.saved_bytes(lambda: x @ x, []) == 0


def test_saving_changes_no_result():
    x = torch.randn(8, 8, requires_grad=True)
    out = []
    memory.saved_bytes(lambda: out.append((x.exp() * x).sum()), [])
    out[0].backward()
    assert torch.allclose(x.grad, x.detach().exp() * (1 + x.detach()))


def test_peak_bytes_on_cpu():
    def step():
        a = torch.empty(MIB, dtype=torch.uint8)
        b = torch.empty(2 * MIB, dtype=torch.uint8)  # 3 MiB alive
        del a
        c = torch.empty(MIB // 2, dtype=torch.uint8)
        del b, c

    assert memory.peak_bytes(step, CPU) == 3 * MIB


def test_peak_bytes_sees_temporaries_inside_operators():
    x = torch.randn(256, 1024)  # 1 MiB, alive before: not counted
    # var_mean in float64 would be invisible from outside; a broadcast copy is not
    peak = memory.peak_bytes(lambda: (x.t() @ x.double().float()).sum(), CPU)
    assert peak >= 1024 * 1024 * 4 + MIB
