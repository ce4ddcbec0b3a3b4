"""RecipeTrainer: batches that depend on their place alone, losses that do not depend on how rows are batched."""

import itertools

import pytest
import torch

from peft_fast.recipes import run


@pytest.fixture
def prepared(options):
    """prepared(**more options) -> Prepared."""
    return lambda **more: run.prepare(run.resolve(options | more, {}))


@pytest.fixture
def learner(prepared, tmp_path):
    """learner(**more options) -> a RecipeTrainer that has not trained."""
    return lambda **more: run.trainer(prepared(**more), tmp_path / "run" / "checkpoints")


class Lines:
    """Features that are lists of numbers, with a task that draws and cuts."""

    def __init__(self, lengths):
        self.rows = [{"input_ids": list(range(n)), "row": place} for place, n in enumerate(lengths)]

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    length = staticmethod(lambda feature: len(feature["input_ids"]))
    collate = staticmethod(lambda features: torch.rand(3))


def config(**options):
    return run.resolve(dict(task="masked-lm", model="m", data="d", batch_size=4), options)


def order(lengths, epoch=0, **options):
    from peft_fast.recipes.batches import Order

    lines = Lines(lengths)
    made = Order(lines, lines, config(**options))
    made.set_epoch(epoch)
    return list(made)


def test_an_epochs_order_is_its_own_and_nobody_elses():
    lengths = [3, 9, 4, 8, 5, 7, 6, 1] * 8
    for grouped in (True, False):
        one = order(lengths, 3, group_by_length=grouped)
        torch.rand(5)
        assert sorted(one) == list(range(64)) and one == order(lengths, 3, group_by_length=grouped)
        assert one != order(lengths, 4, group_by_length=grouped)
        assert one != order(lengths, 3, group_by_length=grouped, seed=1)


def test_batches_of_like_length():
    lengths = [1 + i % 37 for i in range(400)]

    def padding(places):
        batches = [[lengths[i] for i in places[k : k + 4]] for k in range(0, 400, 4)]
        return sum(max(b) * len(b) - sum(b) for b in batches)

    assert padding(order(lengths)) < padding(order(lengths, group_by_length=False)) / 4


def test_what_a_batch_draws_depends_on_the_batch_alone():
    from peft_fast.recipes.batches import Collator, Order

    lines = Lines([2] * 8)
    places = Order(lines, lines, config())
    collator, judging = Collator(lines, 0, places), Collator(lines, 0)
    state = torch.get_rng_state()
    one = collator(lines.rows[2:4])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(one, collator(lines.rows[2:4])) and not torch.equal(one, collator(lines.rows[4:6]))
    judged = judging(lines.rows[2:4])
    places.set_epoch(1)
    assert not torch.equal(one, collator(lines.rows[2:4])) and torch.equal(judged, judging(lines.rows[2:4]))
    assert not torch.equal(one, Collator(lines, 1, places)(lines.rows[2:4]))


def test_an_evaluation_draws_nothing(learner):
    made = learner()
    state = torch.get_rng_state()
    made.evaluate()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(learner):
    """32 rows in batches of 5, the last of 2: each row counts the same."""
    losses = [learner(eval_batch_size=size).evaluate()["eval_loss"] for size in (5, 32)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulated_batches_weigh_by_their_labels(tiny_bert, tmp_path):
    """Batches of unlike length: a mean of means would count the tokens of short rows more."""
    rows = [("the end", "A A"), ("dull a film is very cold", "B A A A A B"), ("fine the", "B A"), ("a plot", "A A")]
    for name, part in (("train", rows[:2]), ("validation", rows[2:])):
        lines = [f'{{"tokens": "{tokens}", "tags": "{tags}"}}' for tokens, tags in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    options = dict(task="token-classification", model=str(tiny_bert), data=data, dtype="fp32")
    options |= dict(method="full", device="cpu", dropout=0.0, out=str(tmp_path / "run"))
    made = run.prepare(run.resolve(options, {}))
    learner = run.trainer(made, tmp_path / "run")
    one, two = sorted(made.features["train"], key=lambda feature: len(feature["input_ids"]))
    parts = [learner.data_collator(features) for features in ([one], [two, two])]
    whole = learner.data_collator([one, two, two])
    counts = [learner.labels_in(part) for part in parts]
    assert counts[0] < counts[1] and sum(counts) == learner.labels_in(whole)

    def gradient(batches):
        learner.model.zero_grad()
        learner.current_gradient_accumulation_steps = len(batches)
        items = sum(counts) if len(batches) > 1 else None
        learner.model.train()
        losses = [learner.compute_loss(learner.model, batch, num_items_in_batch=items) for batch in batches]
        sum(losses).backward()
        return sum(losses).item(), torch.cat(
            [p.grad.flatten() for p in learner.model.parameters() if p.grad is not None]
        )

    (loss, together), (parted_loss, parted) = gradient([whole]), gradient(parts)
    assert parted_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parted, together, rtol=1e-4, atol=1e-6)


def test_progressive_sizes_grow_in_equal_shares(prepared, tmp_path, at_step):
    widths = []
    # one long row at least in each batch
    options = dict(progressive=[4, 6, 7], epochs=1, batch_size=8, group_by_length=False)
    made = run.trainer(prepared(**options), tmp_path / "run")
    inner = made.training_step
    made.training_step = lambda model, inputs, *rest: (
        widths.append(inputs["input_ids"].shape[1]),
        inner(model, inputs, *rest),
    )[1]
    made.train()
    assert widths == [4] * 4 + [6] * 4 + [7] * 4
    from peft_fast.recipes import result

    assert result.sizes(made.config, 12) == [{"step": 0, "size": 4}, {"step": 4, "size": 6}, {"step": 8, "size": 7}]


def test_tokens_that_were_cut_off_are_not_counted(learn):
    made = learn(progressive=[4], epochs=1)
    assert made.result["throughput"]["units"] == 4 * 96


def test_a_progressive_that_ends_below_the_rows_is_said(prepared):
    sizes = [len(row["input_ids"]) for row in prepared().features["train"]]
    last, longer = max(sizes) - 2, sum(size > max(sizes) - 2 for size in sizes)
    (note,) = prepared(progressive=[4, last]).notes
    assert note.startswith(f"progressive ends at {last} tokens: {longer} of 96 training rows are longer")
    assert note.endswith(f"let it end at {max(sizes)} or more")
    assert prepared(progressive=[4, max(sizes)]).notes == []


@pytest.mark.parametrize(
    "given, evaluations, saves",
    [
        (dict(epochs=2), 6, 6),
        (dict(epochs=2, evaluate_every=5, save_every=3), 5, 3),
        (dict(epochs=2, gradient_accumulation=4, save_every="epoch"), 2, 2),
        (dict(steps=7, evaluate_every="epoch"), 6, 6),
    ],
)
def test_an_epoch_is_counted_in_steps(learner, given, evaluations, saves):
    args = learner(**given).args
    assert (args.eval_steps, args.save_steps) == (evaluations, saves)
    assert {args.eval_strategy, args.save_strategy} == {"steps"}


def test_options_reach_the_trainer(learner):
    made = learner(neftune=5.0, max_grad_norm=0.5, training_arguments={"adam_beta2": 0.9}, keep=3, seed=9)
    args = made.args
    assert (args.neftune_noise_alpha, args.max_grad_norm, args.adam_beta2, args.seed) == (5.0, 0.5, 0.9, 9)
    assert args.eval_on_start and not made.is_in_train


def test_training_arguments_that_are_none(options, tmp_path):
    from peft_fast.errors import SettingsError

    with pytest.raises(SettingsError, match="training_arguments.*adam_beta9"):
        run.train(options, training_arguments={"adam_beta9": 1}, say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_nobody_else_prints(learner):
    names = {type(callback).__name__ for callback in learner().callback_handler.callbacks}
    assert not names & {"PrinterCallback", "ProgressCallback", "NotebookProgressCallback"}


# ---- the line


class Screen:
    quiet = live = False
    own = None

    def say(self, text):
        self.said = text


def progress(step=120, steps=1515):
    from peft_fast.recipes.clock import Clock
    from peft_fast.recipes.progress import Progress

    clock = Clock()
    clock.phases, clock.steps, clock.units = {"step": 60.0, "data": 60.0, "evaluate": 30.0}, 120, 1
    task = type("Task", (), {"unit": "tokens"})
    state = type("State", (), {"num_train_epochs": 3})
    args = type("Args", (), {"eval_steps": 500})
    made = Progress(Screen(), type("Trainer", (), {"clock": clock, "task": task, "state": state, "args": args}))
    made.step, made.steps, made.epoch, made.evaluations = step, steps, 0.24, 1
    made.logged = {"loss": 0.43123, "per_second": 1254.4, "memory_bytes": 2 << 30}
    made.judged = "accuracy 85.3 %"
    return made


def test_the_line_says_the_most_important_first():
    made = progress()
    whole = made.line(200)
    # 1,395 steps of a second each and three evaluations of 30
    for part in ("step 120/1,515", "loss 0.4312", "1,254 tokens/s", "2.00 GiB", "24:45 left", "accuracy 85.3 %"):
        assert part in whole
    for width in range(15, 120, 7):
        line = made.line(width)
        assert len(line) <= width and "step 120/1,515" in line
    assert "loss" in made.line(40) and "GiB" not in made.line(40)


def test_the_lines_memory_is_what_the_summary_means():
    made = progress()
    made.held = 2**31 - 2**28
    assert "  256.0 MiB  " in made.line(200) and "GiB" not in made.line(200)
    made.held = 2**32  # given back since
    assert "  0.0 MiB  " in made.line(200)


def test_what_is_being_done_stands_where_the_time_left_was():
    made = progress()
    made.on_prediction_step(None, None, None, eval_dataloader=[1, 2, 3])
    assert "evaluating 1/3" in made.line(200) and "left" not in made.line(200)


@pytest.mark.parametrize("speed, text", [(0.34, "0.3"), (9.94, "9.9"), (9.96, "10"), (1254.4, "1,254")])
def test_a_slow_run_has_a_speed_too(speed, text):
    made = progress()
    made.logged["per_second"] = speed
    assert f"  {text} tokens/s" in made.line(200)


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (7.4, "0:07"), (252, "4:12"), (3753, "1:02:33")])
def test_time_left(seconds, text):
    from peft_fast.recipes.progress import clock_time

    assert clock_time(seconds) == text


def test_a_terminal_sees_one_line_that_moves():
    import io

    from rich.console import Console

    from peft_fast.recipes.progress import Progress, Screen

    out = io.StringIO()
    screen = Screen(console=Console(file=out, force_terminal=True, width=80, highlight=False))
    assert screen.live
    made = progress()
    moving = Progress(screen, made.trainer)
    moving.on_train_begin(None, type("State", (), {"global_step": 0, "max_steps": 10, "epoch": 0.0}), None)
    moving.on_log(None, None, None, logs=made.logged)
    moving.live.refresh()
    moving.close()
    assert "━" in out.getvalue() or "─" in out.getvalue()
    assert "loss 0.4312" in out.getvalue() and moving.live is None


def test_a_clock_gives_its_time_to_phases(monkeypatch):
    from peft_fast.recipes import clock

    ticks = itertools.count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))
    made = clock.Clock()
    for phase in ("data", "step", "evaluate", "data"):
        made.mark(phase)
    assert made.phases == {"data": 2.0, "step": 1.0, "evaluate": 1.0} and made.seconds == 3.0
    made.units = 12
    assert made.since_last() == 4.0
    made.units, made.phases["step"] = 22, 6.0
    assert made.since_last() == 2.0
    other = clock.Clock()
    other.load(made.state())
    assert other.seconds == made.seconds and other.units == 22
