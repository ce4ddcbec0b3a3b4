"""nf4 on the Triton backend, in Python: the definition's bits, inside its tensors, and its mutants."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from peft_fast.backends.triton import nf4 as backend
from peft_fast.kernels import nf4 as kernels
from peft_fast.ops import Adapter, lora_quantized, nf4
from tests.kernels.interpreted.addresses import addresses
from tests.kernels.launches import empty
from tests.nf4_writer import FP4, NF4, write

SHAPES = [(1, 1), (3, 7), (40, 333), (64, 128)]
pytestmark = pytest.mark.usefixtures("poisoned_memory", "no_call_left_to_torch")


def weights(shape):
    """Blocks of any length, also one that ends within a byte, scales nested or not."""
    torch.manual_seed(shape[1])
    for blocksize in (3, 32, 64, 4096):
        for nested in (False, True):
            yield write(torch.randn(shape), FP4 if blocksize == 32 else NF4, blocksize, nested)


def wrong(shape, dtype):
    """Weights that are not the definition's, rounded once."""
    return [
        W
        for W in weights(shape)
        if not torch.equal(
            nf4.dequantize(W, dtype, backend="triton"), nf4.dequantize(W, torch.float32, backend="reference").to(dtype)
        )
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition_rounded_once(shape, dtype):
    assert not wrong(shape, dtype)


# what the kernel says -> what it says with the fault
MUTANTS = {
    "halves swapped": ("pair >> 4", "pair & 15"),
    "one scale for two blocks": ("(first + 1) // size", "first // size"),
    "another block": ("first // size, mask", "first // size // 2, mask"),
    "nested without its offset": (" + tl.load(offset_ptr)", ""),
    "one outer scale": ("block // inner", "block // inner * 0"),
    "the last values": ("mask=at < n)", "mask=at < n - 1)"),
    "the second program's bytes": ("tl.program_id(0).to(tl.int64) * BYTES", "tl.program_id(0).to(tl.int64) * 2"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_dies(name, root, tmp_path, monkeypatch):
    old, new = MUTANTS[name]
    text = (root / "kernels" / "nf4.py").read_text()
    assert text.count(old) == 1, "the kernel has changed: plant this fault anew"
    path = tmp_path / "mutated_nf4.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated_nf4", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(backend, "kernels", lambda: SimpleNamespace(dequantize=module.dequantize))
    assert wrong((130, 170), torch.float32)


def test_none_of_them():
    assert not wrong((130, 170), torch.float32)


def test_of_a_layer():
    """lora_quantized, whose weight this makes, is lora_linear with the dense one."""
    W = write(torch.randn(40, 72), nested=True)
    x, A, B = torch.randn(9, 72, requires_grad=True), torch.randn(4, 72), torch.randn(40, 4)
    y = lora_quantized(x, W, None, [Adapter(A, B, 2.0)], backend="triton")
    expected = x @ (W.dense(torch.float32) + 2.0 * B @ A).T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (truth,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(dx, truth, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [3, 64])
@pytest.mark.parametrize("nested", [False, True])
def test_past_two_billion_values(size, nested):
    N, K = (1 << 26) + 1, 33
    blocks = -(-N * K // size)
    data, code = empty(-(-N * K // 2), dtype=torch.uint8), empty(16, dtype=torch.float32)
    absmax = empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    inner = (empty(256, dtype=torch.float32), empty(-(-blocks // 256), dtype=torch.float32), code[:1], 256)
    with addresses(corners=[kernels]) as found:
        W = kernels.dequantize(data, absmax, code, size, (N, K), torch.bfloat16, inner if nested else None)
    (launch,) = found
    for tensor in (W, data, absmax):
        assert max(seen.high for seen in launch if seen.tensor is tensor) == tensor.numel() - 1
