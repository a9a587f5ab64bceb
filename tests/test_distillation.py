"""Distillation: the loss by hand, what trains and what is saved, and the scripts with a teacher."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer

import backbones
from benchmarks import training_processes as processes
from fas import convert_to_spiking
from modeling_fas import FASBertForSequenceClassification, FASGPT2LMHeadModel
from neurons_fas import MIN_THRESHOLD
from test_training_runs import CLM_DATA, GLUE_DATA, flags
from test_training_trainers import arguments
from training import run_clm, run_glue, run_mlm
from training.calibrate import calibration_loss
from training.calibrate.coarse import start_calibration
from training.calibrate.conversion import fit_thresholds
from training.distillation import FASDistillationTrainer
from training.trainers import FASCalibrationTrainer, FASTrainer, idle_parameters, is_threshold
from training_helpers import in_two_processes, save_bert, save_gpt2, sentences, tensors, write_corpus, write_reviews


CAUSAL, TEXTS = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
PHASE = {"code": "phase", "T": 3}


def rows(auto_class: str = CAUSAL, count: int = 8, regression: bool = False) -> list[dict]:
    """Rows of 12, of different numbers of tokens and of labels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        mask = (torch.arange(12) < 12 - i).long()
        ids = torch.randint(2, backbones.VOCABULARY, (12,), generator=generator) * mask
        labels = torch.where((mask > 0) & (torch.arange(12) >= i // 3), ids, -100)
        if auto_class == TEXTS:
            labels = torch.tensor(i / 4 if regression else i % 3)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def pair(backbone: str = "gpt2", auto_class: str = CAUSAL, dtype=torch.float32, labels: int = 3, **settings):
    """A spiking model, converted, and the stock model it was made from."""
    torch.manual_seed(0)
    stock = backbones.stock_class(backbone, auto_class)
    config = backbones.config(backbone, auto_class, num_labels=labels)
    raw = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    config = stock.config_class(**raw)
    config.num_labels = labels
    model, teacher = stock(config).eval(), stock(config).eval()
    teacher.load_state_dict(model.state_dict())
    calibration = torch.stack([row["input_ids"] for row in rows(count=1) * 12])
    calibration = torch.randint(2, backbones.VOCABULARY, calibration.shape)
    student = convert_to_spiking(model, calibration, sites="all", progress=False, **settings)
    return student.to(dtype), teacher.to(dtype)


def loss_of(trainer, batch) -> torch.Tensor:
    return trainer.compute_loss(trainer.model.train(), dict(batch))


def test_the_student_has_no_dropout_as_the_teacher_has_none(tmp_path):
    student, teacher = pair(**PHASE)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    with pytest.raises(ValueError, match="distillation_temperature"):
        FASDistillationTrainer(student, arguments(tmp_path), teacher=teacher, temperature=0.0)
    assert {module.p for module in student.modules() if isinstance(module, nn.Dropout)} == {0.5}, "refused, unchanged"
    trainer = FASDistillationTrainer(student, arguments(tmp_path), teacher=teacher, hidden_weight=1.0)
    batch = trainer.data_collator(rows())
    assert loss_of(trainer, batch) == loss_of(trainer, batch)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_of_a_language_model_is_the_mean_divergence_where_a_next_token_has_a_label(temperature, tmp_path):
    student, teacher = pair(**PHASE)
    trainer = FASDistillationTrainer(student, arguments(tmp_path), teacher=teacher, temperature=temperature)
    batch = trainer.data_collator(rows())
    loss = loss_of(trainer, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        p = (teacher(**inputs).logits / temperature).softmax(-1)
        q = (student(**inputs).logits / temperature).softmax(-1)
    terms = [
        temperature**2 * (p[b, s] * (p[b, s] / q[b, s]).log()).sum()
        for b in range(8)
        for s in range(11)
        if batch["labels"][b, s + 1] != -100 and batch["attention_mask"][b, s]
    ]
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)


def test_alpha_and_the_hidden_states_are_added(tmp_path):
    student, teacher = pair(**PHASE)
    batch = FASTrainer(student, arguments(tmp_path)).data_collator(rows())
    weights = [{}, {"alpha": 0.5}, {"hidden_weight": 2.0}]
    plain, task, hidden = (
        loss_of(FASDistillationTrainer(student, arguments(tmp_path), teacher=teacher, **each), batch).item()
        for each in weights
    )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        own, other = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    cross = F.cross_entropy(own.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert task - plain == pytest.approx(0.5 * cross.item(), rel=1e-4)
    real = batch["attention_mask"].bool()
    errors = [(a - b)[real].square().mean() for a, b in zip(own.hidden_states, other.hidden_states, strict=True)]
    assert hidden - plain == pytest.approx(2 * torch.stack(errors).mean().item(), rel=1e-4)


def test_the_arguments_say_it_too(tmp_path):
    student, teacher = pair(**PHASE)
    args = arguments(tmp_path, distillation_temperature=3.0, distillation_alpha=0.25, hidden_weight=0.0)
    trainer = FASDistillationTrainer(student, args, teacher=teacher, hidden_weight=1.0)
    assert (trainer.temperature, trainer.alpha, trainer.hidden_weight) == (3.0, 0.25, 1.0)


@pytest.mark.parametrize("labels", [1, 3])
def test_the_loss_of_a_classifier_is_a_mean_over_texts_and_a_regression_has_the_squared_error(labels, tmp_path):
    student, teacher = pair("bert", TEXTS, labels=labels, **PHASE)
    trainer = FASDistillationTrainer(student, arguments(tmp_path), teacher=teacher)
    batch = trainer.data_collator(rows(TEXTS, regression=labels == 1))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        own, other = student(**inputs).logits, teacher(**inputs).logits
    expected = (own - other).square().mean()
    if labels == 3:
        p = other.softmax(-1)
        expected = (p * (p.log() - own.log_softmax(-1))).sum(-1).mean()
    assert loss_of(trainer, batch).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("auto_class", [CAUSAL, TEXTS])
def test_padding_takes_no_part(auto_class, tmp_path):
    student, teacher = pair("gpt2" if auto_class == CAUSAL else "bert", auto_class, **PHASE)
    trainer = FASDistillationTrainer(student, arguments(tmp_path), teacher=teacher, hidden_weight=1.0)
    batch = trainer.data_collator(rows(auto_class)[3:5])
    padded = dict(batch)
    ends = {"input_ids": 7, "attention_mask": 0} | ({"labels": 5} if auto_class == CAUSAL else {})
    for name, value in ends.items():
        padded[name] = torch.cat([batch[name], torch.full((2, 4), value)], dim=1)
    torch.testing.assert_close(loss_of(trainer, padded), loss_of(trainer, batch), rtol=1e-5, atol=1e-7)


def test_the_teacher_is_neither_trained_nor_saved_and_every_parameter_that_runs_moves(tmp_path):
    student, teacher = pair(**PHASE, gain="token")
    before, own = ({name: each.clone() for name, each in model.state_dict().items()} for model in (teacher, student))
    teacher.train()
    args = arguments(tmp_path, per_device_train_batch_size=8, learning_rate=1e-3, max_steps=3)
    trainer = FASDistillationTrainer(student, args, teacher=teacher, train_dataset=rows())
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(each, before[name]) for name, each in teacher.state_dict().items())
    optimized = {id(each) for group in trainer.optimizer.param_groups for each in group["params"]}
    assert not optimized & {id(each) for each in teacher.parameters()}
    moved = {name for name, each in student.state_dict().items() if not torch.equal(each, own[name])}
    fine = {name for name in own if name.endswith(("fine_threshold", ".gain"))}
    assert fine <= moved
    assert {name for name in own if name not in moved} == {
        name for name in own if name.endswith(("site.threshold", "initial_potential"))
    }, "what a phase code with fine thresholds has no use for"
    thresholds = trainer.optimizer.param_groups[-1]["params"]
    assert {id(each) for name, each in student.named_parameters() if name in fine} == {id(each) for each in thresholds}
    trainer.save_model()
    assert set(tensors(tmp_path)) == set(own) - {"lm_head.weight"}
    assert all(each.requires_grad for each in student.parameters())


def test_gains_and_fine_thresholds_stay_positive(tmp_path):
    student, teacher = pair(**PHASE, gain="token")
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=1, threshold_learning_rate=100.0)
    FASDistillationTrainer(student, args, teacher=teacher, train_dataset=rows()).train()
    found = [each for name, each in student.named_parameters() if name.endswith(("fine_threshold", ".gain"))]
    assert min(each.min().item() for each in found) == pytest.approx(MIN_THRESHOLD)


def gradients(folder, kind: dict, auto_class: str, size: int) -> dict[str, torch.Tensor]:
    student, teacher = pair("gpt2" if auto_class == CAUSAL else "bert", auto_class, torch.float64, **kind)
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "distillation_alpha": 0.5, "hidden_weight": 0.5}
    args = arguments(folder, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings)
    trainer = FASDistillationTrainer(student, args, teacher=teacher, train_dataset=rows(auto_class))
    found: dict[str, torch.Tensor] = {}

    def keep(*_):
        found.update({n: each.grad.clone() for n, each in student.named_parameters() if each.grad is not None})

    trainer.create_optimizer().register_step_pre_hook(keep)
    trainer.train()
    return found


ACCUMULATED = {"code": "rate", "T": 3, "schedule": "accumulated"}


@pytest.mark.parametrize(("kind", "auto_class"), [(ACCUMULATED, CAUSAL), (PHASE, TEXTS)], ids=["time", "texts"])
def test_accumulated_gradients_are_those_of_the_large_batch(kind, auto_class, tmp_path):
    whole, split = (gradients(tmp_path, kind, auto_class, size) for size in (8, 2))
    assert whole.keys() == split.keys() and any(name.endswith("fine_threshold") for name in whole)
    for name, expected in whole.items():
        torch.testing.assert_close(split[name], expected, rtol=1e-4, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "kind",
    [PHASE, pytest.param({"code": "first_spike", "T": 6}, marks=pytest.mark.slow)],
    ids=["phase", "first_spike"],
)
def test_thirty_steps_bring_a_model_nearer_to_its_teacher(kind, tmp_path):
    student, teacher = pair(**kind)
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=30, learning_rate=1e-3)
    trainer = FASDistillationTrainer(student, args, teacher=teacher, train_dataset=rows(), eval_dataset=rows())
    batch = trainer.data_collator(rows())
    before = loss_of(trainer, batch).item()
    trainer.train()
    assert loss_of(trainer, batch).item() < 0.7 * before
    with torch.no_grad():
        logits = student.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    evaluated = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated.item(), rel=1e-4), "that of the student"


def test_what_cannot_teach_is_refused(tmp_path):
    student, teacher = pair(**PHASE)
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"`teacher` must have weights of its own, got one that shares"):
        FASDistillationTrainer(student, args, teacher=student)
    other = backbones.stock_class("gpt2", CAUSAL)(type(teacher.config)(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    trainer = FASDistillationTrainer(student, args, teacher=other)
    with pytest.raises(ValueError, match=r"`teacher` must give logits of the shape of the model's, .*got"):
        loss_of(trainer, trainer.data_collator([{**row, "input_ids": row["input_ids"] % 50} for row in rows()]))
    small = type(teacher.config)(vocab_size=backbones.VOCABULARY, n_embd=8, n_layer=1, n_head=1)
    small = backbones.stock_class("gpt2", CAUSAL)(small)
    trainer = FASDistillationTrainer(student, args, teacher=small, hidden_weight=1.0)
    with pytest.raises(ValueError, match=r"`hidden_weight` needs a teacher with 4 hidden states"):
        loss_of(trainer, trainer.data_collator(rows()))
    for name, value in {"temperature": 0.0, "alpha": -1.0, "hidden_weight": -1.0}.items():
        with pytest.raises(ValueError, match=rf"{name}` must be .*got {value}"):
            FASDistillationTrainer(student, args, teacher=teacher, **{name: value})
    labelled, teacher = pair("bert", TEXTS, **PHASE)
    teacher.config.id2label = {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}
    teacher.config.label2id = {"LABEL_1": 0, "LABEL_0": 1, "LABEL_2": 2}
    with pytest.raises(ValueError, match="`teacher` must number its labels as the model does"):
        FASDistillationTrainer(labelled, args, teacher=teacher)


def test_idle_parameters_are_those_without_a_gradient():
    for kind in (PHASE, ACCUMULATED, {"code": "rate", "T": 3, "schedule": "layerwise"}):
        student, _ = pair(**kind)
        batch = {name: value for name, value in backbones.batch("gpt2", CAUSAL).items() if name != "position_ids"}
        student(**batch).logits.square().sum().backward()
        idle = {id(each) for each in idle_parameters(student)}
        without = {id(each) for each in student.parameters() if each.grad is None}
        assert idle == without and idle
        assert not [n for n, each in student.named_parameters() if id(each) in idle and not is_threshold(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Calibration of thresholds alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [
        ("gpt2", PHASE),
        ("llama", {"code": "first_spike", "T": 6, "gain": "token"}),
        ("gpt2", ACCUMULATED),
        ("gpt2", {"code": "rate", "T": 3, "schedule": "layerwise"}),
    ],
    ids=["phase", "first_spike", "accumulated", "layerwise"],
)
def test_calibration_of_a_converted_model_lowers_its_loss(backbone, kind, tmp_path):
    student, _ = pair(backbone, **kind)
    before = {name: each.clone() for name, each in student.state_dict().items()}
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=20, threshold_learning_rate=0.01)
    trainer = FASCalibrationTrainer(student, args, train_dataset=rows(), loss_settings={"site_weight": 0.1})
    assert (student.config.T, student.config.schedule) == (kind["T"], kind.get("schedule", "layerwise"))
    batch = trainer.data_collator(rows())
    first = calibration_loss(student, batch, site_weight=0.1).loss.item()
    trainer.train()
    assert calibration_loss(student, batch, site_weight=0.1).loss.item() < first
    moved = {name for name, each in student.state_dict().items() if not torch.equal(each, before[name])}
    own = {"fine_threshold"} | ({"gain"} if "gain" in kind else set())
    own |= {"initial_potential"} if kind["code"] == "rate" else set()
    assert {name.rpartition(".")[2] for name in moved} == own


def test_search_starts_the_calibration_of_a_code(tmp_path):
    torch.manual_seed(0)
    settings = {"sites": "all", "activation": "stock", "L": None, "code": "phase", "schedule": "layerwise"}
    model = backbones.model("gpt2", CAUSAL, **settings).begin_calibration(3)
    stages = start_calibration(FASCalibrationTrainer(model, arguments(tmp_path)).model, rows_as_batch())
    errors = [sum(site["error"] for site in stages[stage].values()) for stage in ("uncalibrated", "coarse")]
    assert errors[1] < 0.9 * errors[0]
    found = [neuron.fine_threshold.detach().clone() for _, neuron in model.neurons()]
    inputs = {name: value for name, value in rows_as_batch().items() if name != "labels"}
    fit_thresholds(model.eval(), inputs, 3, progress=False)
    assert all(torch.equal(each, n.fine_threshold) for each, (_, n) in zip(found, model.neurons(), strict=True))
    model.begin_calibration(3, "layer")
    with pytest.raises(ValueError, match="`granularity` must be 'neuron' to search"):
        start_calibration(model, rows_as_batch())


def rows_as_batch() -> dict[str, torch.Tensor]:
    made = rows()
    return {name: torch.stack([row[name] for row in made]) for name in made[0]}


# ---------------------------------------------------------------------------------------------------------------------
# The scripts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_reviews(folder / "train.json", 32, seed=1)
    write_reviews(folder / "test.json", 10, seed=2)
    write_corpus(folder / "corpus.json", 100, seed=3)
    write_corpus(folder / "held_out.json", 20, seed=4)
    save_bert(folder / "bert", dropout=0.0)
    save_gpt2(folder / "gpt2", dropout=0.0)
    for name in ("gpt2", "bert"):
        spiking = convert_to_spiking(str(folder / name), sentences(40), progress=False, **PHASE)
        spiking.save_pretrained(folder / f"phase-{name}")
        AutoTokenizer.from_pretrained(folder / name).save_pretrained(folder / f"phase-{name}")
    return folder


def test_a_converted_language_model_learns_from_its_teacher_on_the_command_line(inputs, tmp_path):
    text = f"--model_name_or_path @/phase-gpt2 --teacher @/gpt2 --do_train --do_eval --max_steps 4 {CLM_DATA}"
    found = run_clm.main(flags(text + " --learning_rate 1e-4", inputs, tmp_path / "out"))
    assert [(row["T"], row["schedule"]) for row in found] == [(0, None), (3, "layerwise")]
    model = FASGPT2LMHeadModel.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.T, config.schedule, config.code, config.sites) == (3, "layerwise", "phase", "all")
    before, after = tensors(inputs / "phase-gpt2"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.endswith("fine_threshold")} <= moved
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["configuration"]["model"]["teacher"] == str(inputs / "gpt2")
    # without a teacher it trains at its T as well
    text = text.replace("--teacher @/gpt2", "")
    run_clm.main(flags(text, inputs, tmp_path / "plain"))
    moved = {name for name, each in tensors(tmp_path / "plain").items() if not torch.equal(each, before[name])}
    assert {name for name in before if name.endswith("fine_threshold")} <= moved


def test_two_processes_equal_one_with_the_same_global_batch(inputs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--distillation_alpha", "0.5", "--hidden_weight", "0.5"]
    run_clm.main([*processes.command("gpt2", "distil", inputs, one, 8, 4)[1:], *more])
    in_two_processes(run_clm.main, [*processes.command("gpt2", "distil", inputs, two, 4, 4)[1:], *more])
    assert len(processes.losses(one)) == 4
    assert processes.apart(processes.losses(two), processes.losses(one)) < 1e-5
    found = processes.difference(one, two)
    assert found["thresholds"] < 1e-4
    assert found["weights"] < 1e-4


def test_qcfs_classifiers_learn_from_a_teacher_on_the_command_line(inputs, tmp_path):
    start = f"--do_train --do_eval --max_steps 2 {GLUE_DATA} --model_name_or_path @/bert"
    run_glue.main(flags("--stage baseline " + start, inputs, tmp_path / "gelu"))
    taught = f"{start} --T 2 --teacher {tmp_path / 'gelu'} --distillation_alpha 0.5 --distillation_temperature 2"
    found = run_glue.main(flags(taught, inputs, tmp_path / "qcfs"))
    assert [row["schedule"] for row in found] == [None, "stepwise", "layerwise"]
    model = FASBertForSequenceClassification.from_pretrained(tmp_path / "qcfs")
    assert (model.config.T, model.config.L) == (0, 8)
    phase = taught.replace("@/bert", "@/phase-bert").replace(" --T 2", "") + " --hidden_weight 1"
    assert [row["T"] for row in run_glue.main(flags(phase, inputs, tmp_path / "phase"))] == [0, 3]
    masked = f"--model_name_or_path @/bert --teacher @/bert --do_train --max_steps 1 {CLM_DATA} --max_seq_length 16"
    run_mlm.main(flags(masked, inputs, tmp_path / "mlm"))


def test_calibration_of_a_converted_model_on_the_command_line(inputs, tmp_path):
    text = f"--stage calibrate --calib_T 3 --model_name_or_path @/phase-gpt2 --do_train --do_eval --T 3 {CLM_DATA}"
    found = run_clm.main(flags(text + " --max_steps 2", inputs, tmp_path / "out"))
    assert [(row["T"], row["schedule"]) for row in found] == [(0, None), (3, "layerwise")]
    config = FASGPT2LMHeadModel.from_pretrained(tmp_path / "out").config
    assert (config.T, config.schedule, config.calib_T) == (3, "layerwise", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--stage baseline --teacher @/gpt2", "`--teacher` is for --stage full and downstream"),
        ("--teacher @/nowhere", "`--teacher` must be a checkpoint"),
        ("--teacher @/gpt2 --distillation_temperature 0", "`distillation_temperature` must be above 0, got 0.0"),
        ("--hidden_weight 1", "`--teacher` is required for --hidden_weight, got none"),
        ("--teacher @/bert", "`--teacher` must have the `vocab_size` of the model"),
    ],
)
def test_a_wrong_teacher_is_named(text, message, inputs, tmp_path):
    start = f"--model_name_or_path @/gpt2 --do_train --max_steps 1 {CLM_DATA} "
    with pytest.raises(ValueError, match=message):
        run_clm.main(flags(start + text, inputs, tmp_path / "out"))


def test_a_teacher_of_another_task_is_named(inputs, tmp_path):
    start = f"--model_name_or_path @/bert --do_train --max_steps 1 {GLUE_DATA} --teacher @/gpt2"
    with pytest.raises(ValueError, match="`--teacher` must be fine-tuned on the task"):
        run_glue.main(flags(start, inputs, tmp_path / "out"))
