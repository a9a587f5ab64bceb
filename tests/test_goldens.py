"""The published numbers, reproduced: neurons, QCFS, spiking, padding, generation (`goldens/README.md`)."""

import pytest
import torch

import golden
from neurons_fas import integrate_and_fire, qcfs


def assert_gradient(actual: torch.Tensor, expected: torch.Tensor, zero: bool = False) -> None:
    # Section 5: a mathematically zero gradient is rounding noise, so only the absolute tolerance holds there.
    scale = 0.0 if zero else expected.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=1e-6 + 1e-4 * scale, rtol=0)


def quantisation_levels(activation: torch.Tensor, threshold: torch.Tensor, L: int) -> torch.Tensor:
    return (activation / threshold * L).round().to(torch.uint8)


@pytest.mark.parametrize("case", range(6))
def test_qcfs_neuron(case):
    tensors, description = golden.load("neuron.qcfs")
    settings, get = description["cases"][case], lambda key: tensors[f"case{case}.{key}"]
    x, theta = get("in.x").requires_grad_(), torch.tensor([settings["theta"]], requires_grad=True)
    y = qcfs(x, theta, settings["L"])
    (y * get("in.upstream")).sum().backward()
    levels = [quantisation_levels(each.detach(), theta.detach(), settings["L"]) for each in (y, get("out.y"))]
    assert torch.equal(*levels)
    torch.testing.assert_close(y.detach(), get("out.y"), atol=2e-5, rtol=0)
    assert_gradient(x.grad, get("grad.x"))
    assert_gradient(theta.grad, get("grad.theta"))


@pytest.mark.parametrize("case", range(6))
def test_integrate_and_fire_neuron(case):
    tensors, description = golden.load("neuron.if")
    settings, get = description["cases"][case], lambda key: tensors[f"case{case}.{key}"]
    x, theta = get("in.x").requires_grad_(), torch.tensor([settings["theta"]])
    start = torch.tensor([settings["v0"] / settings["theta"]])
    y = integrate_and_fire(x, theta, start, settings["T"])
    (y * get("in.upstream")).sum().backward()
    assert torch.equal(y > 0, get("out.y") > 0)
    torch.testing.assert_close(y.detach(), get("out.y"), atol=2e-5, rtol=0)
    membrane = start * theta + x.detach().sum(0) - y.detach().sum(0)
    torch.testing.assert_close(membrane, get("out.final_membrane"), atol=2e-5, rtol=0)
    assert_gradient(x.grad, get("grad.x"))


@pytest.mark.parametrize("case", ["random", "exact"])
def test_positional_neuron(case):
    tensors, description = golden.load("neuron.positional")
    get = lambda key: tensors[f"{case}.{key}"]  # noqa: E731
    T, B = description["T"], description["batch"]
    theta, start = get("in.pos_threshold").requires_grad_(), get("in.v0_fraction").requires_grad_()

    x = get("in.x")[: T * B].clone().requires_grad_()
    y = integrate_and_fire(x.unflatten(0, (T, B)), theta, start, T).flatten(0, 1)
    (y * get("spiking.in.upstream")).sum().backward()
    assert torch.equal(y > 0, get("spiking.out.y") > 0)
    assert_gradient(x.grad, get("spiking.grad.x"))
    assert_gradient(start.grad, get("spiking.grad.v0_fraction"))

    for loss in ("mse", "total"):
        x, theta.grad, start.grad = get("in.x").clone().requires_grad_(), None, None
        spiking = integrate_and_fire(x[: T * B].unflatten(0, (T, B)), theta, start, T)
        teacher = qcfs(x[T * B :], torch.tensor([description["layer_threshold"]]), description["L"])
        error = torch.nn.functional.mse_loss(spiking.mean(0), teacher.detach())
        y = torch.cat([spiking.flatten(0, 1), teacher])
        torch.testing.assert_close(y.detach(), get("align.out.y"), atol=2e-5, rtol=0)
        torch.testing.assert_close(error.detach()[None], get("align.out.mse"), atol=0, rtol=1e-5)
        (error + (y * get("align.in.upstream")).sum() * (loss == "total")).backward()
        for tensor, name in ((x, "x"), (theta, "pos_threshold"), (start, "v0_fraction")):
            assert_gradient(tensor.grad, get(f"align.{loss}_grad.{name}"))


QCFS_CASES = [("gpt2", "gpt2", L, f"gpt2_a.qcfs_L{L}") for L in (4, 8, 16)] + [
    ("bert", head, 8, f"bert_a.{head}_qcfs_L8") for head in ("mlm", "classify", "regress")
]


@pytest.mark.parametrize("family, head, L, name", QCFS_CASES, ids=[case[-1] for case in QCFS_CASES])
def test_quantised_network(family, head, L, name):
    tensors, _ = golden.load(name)
    model = golden.model(family, head, L=L)
    with golden.SiteOutputs(model) as emitted:
        output = model(**golden.inputs(tensors))
    torch.testing.assert_close(output.logits.detach(), tensors["out.logits"], **golden.LOGITS)
    torch.testing.assert_close(output.loss.detach()[None], tensors["out.loss"], **golden.LOGITS)
    for site, name in golden.site_names(model).items():
        torch.testing.assert_close(emitted[site], tensors[f"out.{site}.activation"], **golden.LOGITS)
        threshold = model.get_submodule(name).threshold.detach()
        assert torch.equal(quantisation_levels(emitted[site], threshold, L), tensors[f"out.{site}.level"])

    output.loss.backward()
    parameters = dict(model.named_parameters())
    compared = 0
    for key, name in golden.names(family, head).items():
        key = key.replace("regressor", "classifier")
        if f"grad.{key}" not in tensors:
            continue
        actual, expected = parameters[name].grad, tensors[f"grad.{key}"]
        compared += 1
        if key.endswith("attention.qkv.bias"):
            thirds = [(*pair, zero) for *pair, zero in zip(actual.chunk(3), expected.chunk(3), (0, 1, 0), strict=True)]
            for third in thirds:
                assert_gradient(*third)
        else:
            assert_gradient(actual, expected, zero=key.endswith("attention.key.bias"))
    assert compared == sum(key.startswith("grad.") for key in tensors)


SPIKING_CASES = [("gpt2", "gpt2", T, f"gpt2_a.spiking_T{T}") for T in (1, 2, 4, 8)] + [
    ("bert", head, T, f"bert_a.{head}_spiking_T{T}") for head in ("classify", "regress") for T in (2, 4, 8)
]


@pytest.mark.parametrize("family, head, T, name", SPIKING_CASES, ids=[case[-1] for case in SPIKING_CASES])
@torch.no_grad()
def test_spiking_network(family, head, T, name):
    tensors, _ = golden.load(name)
    model = golden.model(family, head, T=T)
    with golden.SiteOutputs(model) as emitted:
        output = model(**golden.inputs(tensors))
    torch.testing.assert_close(output.logits, tensors["out.logits"], **golden.LOGITS)
    torch.testing.assert_close(output.loss[None], tensors["out.loss"], **golden.LOGITS)
    for site in golden.site_names(model):
        spikes = tensors[f"out.{site}.spikes"]
        assert torch.equal(emitted[site].unflatten(0, spikes.shape[:2]) > 0, spikes > 0), site


@pytest.mark.parametrize("T", [0, 4])
@pytest.mark.parametrize("variant", ["left", "right", "left_pos"])
@torch.no_grad()
def test_padded_network(variant, T):
    tensors, description = golden.load("gpt2_a.padding_T4")
    mode = f"T{T}" if T else "qcfs"
    given = golden.inputs(tensors, f"{variant}.in.")
    model = golden.model("gpt2", T=T, L=description["L"])
    with golden.SiteOutputs(model) as emitted:
        output = model(**given)
    # A left-padded row attends to nothing real, so only real positions mean anything.
    valid = given["attention_mask"].bool() if variant.startswith("left") else torch.ones(3, 12, dtype=torch.bool)
    expected = tensors[f"{variant}.{mode}.out.logits"]
    torch.testing.assert_close(output.logits[valid], expected[valid], **golden.LOGITS)
    torch.testing.assert_close(output.loss[None], tensors[f"{variant}.{mode}.out.loss"], **golden.LOGITS)
    for site in golden.site_names(model):
        spikes = tensors.get(f"{variant}.{mode}.out.{site}.spikes")
        if spikes is not None:
            emitted_spikes = emitted[site].unflatten(0, spikes.shape[:2]) > 0
            assert torch.equal(emitted_spikes[:, valid], spikes[:, valid] > 0), site


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation(use_cache):
    tensors, description = golden.load("gpt2_a.generate_T4")
    model = golden.model("gpt2", T=description["T"], L=description["L"])
    generated = model.generate(
        tensors["in.prompt_ids"],
        attention_mask=torch.ones_like(tensors["in.prompt_ids"]),
        max_new_tokens=10,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(generated.sequences, tensors["out.token_ids"])
    torch.testing.assert_close(torch.stack(generated.logits), tensors["out.step_logits"], **golden.LOGITS)
