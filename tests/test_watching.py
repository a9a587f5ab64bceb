"""What trackers are told in training: by site and mode, at logging steps alone; training does not change."""

import pytest
import torch
from transformers import TrainerCallback

import tiny
from training import watching
from training.arguments import FASTrainingArguments
from training.evaluate import SpikeMonitor
from training.evaluate.rows import TaskMetric, for_trainer
from training.evaluate.trainer import evaluate_trainer
from training.layout import label
from training.trainers import FASCalibrationTrainer, FASTrainer


class Tracker(TrainerCallback):
    """Keeps what a tracker would."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))

    def of_sites(self):
        return [(step, logs) for step, logs in self.logs if any("/" in name for name in logs)]


def rows(count=8):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, tiny.VOCABULARY, (count, 7), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 3} for i, row in enumerate(ids)]


def train(trainer_class, model, folder, callbacks=(), **settings):
    args = FASTrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    quality = for_trainer(TaskMetric("mnli"))
    trainer = trainer_class(model, args, train_dataset=rows(), callbacks=list(callbacks), **quality)
    trainer.train()
    return trainer


def test_every_site_is_told_at_logging_steps_alone(tmp_path, monkeypatch):
    measured, scalars = [], watching.site_scalars
    monkeypatch.setattr("training.trainers.site_scalars", lambda *args: measured.append(1) or scalars(*args))
    tracker, model = Tracker(), tiny.model("classify")
    trainer = train(FASTrainer, model, tmp_path, [tracker])
    assert [step for step, _ in tracker.of_sites()] == [2, 4] and len(measured) == 2
    told = tracker.of_sites()[-1][1]
    with SpikeMonitor(model.eval()) as monitor, torch.no_grad():
        model(**{name: value for name, value in trainer.last_inputs.items() if name != "labels"})
    assert told["spike_rate/qcfs/all"] == pytest.approx(monitor.spike_rate)
    for name, neuron in model.neurons():
        site = monitor.sites[name]
        wanted = {"spike_rate": site.rate, "threshold": neuron.threshold.item()}
        wanted["dead_share"] = float((site.spikes == 0).double().mean())
        for what, value in wanted.items():
            assert told[f"{what}/qcfs/{label(name)}"] == pytest.approx(value), what
        assert f"saturated_share/qcfs/{label(name)}" in told and f"site_error/qcfs/{label(name)}" not in told
    assert all("/" not in name for entry in trainer.state.log_history for name in entry)


def test_calibration_tells_site_errors_and_potentials_under_its_own_mode(tmp_path):
    tracker, model = Tracker(), tiny.model("classify").begin_calibration(3)
    trainer = train(FASCalibrationTrainer, model, tmp_path, [tracker])
    told = tracker.of_sites()[-1][1]
    assert all("/stepwise_T3/" in name for name in told)
    for name, neuron in model.neurons():
        assert told[f"site_error/stepwise_T3/{label(name)}"] == pytest.approx(trainer.last_errors[name].item())
        assert told[f"threshold/stepwise_T3/{label(name)}"] == pytest.approx(neuron.fine_threshold.mean().item())
        assert told[f"initial_potential/stepwise_T3/{label(name)}"] == pytest.approx(
            neuron.initial_potential.mean().item()
        )


def test_being_watched_changes_nothing_and_nobody_who_watches_costs_nothing(tmp_path, monkeypatch):
    settings = {"hidden_dropout_prob": 0.1}
    watched, alone = (tiny.model("classify", **settings).train() for _ in range(2))
    train(FASTrainer, watched, tmp_path / "a", [Tracker()])
    monkeypatch.setattr("training.trainers.site_scalars", lambda *args: pytest.fail("nobody asked"))
    train(FASTrainer, alone, tmp_path / "b")
    for (name, left), right in zip(watched.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_every_mode_of_an_evaluation_has_a_tag_of_its_own(tmp_path):
    tracker = Tracker()
    trainer = train(FASTrainer, tiny.model("classify"), tmp_path, [tracker])
    tracker.logs.clear()
    found = evaluate_trainer(trainer, {"validation": rows()}, [2])
    tags = {name for _, logs in tracker.logs for name in logs if name.endswith("_accuracy")}
    assert tags == {f"eval_{tag}_accuracy" for tag in ("qcfs", "stepwise_T2", "layerwise_T2")}
    assert all({"accuracy", "loss", "examples"} == row["quality"].keys() for row in found)


def test_tensorboard_gets_a_curve_for_every_site(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, which is not among the dependencies")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    train(FASTrainer, tiny.model("classify"), tmp_path, [TensorBoardCallback()])
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    tag = "train/spike_rate/qcfs/0 intermediate_act_fn"
    assert [each.step for each in events.Scalars(tag)] == [2, 4]
