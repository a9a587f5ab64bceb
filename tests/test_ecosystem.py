"""What other programs make of a spiking model: exports are equal, graphs answer alike, others count what we count."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

import backbones
from training.calibrate import fold_thresholds
from training.evaluate import SpikeMonitor, count_operations
from training.evaluate.neurobench import neurobench_metrics, spike_by_spike
from training.export import mlp_to_nir


PHASE = {"T": 4, "sites": "all", "code": "phase", "activation": "stock", "L": None, "schedule": "layerwise"}
MODES = {"ann": {"T": 0}, "layerwise": {"T": 4, "schedule": "layerwise"}, "phase": PHASE, "stepwise": {"T": 3}}
CASES = [("gpt2", "AutoModelForCausalLM"), ("bert", "AutoModelForSequenceClassification")]


def exported(case, settings):
    """A tiny model, inputs for it, its logits, and the program that torch.export makes of it."""
    model = backbones.model(*case, **settings)
    model.config.use_cache = False
    inputs = backbones.batch(*case)
    inputs.pop("position_ids", None)
    with torch.no_grad():
        return model, inputs, model(**inputs).logits, torch.export.export(model, (), inputs)


@pytest.mark.parametrize(
    "case, mode",
    backbones.some(lambda case, mode: (case[0], mode) in (("gpt2", "phase"), ("bert", "stepwise")), CASES, MODES),
    ids=backbones.named,
)
def test_torch_export_is_equal_to_the_last_bit(case, mode):
    _, inputs, expected, program = exported(case, MODES[mode])
    assert torch.equal(program.module()(**inputs).logits, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_onnx_gives_the_logits(case, mode, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, inputs, expected, program = exported(case, MODES[mode])
    torch.onnx.export(program, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    given = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    torch.testing.assert_close(torch.tensor(session.run(None, given)[0]), expected, atol=1e-5, rtol=0)


def interpret(graph, inputs: np.ndarray) -> np.ndarray:
    """Run a graph of NIR at timesteps of 1, `(T, inputs)`: an edge that closes a loop arrives one step later."""
    import nir

    order = [name for name in graph.nodes if name != "reset"]
    into = defaultdict(list)
    for source, target in graph.edges:
        into[target].append(source)
    state, outputs = defaultdict(float), []
    for step in inputs:
        now = {"input": step}
        if "reset" in graph.nodes:
            now["reset"] = state["reset"]
        for name in order[1:]:
            node, given = graph.nodes[name], sum(now[source] for source in into[name])
            if isinstance(node, nir.Affine):
                now[name] = node.weight @ given + node.bias
            elif isinstance(node, nir.I):
                now[name] = state[name] = state[name] + node.r * given
            elif isinstance(node, nir.Threshold):
                now[name] = (given > node.threshold).astype(given.dtype)
            elif isinstance(node, nir.IF):
                v = state[name] + node.r * given
                now[name] = (v > node.v_threshold).astype(v.dtype)
                state[name] = np.where(now[name] > 0, node.v_reset, v)
            else:
                now[name] = given
        if "reset" in graph.nodes:
            state["reset"] = graph.nodes["reset"].scale * now["fire"]
        outputs.append(now["output"])
    return np.stack(outputs)


def mlp(model, block, hidden_states):
    """What the MLP of a block of GPT-2 or BERT answers, before its residual."""
    if hasattr(block, "mlp"):
        return block.mlp(hidden_states)
    return block.output.dense(block.intermediate(hidden_states))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_graph_of_nir_answers_as_the_mlp_does_and_its_own_neuron_does_not(case, calibrated, tmp_path):
    nir = pytest.importorskip("nir")
    model = backbones.model(*case, T=8).double()
    if calibrated:
        model.begin_calibration(8)
        for _, neuron in model.neurons():
            neuron.fine_threshold.data.uniform_(0.4, 1.2)
            neuron.initial_potential.data.uniform_(0, 1)
    nir.write(tmp_path / "mlp.nir", mlp_to_nir(model, 1))
    graph = nir.read(tmp_path / "mlp.nir")
    inputs = torch.randn(8, 32, dtype=torch.float64)
    blocks = model.transformer.h if case[0] == "gpt2" else model.bert.encoder.layer
    with torch.no_grad():
        expected = mlp(model, blocks[1], inputs[:, None]).squeeze(1).numpy()
    np.testing.assert_allclose(interpret(mlp_to_nir(model, 1), inputs.numpy()), expected, atol=1e-12)
    names = ["input", "up", "membrane", "fire", "reset", "down", "output"]
    assert set(graph.nodes) == set(names) and len(graph.edges) == 7

    hard = mlp_to_nir(model, 1)
    fire, theta = hard.nodes["fire"].threshold, -hard.nodes["reset"].scale
    neuron = nir.IF(r=np.ones_like(theta), v_threshold=fire, v_reset=fire - theta)  # to 0, from where ours starts
    path = ["input", "up", "neuron", "down", "output"]
    nodes = {name: hard.nodes.get(name, neuron) for name in path}
    found = interpret(nir.NIRGraph(nodes, list(pairwise(path))), inputs.numpy())
    error = np.linalg.norm(found.mean(0) - expected.mean(0)) / np.linalg.norm(expected.mean(0))
    assert error > 0.02, "NIR's own neuron forgets what is above its threshold"
    print(f"NIR's own IF is off by {error:.1%}")


def test_what_nir_cannot_express_is_refused():
    pytest.importorskip("nir")
    with pytest.raises(ValueError, match="NIR has no signed neuron"):
        mlp_to_nir(backbones.model("llama", "AutoModelForCausalLM", T=4))
    with pytest.raises(ValueError, match="NIR has no signed neuron, and no other code"):
        mlp_to_nir(backbones.model("gpt2", "AutoModelForCausalLM", **PHASE))
    with pytest.raises(ValueError, match="`layer` must be from 0 to 2, got 3"):
        mlp_to_nir(backbones.model("gpt2", "AutoModelForCausalLM", T=4), 3)


@pytest.mark.parametrize("case", CASES)
def test_spike_by_spike_every_layer_is_linear_with_nothing_inside(case):
    model, inputs = backbones.model(*case, **PHASE), backbones.batch(*case)
    fold_thresholds(model)
    before = model(**inputs).logits
    spike_by_spike(model)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    assert all(type(layer) is torch.nn.Linear and not list(layer.children()) for layer in layers)
    torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [PHASE, PHASE | {"code": "rate", "schedule": "stepwise"}], ids=["phase", "rate"])
@pytest.mark.parametrize("case", CASES)
def test_neurobench_counts_what_we_count_in_one_call(case, settings):
    pytest.importorskip("neurobench.metrics.workload.synaptic_operations", exc_type=ImportError)
    model = backbones.model(*case, **settings)
    with torch.no_grad():
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
        layers[0].bias[0] = 0  # a zero weight would be no operation to NeuroBench
    rows = backbones.batch(*case)["input_ids"]
    batches = [{"input_ids": row[None]} for row in rows]
    before = [model(**batch).logits for batch in batches]
    found = neurobench_metrics(model, batches)
    assert all(torch.equal(model(**batch).logits, logits) for batch, logits in zip(batches, before, strict=True))
    with SpikeMonitor(model) as monitor, torch.no_grad():
        for batch in batches:
            model(**batch)
    T, schedule = model.config.T, model.config.schedule
    counted = count_operations(model, 9, execution=schedule, T=T, spike_rates=monitor.spike_rates())
    products = [each for each in counted if each.part not in ("scores", "values", "neurons")]
    assert found["effective_acs"] == pytest.approx(9 * sum(each.effective_acs for each in products), rel=1e-6)
    numbers = [each for layer in layers for each in (layer.weight, layer.bias) if each is not None]
    zeros = sum(int((each == 0).sum()) for each in numbers) / sum(each.numel() for each in numbers)
    assert found["connection_sparsity"] == pytest.approx(zeros, abs=1e-4) and zeros > 0
    assert found["parameter_count"] == sum(each.numel() for each in model.parameters())


def test_neurobench_metrics_refuse_what_does_not_spike():
    pytest.importorskip("neurobench.metrics.static", exc_type=ImportError)
    model = backbones.model("bert", "AutoModelForSequenceClassification", T=0)
    with pytest.raises(ValueError, match="T > 0 to spike, got T = 0"):
        neurobench_metrics(model, [backbones.batch("bert", "AutoModelForSequenceClassification")])
