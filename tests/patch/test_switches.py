"""accelerate, restore, report, enable, disable, disabled: what they change and leave, and their errors."""

import copy
import functools
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import peft_fast
from peft_fast import ops, settings
from peft_fast.errors import PeftFastError, UnsupportedError
from peft_fast.patch import guard, known, ledger, marks, plan, switch
from tests.patch.toys import K, Toy, assert_fast, both, inputs, layers, toy


def plain_peft(**config):
    """A PEFT model nobody has accelerated."""
    torch.manual_seed(0)
    return get_peft_model(Toy(), LoraConfig(target_modules=["up", "down"], init_lora_weights=False, **config))


def fast_now(model):
    return both(model, inputs())[2]


def test_accelerate_gives_the_same_object_and_says_what_is_fast(capsys):
    model = plain_peft()
    with settings.override(quiet=False):
        assert peft_fast.accelerate(model) is model
    assert capsys.readouterr().out == "peft_fast: 2 of 2 LoRA layers are fast\n"
    peft_fast.accelerate(model)
    assert capsys.readouterr().out == ""  # quiet
    assert_fast(model, inputs())


def test_accelerate_twice_and_restore_once():
    model = plain_peft()
    peft_fast.accelerate(peft_fast.accelerate(model))
    assert fast_now(model) == 2
    assert peft_fast.restore(model) is model
    assert plan.Linear.forward is plan.stock_linear
    assert not any(marks.MARK in m.__dict__ for m in model.modules())
    assert peft_fast.report(model).fast_calls == 0
    peft_fast.restore(model)
    peft_fast.accelerate(model)
    assert fast_now(model) == 2


def test_only_the_accelerated_model_is_fast():
    student, teacher = toy(), plain_peft()
    assert fast_now(student) == 2 and fast_now(teacher) == 0
    assert peft_fast.report(teacher).handed_back == {}
    assert set(peft_fast.report(teacher).slow.values()) == {"not asked for: call peft_fast.accelerate(model)"}
    peft_fast.accelerate(teacher)
    peft_fast.restore(student)
    assert fast_now(student) == 0 and fast_now(teacher) == 2
    peft_fast.restore(teacher)
    assert plan.Linear.forward is plan.stock_linear


def test_enable_and_disable_are_for_the_whole_process():
    peft_fast.enable()
    peft_fast.enable()
    model, marked = plain_peft(), toy()
    assert fast_now(model) == fast_now(marked) == 2
    peft_fast.restore(marked)
    assert fast_now(marked) == 2
    peft_fast.disable()
    assert plan.Linear.forward is plan.stock_linear
    peft_fast.accelerate(marked)
    assert fast_now(model) == 0 and fast_now(marked) == 2
    peft_fast.disable()
    assert fast_now(marked) == 0
    assert all("peft_fast.disable()" in reason for reason in peft_fast.report(marked).slow.values())
    peft_fast.enable()
    assert fast_now(model) == fast_now(marked) == 2


def test_disabled_nests_and_counts():
    model = toy()
    with peft_fast.disabled():
        assert fast_now(model) == 0
        with peft_fast.disabled():
            assert fast_now(model) == 0
        assert fast_now(model) == 0
        assert peft_fast.report(model).handed_back == {"inside `with peft_fast.disabled()`": 2}
    assert fast_now(model) == 2
    with pytest.raises(KeyError), peft_fast.disabled():
        raise KeyError
    assert fast_now(model) == 2


def test_disabled_from_many_threads():
    model = toy()

    def work():
        for _ in range(200):
            with peft_fast.disabled():
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert marks.state.paused == 0 and fast_now(model) == 2


def test_peft_fast_disable_hands_everything_back():
    model = toy()
    with settings.override(disable=True):
        assert fast_now(model) == 0
        assert peft_fast.report(model).handed_back == {"PEFT_FAST_DISABLE is set": 2}
        assert set(peft_fast.report(model).slow.values()) == {"PEFT_FAST_DISABLE is set"}
    assert fast_now(model) == 2


def test_report_counts_calls_and_prints_them():
    model = toy(lora_dropout=0.1)
    before, process = ops.fast_calls(), peft_fast.report()
    for _ in range(3):
        model(inputs())
    with model.disable_adapter():
        model(inputs())
    model.base_model.model.up.lora_B["default"].register_forward_hook(lambda m, args, y: None)
    report = peft_fast.report(model)
    assert report.fast == ("base_model.model.down",)
    hooked = "hooks or a replaced forward on lora_A, lora_B or lora_dropout"
    assert report.slow == {"base_model.model.up": hooked}
    assert report.fast_calls == 6 == ops.fast_calls() - before
    assert report.handed_back == {"the adapters are disabled": 2}
    assert str(report).splitlines() == [
        "peft_fast: 1 of 2 LoRA layers are fast",
        f"  1 with PEFT: {hooked} (base_model.model.up)",
        "peft_fast: 6 fast calls, 2 handed back to PEFT",
        "  2 times: the adapters are disabled",
    ]
    after = peft_fast.report()
    assert after.fast_calls - process.fast_calls == 6 and after.handed_back["the adapters are disabled"] >= 2
    assert str(after).startswith("peft_fast: ")


def test_a_collected_model_leaves_nothing_behind():
    import gc

    gc.collect()
    others = len(ledger._layers)  # of a model that another test file keeps
    model = toy()
    model(inputs())
    assert len(ledger._layers) == others + 2
    del model
    gc.collect()
    assert len(ledger._layers) == others


@pytest.mark.parametrize(
    "make, given",
    [
        (lambda: nn.Linear(2, 2), "a Linear without a LoRA layer of PEFT"),
        (lambda: Toy(), "a Toy without a LoRA layer of PEFT"),
        (
            lambda: get_peft_model(Toy(), IA3Config(target_modules=["up"], feedforward_modules=[])),
            "a PeftModel",
        ),
        (lambda: "a/path", "a str"),
        (lambda: None, "a NoneType"),
    ],
    ids=["layer", "model", "another tuner", "path", "None"],
)
def test_a_model_without_lora_is_refused_and_nothing_is_patched(make, given):
    model = make()
    for function in (peft_fast.accelerate, peft_fast.report)[: 1 if model is None else 2]:
        with pytest.raises(UnsupportedError) as error:
            function(model)
        lines = str(error.value).splitlines()
        assert [line.partition(":")[0] for line in lines] == ["given", "needed", "do"]
        assert given in lines[0]
    assert plan.Linear.forward is plan.stock_linear
    if isinstance(model, nn.Module):
        assert peft_fast.restore(model) is model
        assert not any(marks.MARK in m.__dict__ for m in model.modules())


def test_only_layers_without_fast_path_is_not_an_error(capsys):
    model = get_peft_model(nn.Sequential(nn.Conv1d(5, K, 3)), LoraConfig(target_modules=["0"]))
    with settings.override(quiet=False):
        peft_fast.accelerate(model)
    assert "0 of 1 LoRA layers are fast" in capsys.readouterr().out


@pytest.fixture
def judged_again():
    known._judge.cache_clear()
    switch._warn.cache_clear()
    yield
    known._judge.cache_clear()


def test_this_peft_is_known():
    why = f"PEFT {known.peft_version()} has the forward of 0.20.0 to 0.21.2"
    assert peft_fast.patch.forward_known() == (True, why)


def test_unknown_peft_source_warns_once_and_touches_nothing(monkeypatch, judged_again):
    monkeypatch.setattr(known, "KNOWN", {"0123456789abcdef": "another release"})
    model = plain_peft()
    with pytest.warns(UserWarning, match="leaves every layer to PEFT: PEFT .* does not know"):
        assert peft_fast.accelerate(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_fast.accelerate(model)
        peft_fast.enable()
    assert plan.Linear.forward is plan.stock_linear
    report = peft_fast.report(model)
    assert report.fast == () and all("does not know" in reason for reason in report.slow.values())
    assert not any(marks.MARK in m.__dict__ for m in model.modules())


def test_source_that_cannot_be_read(monkeypatch, judged_again):
    def unreadable(function):
        raise OSError("could not get source code")

    monkeypatch.setattr(known.inspect, "getsource", unreadable)
    assert peft_fast.patch.forward_known()[0] is False


def test_another_library_on_the_class_is_left_alone(judged_again):
    """Wrapped before us: nothing is patched. Wrapped after us: restore leaves the wrapper and goes quiet."""
    calls = []

    def wrap(inner):
        @functools.wraps(inner)
        def theirs(self, x, *args, **kwargs):
            calls.append(1)
            return inner(self, x, *args, **kwargs)

        return theirs

    plan.Linear.forward = theirs = wrap(plan.stock_linear)
    model = plain_peft()
    with pytest.warns(UserWarning, match="another library has replaced"):
        peft_fast.accelerate(model)
    model(inputs())
    assert plan.Linear.forward is theirs and len(calls) == 2
    plan.Linear.forward = plan.stock_linear

    peft_fast.accelerate(model)
    plan.Linear.forward = theirs = wrap(guard.forward)
    model(inputs())
    assert len(calls) == 4 and peft_fast.report(model).fast_calls == 2
    peft_fast.restore(model)
    model(inputs())
    assert plan.Linear.forward is theirs and len(calls) == 6 and peft_fast.report(model).fast_calls == 0


def test_errors_without_peft(monkeypatch):
    monkeypatch.setattr(known.importlib.util, "find_spec", lambda name: None)
    for call in (peft_fast.enable, lambda: peft_fast.accelerate(nn.Linear(1, 1))):
        with pytest.raises(PeftFastError, match="pip install peft"):
            call()


def test_public_names_and_a_light_import():
    assert set(peft_fast.__all__) == {
        *("__version__", "accelerate", "restore", "report", "enable", "disable", "disabled", "merged", "train"),
    }
    assert all(getattr(peft_fast, name) is not None for name in peft_fast.__all__)
    assert set(peft_fast.__all__) <= set(dir(peft_fast))
    with pytest.raises(AttributeError, match="no attribute 'accelerat'"):
        _ = peft_fast.accelerat
    code = "import sys, peft_fast; print(peft_fast.__version__, {'torch', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{peft_fast.__version__} set()\n", "")


def test_restore_and_disable_before_anything_was_accelerated():
    code = """if True:
        import peft, torch, peft_fast
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
        peft_fast.disable()
        assert peft_fast.restore(model) is model
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stock_forward_is_what_tools_see():
    import inspect

    toy()
    assert "lora_A_keys" in inspect.getsource(plan.Linear.forward)
    assert inspect.signature(plan.Linear.forward) == inspect.signature(plan.stock_linear)
    assert len(layers(toy())) == 2


def test_a_wrong_variable_raises_before_anything_is_patched(monkeypatch):
    monkeypatch.setattr(settings, "_current", None)
    monkeypatch.setenv("PEFT_FAST_QUIET", "perhaps")
    model = plain_peft()
    for switch_on in (lambda: peft_fast.accelerate(model), peft_fast.enable):
        with pytest.raises(PeftFastError, match="PEFT_FAST_QUIET"):
            switch_on()
        assert plan.Linear.forward is plan.stock_linear
        assert not any(marks.MARK in m.__dict__ for m in model.modules())


def test_restore_leaves_a_copy_fast_that_was_never_called():
    model = toy()
    twin = copy.deepcopy(model)
    peft_fast.restore(model)
    assert_fast(twin, inputs())
    peft_fast.restore(twin)


def test_few_tokens_are_handed_back():
    model = toy()
    with settings.override(min_tokens=128):
        assert both(model, inputs(127, K))[2] == 0
        assert any("few tokens" in reason for reason in peft_fast.report(model).handed_back)
        assert both(model, inputs(4, 32, K))[2] == 2


def test_dropout_without_the_compiled_mask_is_handed_back(monkeypatch):
    model = toy(lora_dropout=0.5).train()
    monkeypatch.setattr(plan, "native_mask", lambda device: False)
    before = ops.fast_calls()
    model(inputs())
    assert ops.fast_calls() == before
    assert any("draw its mask" in reason for reason in peft_fast.report(model).handed_back)
    assert both(model.eval(), inputs())[2] == 2


def test_a_lora_layer_around_another_tuner_is_marked():
    model = toy()
    inner = layers(model)[0]
    outer = nn.Module()
    outer.base_layer = inner
    assert marks.marked(outer)
