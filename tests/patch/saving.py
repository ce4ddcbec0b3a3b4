"""Lives with peft_fast and without, and the files that they leave: what tests of saved bytes share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import torch as safetensors
from torch import nn

import peft_fast
from tests.patch.test_dora import trained
from tests.patch.test_embedding import TOKENS, Model, V
from tests.patch.test_experts import BOTH, Layer, tokens
from tests.patch.test_groups import Attention
from tests.patch.test_merged import Tied
from tests.patch.test_options import llama
from tests.patch.toys import Toy, conv1d, inputs, stock, tensor_of

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
IDS = torch.randint(1, 67, (4, 7), generator=torch.Generator().manual_seed(0))


class Kind(NamedTuple):
    """A model under LoRA, what it reads, and how far two trainings of it lie apart."""

    base: Callable[[], nn.Module]
    targets: list[str]
    x: torch.Tensor = inputs(dtype=F64).detach()
    config: dict = {}
    dtype: torch.dtype = F64
    rtol: float = 1e-9

    def bare(self):
        torch.manual_seed(0)
        return self.base().to(self.dtype)

    def make(self):
        base = self.bare()
        if any(type(m).__name__ == "Conv2d" for m in base.modules()):
            base = base.to(memory_format=torch.channels_last)  # the one order that is fast in float64
        config = {"r": 4, "init_lora_weights": False, "target_modules": self.targets, **self.config}
        return trained(get_peft_model(base, LoraConfig(**config)))


IMAGE = torch.randn(2, 24, 6, 5, generator=torch.Generator().manual_seed(1)).double()
TURNED = {"fan_in_fan_out": True}
UP_DOWN = ["up", "down"]
LINEAR = Kind(Toy, UP_DOWN)
LLAMA = Kind(
    lambda: llama(layers=1)[1],
    ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"],
    IDS,
    {"modules_to_save": ["lm_head"]},
)
KINDS = {
    "linear": LINEAR,
    "trained biases": Kind(Toy, UP_DOWN, config={"bias": "all", "lora_bias": True}),
    "Conv1D": Kind(lambda: Toy(conv1d), UP_DOWN, config=TURNED),
    "embedding and head": Kind(Tied, ["embed", "head", "body"], TOKENS % 23),
    "convolution": Kind(
        lambda: nn.Sequential(nn.Conv2d(24, 40, 1)), ["0"], IMAGE.to(memory_format=torch.channels_last)
    ),
    "siblings": Kind(Attention, ["q", "k", "v"]),
    "Llama": LLAMA,
    "experts": Kind(Layer, [], tokens().detach(), {"target_parameters": BOTH}, F32, 1e-4),
    "DoRA": Kind(Toy, UP_DOWN, config={"use_dora": True}),
    "DoRA Conv1D": Kind(lambda: Toy(conv1d), UP_DOWN, config={"use_dora": True, **TURNED}),
    "DoRA embedding": Kind(lambda: Model(lambda: nn.Embedding(V, 32)), ["embed"], TOKENS, {"use_dora": True}),
    "bfloat16 base": Kind(Toy, UP_DOWN, inputs(dtype=BF16).detach(), {}, BF16, 2e-2),
}


def in_dtype(kind, dtype):
    if dtype is kind.dtype:
        return kind
    x = kind.x.to(dtype) if kind.x.is_floating_point() else kind.x
    return kind._replace(x=x, dtype=dtype, rtol=1e-4)


def steps(model, x, n=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(n):
        y = tensor_of(model(x))
        y.to(torch.promote_types(y.dtype, F32)).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def both_ways(make, life, x):
    """The same life twice -> (the accelerated model, the stock one)."""
    ours, twin = make(), make()
    with stock():
        twin = life(twin, x) or twin
    peft_fast.accelerate(ours)
    ours = life(ours, x) or ours
    report = peft_fast.report(ours)
    assert report.fast_calls and not report.handed_back, report.handed_back
    return ours, twin


def written(model, folder):
    """Path in the folder -> bytes, of every file of every adapter."""
    model.save_pretrained(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_files(got, expected, rtol=None):
    """The same names and bytes; with rtol the weights need not be equal, but their keys, dtypes and shapes."""
    assert got.keys() == expected.keys()
    for name, data in got.items():
        if rtol is None or not name.endswith(".safetensors"):
            assert data == expected[name], f"{name} is not byte-identical"
            continue
        ours, theirs = safetensors.load(data), safetensors.load(expected[name])
        assert {k: (t.dtype, t.shape) for k, t in ours.items()} == {k: (t.dtype, t.shape) for k, t in theirs.items()}
        for key, t in ours.items():
            worst, most = (t - theirs[key]).abs().max(), theirs[key].abs().max()
            assert worst <= rtol * most, f"{key} of {name} is off by {worst:.3g}, the largest value is {most:.3g}"


def assert_files_are_pefts(ours, twin, folder, rtol, save=written):
    """Leaves ours restored, the twin with its weights, and the files of all adapters in folder/ours."""
    files = save(ours, folder / "ours")
    assert any(name.endswith(".safetensors") for name in files)
    with stock():
        assert_same_files(files, save(twin, folder / "twin"), rtol)
    twin.load_state_dict(ours.state_dict())
    with stock():
        assert_same_files(save(twin, folder / "same weights"), files)
    with peft_fast.disabled():
        assert_same_files(save(ours, folder / "disabled"), files)
    peft_fast.restore(ours)
    assert_same_files(save(ours, folder / "restored"), files)


def assert_loads(ours, kind, folder):
    """The files in a fresh stock model: the bits of ours without acceleration, for each adapter."""
    with stock(), torch.no_grad():
        fresh = None
        for name in ours.peft_config:
            place = folder if name == "default" else folder / name
            if fresh is None:
                fresh = PeftModel.from_pretrained(kind.bare(), place, adapter_name=name)
            else:
                fresh.load_adapter(place, name)
        for name in ours.peft_config:
            ours.eval().set_adapter(name)
            fresh.eval().set_adapter(name)
            assert torch.equal(tensor_of(fresh(kind.x)), tensor_of(ours(kind.x))), name
