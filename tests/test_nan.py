"""What is not a number stays so, through every neuron, in every mode, and only for the text that holds it."""

import pytest
import torch

import backbones
import neurons_fas
from backbones import CASES, FEW, some
from configuration_fas import BACKBONES
from neurons_fas import encode, integrate_and_fire, spike_rate
from sites_fas import trunk


STOCK = {"activation": "stock", "L": None}
NAN = float("nan")
MODES = [
    {"T": 0},
    {"T": 0, "sites": "all", **STOCK},
    *({"T": 4, "schedule": schedule} for schedule in ("stepwise", "layerwise", "accumulated")),
    *(
        {"T": 3, "schedule": schedule, "sites": "all", **STOCK}
        for schedule in ("stepwise", "layerwise", "accumulated")
    ),
    *(
        {"T": 4, "schedule": "layerwise", "sites": "all", "code": code, "gain": gain, **STOCK}
        for code in ("rate", "phase", "first_spike")
        for gain in ("static", "token")
    ),
    {"T": 4, "schedule": "stepwise", "calib_T": 4},
    {"T": 4, "schedule": "layerwise", "calib_T": 4},
]


RUNS = some(
    lambda case, mode: case == ("gpt2", "AutoModelForCausalLM") or (case in FEW and mode in (MODES[2], MODES[-3])),
    CASES,
    MODES,
)


def named(settings):
    parts = settings if isinstance(settings, tuple) else [str(v) for k, v in settings.items() if k not in STOCK]
    return "-".join(parts)


@pytest.mark.parametrize("start", [None, 0.5, -0.5, 1.5])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("block", [1 << 17, 4], ids=["one_block", "blocks"])
def test_loop_and_closed_forms_keep_nan(signed, start, block, monkeypatch):
    monkeypatch.setattr(neurons_fas, "BLOCK_SIZE", block)
    x = torch.randn(3, 5, 6)
    x[1, 2, 3] = NAN
    theta = torch.rand(6) + 0.5
    potential = None if start is None else torch.full((6,), start)
    emitted = {code: encode(x, theta, 4, code, signed=signed) for code in ("rate", "phase", "first_spike")}
    emitted["closed"] = spike_rate(x, theta, potential, 4, signed)
    loop = integrate_and_fire(x[None], theta, torch.full((6,), 0.5) if start is None else potential, 4, signed)
    emitted |= {f"step {t}": step for t, step in enumerate(loop)}
    for name, each in emitted.items():
        assert torch.equal(each.isnan(), x.isnan()), name
    x[1, 2, 3] = 0.3
    late = torch.stack([x, x, x, x])
    late[2, 1, 2, 3] = NAN  # from the third step on
    steps = integrate_and_fire(late, theta, torch.full((6,), 0.5), 4, signed).isnan().flatten(1).sum(1)
    assert steps.tolist() == [0, 0, 1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("signed", [False, True])
def test_kernels_keep_nan(signed):
    x = torch.randn(4, 3, 64, device="cuda")
    x[2, 1, 5] = NAN
    theta = torch.rand(64, device="cuda") + 0.5
    emitted = integrate_and_fire(x, theta, torch.full_like(theta, 0.5), 4, signed)
    assert emitted.isnan().nonzero().tolist() == [[2, 1, 5], [3, 1, 5]]


@pytest.mark.parametrize("case, settings", RUNS, ids=named)
@torch.no_grad()
def test_nan_weights_come_out(case, settings):
    """In the layer before the neurons of the MLP, of one block: GPT-2's `c_fc`, BERT's `intermediate.dense`."""
    model, inputs = backbones.model(*case, **settings), backbones.batch(*case)
    block = trunk(model).get_submodule(BACKBONES[case[0]].blocks)[1]
    path = next(each.weights[0] for each in BACKBONES[case[0]].products if each.name == "mlp in")
    weight = block.get_submodule(path).weight
    weight[0, 0] = NAN
    assert backbones.first_output(model(**inputs)).isnan().all()


@pytest.mark.parametrize("case, settings", RUNS, ids=named)
@torch.no_grad()
def test_nan_embeddings_come_out_in_their_row_only(case, settings):
    model, inputs = backbones.model(*case, **settings), backbones.batch(*case)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    inputs["inputs_embeds"][1, ..., 0, 0] = NAN
    found = backbones.first_output(model(**inputs)).isnan()
    assert found[1].any() and not found[0].any() and not found[2].any()
    if found.dim() == 3 and not BACKBONES[case[0]].causal:
        assert found[1].all()
