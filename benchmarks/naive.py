"""The published algorithm, written plainly: what the models are checked against, and what their cost is compared with."""

import torch
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, GPT2LMHeadModel


class _Spike(torch.autograd.Function):
    """Step function of v - threshold, with the triangle as its gradient."""

    @staticmethod
    def forward(ctx, distance):
        ctx.save_for_backward(distance)
        return (distance >= 0).to(distance.dtype)

    @staticmethod
    def backward(ctx, grad):
        (distance,) = ctx.saved_tensors
        return grad * torch.relu(1 - distance.abs())


def integrate_and_fire(
    x: torch.Tensor, threshold: torch.Tensor, initial_potential: torch.Tensor, T: int
) -> torch.Tensor:
    """Plain loop over the steps of `(T, …)`, or of one step held constant, differentiated by autograd."""
    state = torch.promote_types(x.dtype, torch.float32)
    theta = threshold.to(state)
    v = (initial_potential.to(state) * theta).expand(x.shape[1:])
    emitted = []
    for t in range(T):
        v = v + x[t if len(x) > 1 else 0].to(state)
        spike = _Spike.apply(v - theta)
        v = v - spike * theta
        emitted.append(spike * theta)
    return torch.stack(emitted).to(x.dtype)


class PlainNeuron(nn.Module):
    """Integrate-and-fire on `(T·B, …)` with the parameters of a `FASNeuron`."""

    def __init__(self, neuron: nn.Module, T: int):
        super().__init__()
        self.T = T
        self.threshold = neuron.threshold if neuron.fine_threshold is None else neuron.fine_threshold
        half = torch.full_like(neuron.threshold, 0.5)
        self.initial_potential = half if neuron.initial_potential is None else neuron.initial_potential

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        steps = hidden_states.unflatten(0, (self.T, -1))
        return integrate_and_fire(steps, self.threshold, self.initial_potential, self.T).flatten(0, 1)


class NaiveModel(nn.Module):
    """Stock model with plain neurons: the input replicated T times, through everything, and the logits averaged."""

    def __init__(self, model: nn.Module, T: int):
        super().__init__()
        stock = next(
            each for each in (GPT2LMHeadModel, BertForMaskedLM, BertForSequenceClassification) if isinstance(model, each)
        )
        self.T = T
        with torch.device("meta"):
            self.model = stock(model.config).eval()
        self.model.load_state_dict(model.state_dict(), strict=False, assign=True)
        for name, buffer in model.named_buffers():
            self.model.register_buffer(name, buffer) if "." not in name else setattr(
                self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer
            )
        self.model.tie_weights()
        for name, neuron in model.neurons():
            self.model.set_submodule(name, PlainNeuron(neuron, T))

    def forward(self, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
        """Logits of `(B, …)`; every tensor among the inputs has B rows."""
        inputs = {k: v.repeat(self.T, 1) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        logits = self.model(input_ids.repeat(self.T, 1), **inputs).logits
        return logits.unflatten(0, (self.T, -1)).mean(0)
