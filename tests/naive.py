"""The published algorithm, plainly: the stock model on T copies of the input, one step of the neuron after another."""

import torch
import transformers
from torch import nn


class TriangleSpike(torch.autograd.Function):
    """1 where u >= 0; gradient max(0, 1 - |u|)."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


def fire(x: torch.Tensor, threshold: torch.Tensor, initial_potential, T: int, signed: bool = False) -> torch.Tensor:
    """`(T, …)` currents (or `(1, …)`, constant) to `(T, …)` emissions, step by step, by ordinary autograd."""
    v = initial_potential * threshold * torch.ones_like(x[0])
    emitted = []
    for t in range(T):
        v = v + x[t if len(x) > 1 else 0]
        spikes = TriangleSpike.apply(v - threshold)
        if signed:
            spikes = spikes + TriangleSpike.apply(v) - 1
        emitted.append(spikes * threshold)
        v = v - emitted[-1]
    return torch.stack(emitted)


class NaiveNeuron(nn.Module):
    def __init__(self, neuron, T: int):
        super().__init__()
        self.T, self.threshold, self.signed = T, neuron.threshold, neuron.signed
        self.fine = neuron.fine_threshold, neuron.initial_potential

    def forward(self, x):
        threshold, start = (self.threshold, 0.5) if self.fine[0] is None else self.fine
        return fire(x.unflatten(0, (self.T, -1)), threshold, start, self.T, self.signed).flatten(0, 1)


def network(spiking, T: int, neurons: bool = True) -> nn.Module:
    """The stock model with the weights of a spiking one, which it shares, and naive neurons."""
    settings = spiking.config.to_dict()
    settings.pop("model_type")
    stock_config = type(spiking.config)._stock_class(
        **settings, attn_implementation=spiking.config._attn_implementation
    )
    stock = getattr(transformers, type(spiking).__name__.removeprefix("FAS"))(stock_config)
    stock = stock.eval().to(spiking.device, spiking.dtype)
    for name, parameter in spiking.named_parameters(remove_duplicate=False):
        if not name.endswith(("threshold", "initial_potential", "gain")):
            module, _, leaf = name.rpartition(".")
            stock.get_submodule(module)._parameters[leaf] = parameter
    stock.tie_weights()
    for name, neuron in spiking.neurons() if neurons else ():
        module, _, leaf = name.rpartition(".")
        if leaf == "site":
            stock.get_submodule(module).register_forward_pre_hook(_before(NaiveNeuron(neuron, T)))
        else:
            setattr(stock.get_submodule(module), leaf, NaiveNeuron(neuron, T))
    return stock


def _before(neuron):
    return lambda layer, args: (neuron(args[0]), *args[1:])


def copies(T: int, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """T copies of the inputs, stacked time-major."""
    return {key: value.repeat(T, *[1] * (value.dim() - 1)) for key, value in inputs.items() if key != "labels"}


def logits(stock: nn.Module, T: int, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over T of the logits for T copies of the inputs."""
    return stock(**copies(T, inputs)).logits.unflatten(0, (T, -1)).mean(0)
