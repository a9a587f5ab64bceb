"""Distillation: a spiking model, at its own T and schedule, learns to say what a teacher says."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments

from .layout import auto_class, core_of, predicts_next, turn_off_dropout
from .trainers import CountingTrainer


# Heads by what they judge: every token, or the text as a whole.
OF_TOKENS = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification")
OF_TEXTS = ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice")


def judged(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Where the logits of a batch count: real tokens that have a label, or are followed by one.

    Args:
        model: A FAS model, which says what its logits speak of.
        inputs: With `input_ids`, `attention_mask` and `labels`, where there are any.

    Returns:
        Booleans: `(B, S - 1)` where position s speaks of token s + 1, `(B, S)` of tokens, `(B,)` of texts.
    """
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if auto_class(model) in OF_TEXTS:
        rows = inputs["input_ids"] if labels is None else labels
        known = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        return known if labels is None or labels.is_floating_point() else labels.ne(-100)
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    wanted = real if labels is None else real & labels.ne(-100)
    return wanted[:, 1:] & real[:, :-1] if predicts_next(model) else wanted


def divergence(logits: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`temperature² · KL(teacher ‖ student)` of softened distributions, summed over rows; of a regression the error.

    Args:
        logits: Of the student, `(N, classes)`; one class is a regression, whose squared error is summed.
        teacher: Of the same shape.
        temperature: Divides the logits of both. Its square keeps the gradient as large as without it.
    """
    logits, teacher = logits.float(), teacher.float()
    if logits.shape[-1] == 1:
        return F.mse_loss(logits, teacher, reduction="sum")
    student, target = ((each / temperature).log_softmax(-1) for each in (logits, teacher))
    return temperature**2 * F.kl_div(student, target, reduction="sum", log_target=True)


class FASDistillationTrainer(CountingTrainer):
    """Trains a FAS model, weights and thresholds, to follow a teacher; quantisation-aware where T > 0.

    `loss = KL(teacher ‖ student) + alpha · task + hidden_weight · hidden`: means over the tokens that have a label (or
    precede one), of which padding is none; over texts where the head judges texts; squared errors for a regression.
    `hidden` is the squared error of all hidden states, over real tokens. The student runs as its configuration says:
    through the closed forms of a code at T > 0, layerwise; through time in the other schedules; as QCFS at T = 0.
    Gradients pass the spikes straight through, to weights and thresholds. Dropout is off, for good, since a teacher
    has none: noise that no weight can follow costs a student that starts close more than it has left to learn.
    Accumulated and distributed gradients are those of the large batch. Evaluation is that of the student.

    Args:
        teacher: A model with logits of the same shape, stock as a rule, with weights of its own. Run in evaluation
            mode; never trained, never saved.
        temperature: Of both distributions; by default `args.distillation_temperature`, or 1.
        alpha: Weight of the loss of the task; by default `args.distillation_alpha`, or 0.
        hidden_weight: Weight of the hidden states; by default `args.hidden_weight`, or 0. The teacher must then have
            as many layers, as wide.

    Raises:
        ValueError: for a teacher that shares weights with the model or numbers labels otherwise, a head without one
            output to compare, or settings out of range.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module,
        temperature: float | None = None,
        alpha: float | None = None,
        hidden_weight: float | None = None,
        **kwargs,
    ):
        core: Any = core_of(model)
        if auto_class(core) not in OF_TOKENS + OF_TEXTS:
            raise ValueError(f"`model` must have a head with one output to compare, got {type(core).__name__}.")
        check_teacher(core, teacher)
        super().__init__(model, args, **kwargs)
        self.temperature = _setting(temperature, self.args, "distillation_temperature", 1.0)
        self.alpha = _setting(alpha, self.args, "distillation_alpha", 0.0)
        self.hidden_weight = _setting(hidden_weight, self.args, "hidden_weight", 0.0)
        check_settings(self.temperature, self.alpha, self.hidden_weight)
        turn_off_dropout(core)
        self.teacher = teacher.to(self.args.device).eval()
        self._teacher_takes = inspect.signature(teacher.forward).parameters

    def counts(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Numbers of what is judged, and of real tokens."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        tokens = torch.tensor(ids.numel(), device=ids.device) if mask is None else mask.sum()
        return torch.stack([judged(core_of(self.model), inputs).sum(), tokens])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        number, tokens = self.share(inputs, num_items_in_batch).clamp(min=1)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if "use_cache" in inspect.signature(extract_model_from_parallel(model).forward).parameters:
            given["use_cache"] = False
        wanted = {"return_dict": True} | ({"output_hidden_states": True} if self.hidden_weight else {})
        outputs = model(**given, **wanted)
        with torch.no_grad():
            known = {name: value for name, value in given.items() if name in self._teacher_takes}
            target = self.teacher(**known, **wanted)
        logits, teacher_logits = self._judged(inputs, outputs["logits"], target["logits"])
        loss = divergence(logits, teacher_logits, self.temperature) / number
        if self.alpha and inputs.get("labels") is not None:
            loss = loss + self.alpha * self._task_error(inputs, logits) / number
        if self.hidden_weight:
            hidden = _hidden_error(outputs["hidden_states"], target["hidden_states"], inputs.get("attention_mask"))
            loss = loss + self.hidden_weight * hidden / tokens
        return (loss, outputs) if return_outputs else loss

    def _judged(self, inputs, logits, teacher) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of student and teacher where they count, `(N, classes)`."""
        if logits.shape != teacher.shape:
            raise ValueError(
                f"`teacher` must give logits of the shape of the model's, {tuple(logits.shape)}, got "
                f"{tuple(teacher.shape)}. It needs the same vocabulary, or the same labels."
            )
        core = core_of(self.model)
        if predicts_next(core):
            logits, teacher = logits[:, :-1], teacher[:, :-1]
        where = judged(core, inputs)
        return logits[where], teacher[where]

    def _task_error(self, inputs, logits) -> torch.Tensor:
        """Cross entropy, or the squared error of a regression, summed over what is judged."""
        core, labels = core_of(self.model), inputs["labels"]
        labels = (labels[:, 1:] if predicts_next(core) else labels)[judged(core, inputs)]
        if logits.shape[-1] == 1:
            return F.mse_loss(logits.squeeze(-1).float(), labels.float(), reduction="sum")
        return F.cross_entropy(logits.float(), labels, reduction="sum")


def check_teacher(model: Any, teacher: nn.Module) -> None:
    """Raise for a teacher whose weights the student would train, or whose labels have other numbers."""
    own = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    shared = [name for name, each in teacher.named_parameters() if each.numel() and each.data_ptr() in own]
    if shared:
        raise ValueError(
            f"`teacher` must have weights of its own, got one that shares {shared[0]!r} with the model. Load it once "
            "more, or convert a copy: `convert_to_spiking` turns a model that it is given into a spiking one."
        )
    if auto_class(model) in OF_TEXTS:
        names, others = (getattr(each.config, "label2id", None) or {} for each in (model, teacher))
        if names.keys() == others.keys() and names != others:
            raise ValueError(f"`teacher` must number its labels as the model does, {names}, got {others}.")


def check_settings(temperature: float, alpha: float, hidden_weight: float) -> None:
    """Raise for what is out of range."""
    if not temperature > 0:
        raise ValueError(f"`distillation_temperature` must be above 0, got {temperature}.")
    for name, value in (("distillation_alpha", alpha), ("hidden_weight", hidden_weight)):
        if not value >= 0:
            raise ValueError(f"`{name}` must be 0 or more, got {value}.")


def _setting(given: float | None, args: Any, name: str, default: float) -> float:
    values = (given, getattr(args, name, None), default)
    return next(each for each in values if each is not None)


def _hidden_error(student, teacher, mask: torch.Tensor | None) -> torch.Tensor:
    """Squared error of hidden states, the mean over layers and features, summed over real tokens."""
    shapes = [[tuple(each.shape) for each in states] for states in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`hidden_weight` needs a teacher with {len(shapes[0])} hidden states of shape {shapes[0][-1]}, as the "
            f"model, got {len(shapes[1])} of {shapes[1][-1]}. Leave it at 0 for another teacher."
        )
    errors = [(ours.float() - theirs.float()).square().mean(-1) for ours, theirs in zip(student, teacher, strict=True)]
    error = torch.stack(errors).mean(0)
    return error.sum() if mask is None else error.masked_fill(~mask.bool().view(error.shape), 0).sum()
