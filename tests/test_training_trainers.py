"""Trainers: parameter groups, positive thresholds, gradients that do not depend on how a batch is split."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from configuration_fas import FASBertConfig, FASGPT2Config
from modeling_fas import FASBertForMaskedLM, FASBertForSequenceClassification, FASGPT2LMHeadModel
from neurons_fas import MIN_THRESHOLD
from training.arguments import THRESHOLD_LEARNING_RATES, FASTrainingArguments
from training.calibrate import calibration_loss
from training.checkpoints import whole_or_nothing
from training.trainers import FASCalibrationTrainer, FASTrainer


GOLDEN = json.loads((Path(__file__).parent / "goldens" / "optimizer_groups.json").read_text())
# Our names of the published parameters; those of a dead or duplicate one are left out.
RENAMED = {"thresh": "threshold", "thresh3": "fine_threshold", "dtmem": "initial_potential"}
STAGES = {
    "gpt2_stage1_full_finetune": ("clm", "full"),
    "gpt2_stage2_downstream": ("clm", "downstream"),
    "gpt2_stage3_calibration": ("clm", "calibrate"),
    "bert_stage1_mlm": ("mlm", "full"),
    "bert_stage2_downstream": ("glue", "downstream"),
    "bert_stage3_calibration": ("glue", "calibrate"),
}


def build(kind: str, layers: int = 3, **settings):
    torch.manual_seed(0)
    if kind == "clm":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 16}
        return FASGPT2LMHeadModel(FASGPT2Config(**sizes, initializer_range=0.3, **settings))
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = FASBertConfig(
        **sizes, intermediate_size=32, max_position_embeddings=16, initializer_range=0.3, num_labels=3, **settings
    )
    return (FASBertForMaskedLM if kind == "mlm" else FASBertForSequenceClassification)(config)


def arguments(tmp_path, **settings) -> FASTrainingArguments:
    defaults = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "max_steps": 4}
    return FASTrainingArguments(output_dir=str(tmp_path), **(defaults | settings))


def rows(kind: str, count: int = 8, seed: int = 0) -> list[dict]:
    """Rows of different lengths, and for masked language modelling of different numbers of masked tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = 12 if kind == "clm" else 4 + i
        ids = torch.randint(5, 40, (12,), generator=generator)
        mask = (torch.arange(12) < length).long()
        if kind == "clm":
            labels = ids.clone()
            labels[: i % 5] = -100
        elif kind == "mlm":
            labels = torch.where(torch.arange(12) % (i + 2) == 0, ids, -100)
        else:
            labels = torch.tensor(i % 3)
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize("stage", STAGES)
def test_parameter_groups_are_those_of_the_published_code_but_for_decayed_thresholds(stage, tmp_path):
    script, name = STAGES[stage]
    model = build(script)
    if name == "calibrate":
        model.begin_calibration(2)
    base, rate = 3e-5, THRESHOLD_LEARNING_RATES[script, name]
    trainer_class = FASCalibrationTrainer if name == "calibrate" else FASTrainer
    args = arguments(tmp_path, learning_rate=base, weight_decay=0.1)
    trainer = trainer_class(model=model, args=args, threshold_learning_rate=rate)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        (group["lr"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}
        for group in trainer.create_optimizer().param_groups
    }

    expected: dict = {(base, 0.1): set(), (base, 0.0): set(), (rate, 0.0): set()}
    for group in GOLDEN["stages"][stage]["groups"]:
        for golden in group["params"]:
            head, _, tail = golden.rpartition(".")
            # The published masked-LM script trains the neuron of the head like a weight; here like every neuron.
            if re.search(r"act$|act_fn$|activation$", head):
                if tail in RENAMED and (name == "calibrate") == (tail != "thresh"):
                    expected[rate, 0.0].add(f"{head}.{RENAMED[tail]}")
                elif tail == "thresh2" and name == "calibrate" and script == "clm":
                    expected[rate, 0.0].add(f"{head}.fine_threshold")
                assert group["lr_is"] == "base" or group["lr"] == rate
            else:
                expected[base, 0.1 if group["uses_weight_decay"] else 0.0].add(golden)
    assert found == {key: value for key, value in expected.items() if value}


def test_thresholds_stay_positive_and_every_parameter_moves(tmp_path):
    model = build("glue", layers=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = rows("glue")
    for row in data:
        row["token_type_ids"] = torch.arange(12) % 2
    for _, neuron in model.neurons():
        neuron.threshold.register_hook(torch.ones_like)
    args = arguments(tmp_path, per_device_train_batch_size=8, learning_rate=0.1)
    FASTrainer(model=model, args=args, train_dataset=data, threshold_learning_rate=2.0).train()
    assert [neuron.threshold.item() for _, neuron in model.neurons()] == pytest.approx([MIN_THRESHOLD] * 3)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


def test_calibration_moves_fine_thresholds_and_initial_potentials_alone(tmp_path):
    model = build("glue", layers=2).begin_calibration(2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = arguments(tmp_path, per_device_train_batch_size=8)
    trainer = FASCalibrationTrainer(model, args, train_dataset=rows("glue"), threshold_learning_rate=0.01)
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.endswith(("fine_threshold", "initial_potential"))}
    assert model.config.hidden_dropout_prob == 0.1, "dropout is off while calibrating, not in the configuration"


RATES = [
    # in the arguments, as a keyword, what trains
    (0.05, {}, 0.05),
    (0.05, {"threshold_learning_rate": 0.3}, 0.3),
    (0.05, {"threshold_learning_rate": 0.0}, 0.0),
    (0.0, {}, 0.0),
    (None, {}, 2e-4),
    (None, {"threshold_learning_rate": 0.3}, 0.3),
]


@pytest.mark.parametrize("trainer_class", [FASTrainer, FASCalibrationTrainer])
@pytest.mark.parametrize(("given", "keyword", "rate"), RATES)
def test_thresholds_have_the_rate_of_the_arguments_unless_a_keyword_says_otherwise(
    trainer_class, given, keyword, rate, tmp_path
):
    model = build("clm", layers=1).begin_calibration(2)
    args = arguments(tmp_path, learning_rate=2e-4, threshold_learning_rate=given)
    thresholds = {id(p) for name, p in model.named_parameters() if name.endswith(("threshold", "initial_potential"))}
    groups = trainer_class(model, args, **keyword).create_optimizer().param_groups
    found = {group["lr"] for group in groups if thresholds & {id(p) for p in group["params"]}}
    assert found == {rate}


@pytest.mark.parametrize(
    ("given", "keyword", "weight"),
    [
        (7.0, {}, 7.0),
        (7.0, {"loss_settings": {"site_weight": 3.0}}, 3.0),
        (7.0, {"loss_settings": {"site_weight": 0.0}}, 0.0),
        (7.0, {"loss_settings": {"output_weight": 0.0}}, 7.0),
        (0.0, {}, 0.0),
        (None, {}, 1.0),
        (None, {"loss_settings": {"site_weight": 3.0}}, 3.0),
    ],
)
def test_calibration_weighs_sites_as_the_arguments_say_unless_a_keyword_says_otherwise(
    given, keyword, weight, tmp_path
):
    model = build("clm", layers=1).begin_calibration(2)
    trainer = FASCalibrationTrainer(model, arguments(tmp_path, site_weight=given), **keyword)
    batch = trainer.data_collator(rows("clm"))
    loss = trainer.compute_loss(model.train(), dict(batch))
    settings = keyword.get("loss_settings", {}) | {"site_weight": weight}
    assert loss.item() == pytest.approx(calibration_loss(model, batch, **settings).loss.item(), rel=1e-6)


def test_stock_arguments_train_thresholds_too(tmp_path):
    """`TrainingArguments` know neither setting."""
    model = build("clm", layers=1).begin_calibration(2)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, learning_rate=2e-4)
    trainer = FASCalibrationTrainer(model, args)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {2e-4}
    batch = trainer.data_collator(rows("clm"))
    assert trainer.compute_loss(model.train(), dict(batch)) == calibration_loss(model, batch).loss


def test_calibration_has_no_dropout_and_evaluates_the_task_loss(tmp_path):
    model = build("glue", layers=2).begin_calibration(2)
    trainer = FASCalibrationTrainer(model, arguments(tmp_path), eval_dataset=rows("glue"))
    batch = trainer.data_collator(rows("glue"))
    model.train()
    assert trainer.compute_loss(model, dict(batch)) == trainer.compute_loss(model, dict(batch))
    evaluated = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        logits = model.eval().set_timesteps(2, "stepwise")(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert evaluated == pytest.approx(torch.nn.functional.cross_entropy(logits, batch["labels"]).item(), abs=1e-6)


def test_calibration_is_refused_without_fine_thresholds(tmp_path):
    with pytest.raises(ValueError, match="begin_calibration"):
        FASCalibrationTrainer(build("glue"), arguments(tmp_path))


KINDS = ["glue", "mlm", "calibrate-glue"]
KINDS += [pytest.param(kind, marks=pytest.mark.slow) for kind in ("clm", "calibrate-clm")]


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_the_large_batch(kind, tmp_path):
    gradients = [gradient_of_first_step(kind, tmp_path, size, 8 // size) for size in (8, 4, 1)]
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def gradient_of_first_step(kind: str, tmp_path, size: int, steps: int) -> dict[str, torch.Tensor]:
    """Gradients of one step over 8 rows, in float64: in float32 a rounding error can move a quantisation level."""
    script = kind.rpartition("-")[2]
    model = build(script, layers=2).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer_class = FASTrainer
    if kind.startswith("calibrate"):
        model.begin_calibration(3)
        trainer_class = FASCalibrationTrainer
    args = arguments(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
    )
    trainer = trainer_class(model=model, args=args, train_dataset=rows(script))
    found = {}

    def keep(optimizer, *_):
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    return found


@pytest.mark.parametrize("room", [20_000, 60_000], ids=["fails-at-the-code", "fails-at-the-weights"])
def test_a_full_disk_leaves_what_was_saved_before(room, full_disk, tmp_path):
    model = build("clm", layers=8)
    trainer = FASTrainer(model=model, args=arguments(tmp_path / "run"))
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert len(before["modeling_fas.py"]) < 60_000 < len(before["model.safetensors"])
    model.begin_calibration(2)
    full_disk(room)
    for folder in (tmp_path / "run", tmp_path / "new"):
        with pytest.raises(OSError, match=r"`output_dir` must be a folder with room .*before is unchanged"):
            trainer.save_model(str(folder))
    full_disk()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == []
    trainer.save_model()
    assert FASGPT2LMHeadModel.from_pretrained(tmp_path / "run").config.calib_T == 2


def test_shards_of_an_earlier_model_do_not_stay(tmp_path):
    names = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "evaluation.json")
    for name in names:
        (tmp_path / name).touch()
    with whole_or_nothing(tmp_path) as scratch:
        Path(scratch, "model.safetensors").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "evaluation.json"}
