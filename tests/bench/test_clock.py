"""GPU timing on a simulated GPU: a queue that runs behind the host, events that read its time."""

import contextlib

import pytest
import torch

from peft_fast.benchmarks import clock, harness

CUDA = torch.device("cuda")


class Gpu:
    """A host and a device clock in seconds; work is queued by the host and runs in order."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, seconds, host=1e-5):
        self.host += host
        self.device = max(self.device, self.host) + seconds

    def synchronize(self, device=None):
        self.host = max(self.host, self.device)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            gpu.launch(0.0, host=1e-6)
            self.at = gpu.device

        def query(self):
            return gpu.host >= self.at

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class Cold:
        def zero_(self):
            gpu.launch(1e-4)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(cycles / 2e9))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: gpu.host)
    monkeypatch.setattr(clock, "_cold", lambda device: Cold())
    clock._cycles_per_second.cache_clear()
    yield gpu
    clock._cycles_per_second.cache_clear()


def test_events_see_the_kernels_and_not_the_host(gpu):
    """Eight launches of 2 µs that take the host 30 µs each are 16 µs of work."""

    def work():
        for _ in range(8):
            gpu.launch(2e-6, host=30e-6)

    assert clock.seconds(work, CUDA) == pytest.approx(16e-6, rel=0.1)


def test_a_backlog_that_is_too_short_is_made_longer(gpu):
    timed = clock.Device(CUDA, 1e-4)
    timed.start()
    gpu.launch(1e-6, host=5e-3)
    timed.stop("forward")
    timed.read()
    assert timed.starved and clock.longer(timed) == pytest.approx(1e-2, rel=0.1)


def test_work_that_is_timed_as_it_is_launched(gpu):
    timed = clock.Device(CUDA, 0.0)
    timed.start()
    gpu.launch(1e-6, host=5e-3)
    timed.stop("step")
    ((_, wall, _),) = timed.read()
    assert wall >= 4e-3 and not timed.starved


def provider(gpu, host, **more):
    phases = {name: lambda: gpu.launch(2e-5, host=host) for name in ("forward", "backward")}
    return harness.Provider("layer", phases, **more)


def test_the_harness_takes_a_starved_sample_again(gpu):
    layer, samples = provider(gpu, host=4e-3), {}
    harness._sample(layer, 2, CUDA, samples)
    assert samples["total"]["wall"] == [pytest.approx(4e-5, rel=0.2)]
    assert layer.backlog > 1e-2 and not layer.starved


def test_a_provider_that_waits_for_the_gpu_itself_is_named(gpu):
    def reads_a_value():
        gpu.launch(2e-5)
        gpu.synchronize()
        gpu.launch(2e-5, host=1e-3)

    layer, samples = harness.Provider("layer", {"forward": reads_a_value}), {}
    harness._sample(layer, 1, CUDA, samples)
    assert layer.starved and len(samples["total"]["wall"]) == 1


def test_many_short_runs_do_not_overflow_the_queue(gpu):
    assert harness._warm(provider(gpu, host=1e-5), CUDA, "full") == harness.MOST_RUNS["cuda"]


# ---- what the harness does with providers that fail


class Silent:
    def __getattr__(self, name):
        return lambda *args: None

    @contextlib.contextmanager
    def progress(self, cases):
        yield self


def plain(name, forward=lambda: torch.ones(2, requires_grad=True).sum(), **more):
    return harness.Provider(name, {"forward": forward}, **more)


def fails():
    raise RuntimeError("an illegal instruction\nand a long story")


def too_large():
    raise torch.cuda.OutOfMemoryError("too large")


TINY = harness.Options(scale="tiny")


@pytest.mark.parametrize("forward", [fails, too_large])
def test_an_optional_provider_that_fails_leaves_the_row(forward):
    case = harness.Case("case", {}, lambda: [plain("frozen"), plain("peft_fast x", forward, optional=True)], 1)
    document = harness.run("toy", [case], TINY, Silent())
    (row,) = document["rows"]
    assert set(row["providers"]) == {"frozen"} and list(row["left_out"]) == ["peft_fast x"]
    assert "\n" not in row["left_out"]["peft_fast x"]
    (refused,) = document["refused"]  # ours that fails is more than a note
    assert refused["title"] == "case: peft_fast x"


def test_a_peer_that_fails_is_a_note():
    case = harness.Case("case", {}, lambda: [plain("frozen"), plain("theirs", fails, optional=True)], 1)
    document = harness.run("toy", [case], TINY, Silent())
    assert document["refused"] == [] and "theirs" in document["rows"][0]["left_out"]


def test_an_error_on_the_cpu_is_a_bug_and_is_raised():
    case = harness.Case("case", {}, lambda: [plain("frozen", fails)], 1)
    with pytest.raises(RuntimeError, match="illegal"):
        harness.run("toy", [case], TINY, Silent())


def test_a_smaller_case_is_tried_where_memory_ends():
    small = harness.Case("half", {}, lambda: [plain("frozen")], 1)
    large = harness.Case("whole", {}, too_large, 1, smaller=small)
    document = harness.run("toy", [large], TINY, Silent())
    assert [row["title"] for row in document["rows"]] == ["half"]
    assert document["skipped"] == ["whole: out of memory"]
