"""Operation counts against sums done by hand, and against torch's counter; every number stands for one token."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import energy_gpt2_small, energy_tables
from configuration_fas import FASBertConfig, FASGPT2Config, FASLlamaConfig
from modeling_fas import (
    FASBertForMaskedLM,
    FASBertForSequenceClassification,
    FASBertModel,
    FASGPT2LMHeadModel,
    FASGPT2Model,
    FASLlamaForCausalLM,
)
from training.evaluate.energy import AC_PJ, MAC_PJ, count_operations, energy_report, floating_point, total


# Two layers, width 8, MLP 32, 20 tokens.
GPT2 = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_inner": 32, "vocab_size": 20, "n_positions": 16}
# Two layers, width 8, MLP 16, 20 tokens, 3 classes.
BERT = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


def gpt2(model_class=FASGPT2LMHeadModel):
    return model_class(FASGPT2Config(**GPT2, attn_implementation="eager")).eval()


def bert(model_class=FASBertForSequenceClassification):
    return model_class(FASBertConfig(**BERT, attn_implementation="eager")).eval()


def by_part(operations, field):
    """`{(part, layer): count}` without the parts that have none."""
    found = {(each.part, each.layer): getattr(each, field) for each in operations}
    return {key: count for key, count in found.items() if count}


GPT2_LAYER = {
    "qkv": 8 * 24,
    "scores": 5 * 8,  # 5 keys, both heads together 8 wide
    "values": 5 * 8,
    "attention output": 8 * 8,
    "mlp in": 8 * 32,
    "mlp out": 32 * 8,
}
BERT_LAYER = {
    "qkv": 3 * 8 * 8,
    "scores": 4 * 8,
    "values": 4 * 8,
    "attention output": 8 * 8,
    "mlp in": 8 * 16,
    "mlp out": 16 * 8,
}


def test_gpt2_ann_by_hand():
    operations = count_operations(gpt2(), 5)
    expected = {(part, layer): macs for layer in (0, 1) for part, macs in GPT2_LAYER.items()} | {("head", None): 160}
    assert by_part(operations, "dense") == expected
    assert by_part(operations, "effective_macs") == expected
    # 2 · (192 + 40 + 40 + 64 + 256 + 256) + 160
    assert total(operations) == {
        "dense": 1856,
        "effective_macs": 1856,
        "effective_acs": 0,
        "membrane_updates": 0,
        "synaptic_reads": 1696,
        "energy_pj": pytest.approx(1856 * 4.6),
    }


def test_gpt2_stepwise_by_hand():
    operations = count_operations(gpt2(), 5, execution="stepwise", T=4, spike_rates=0.25)
    # Before the first site everything runs once; so does the head, on the time average.
    first = {("qkv", 0): 192, ("scores", 0): 40, ("values", 0): 40, ("attention output", 0): 64, ("mlp in", 0): 256}
    second = {
        ("qkv", 1): 768,
        ("scores", 1): 160,
        ("values", 1): 160,
        ("attention output", 1): 256,
        ("mlp in", 1): 1024,
    }
    products = first | second | {("head", None): 160}
    assert by_part(operations, "effective_macs") == products
    assert by_part(operations, "dense") == products | {("mlp out", 0): 4 * 256, ("mlp out", 1): 4 * 256}
    # Rate 1/4 over 4 steps: each neuron spikes once, and each spike meets 8 weights.
    assert by_part(operations, "effective_acs") == {("mlp out", 0): 32 * 8, ("mlp out", 1): 32 * 8}
    # 32 neurons · (4 steps + 1 reset).
    assert by_part(operations, "membrane_updates") == {("neurons", 0): 160, ("neurons", 1): 160}
    assert total(operations)["energy_pj"] == pytest.approx(4.6 * (592 + 2368 + 160) + 0.9 * (512 + 320))


def test_gpt2_layerwise_by_hand():
    operations = count_operations(gpt2(), 5, execution="layerwise", T=4, spike_rates=0.25)
    products = {(part, layer): macs for layer in (0, 1) for part, macs in GPT2_LAYER.items() if part != "mlp out"}
    assert by_part(operations, "effective_macs") == products | {("head", None): 160}
    # The spikes of 4 steps arrive here too; the code itself multiplies their average, once.
    assert by_part(operations, "effective_acs") == {("mlp out", 0): 256, ("mlp out", 1): 256}
    assert total(operations)["dense"] == 1856
    assert total(operations)["membrane_updates"] == 320


def test_gpt2_replicated_by_hand():
    operations = count_operations(gpt2(), 5, execution="replicated", T=4, spike_rates=0.25)
    assert total(operations)["dense"] == 4 * 1856
    assert total(operations)["effective_macs"] == 4 * (1856 - 2 * 256)


def test_bert_classifier_by_hand():
    operations = count_operations(bert(), 4, execution="stepwise", T=4, spike_rates=0.25)
    first = {(part, 0): macs for part, macs in BERT_LAYER.items() if part != "mlp out"}
    second = {(part, 1): 4 * macs for part, macs in BERT_LAYER.items() if part != "mlp out"}
    # The pooler runs at every step, on one of 4 tokens; the classifier takes its spikes.
    assert by_part(operations, "effective_macs") == first | second | {("pooler", None): 4 * 64 / 4}
    assert by_part(operations, "effective_acs") == {
        ("mlp out", 0): 16 * 8,
        ("mlp out", 1): 16 * 8,
        ("head", None): 8 * 3 / 4,
    }
    assert by_part(operations, "membrane_updates") == {
        ("neurons", 0): 16 * 5,
        ("neurons", 1): 16 * 5,
        ("neurons", None): 8 * 5 / 4,
    }


def test_bert_masked_lm_by_hand():
    operations = count_operations(bert(FASBertForMaskedLM), 4, execution="stepwise", T=4, spike_rates=0.25)
    outside = {key: macs for key, macs in by_part(operations, "effective_macs").items() if key[1] is None}
    # A LayerNorm follows the spikes of the transform: the decoder multiplies, once, on the time average.
    assert outside == {("transform", None): 4 * 8 * 8, ("head", None): 8 * 20}
    assert by_part(operations, "effective_acs").keys() == {("mlp out", 0), ("mlp out", 1)}
    assert by_part(operations, "membrane_updates")[("neurons", None)] == 8 * 5


@pytest.mark.parametrize("T, schedule", [(0, "stepwise"), (3, "stepwise"), (3, "layerwise")])
@pytest.mark.parametrize(
    "make, model_class",
    [
        (gpt2, FASGPT2LMHeadModel),
        (gpt2, FASGPT2Model),
        (bert, FASBertForSequenceClassification),
        (bert, FASBertForMaskedLM),
        (bert, FASBertModel),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_dense_count_is_what_torch_counts(make, model_class, T, schedule):
    """torch counts two operations a MAC, and attention's full square as well: no other difference."""
    model = make(model_class).set_timesteps(T, schedule)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(2, 5, dtype=torch.long))
    execution = schedule if T else "ann"
    dense = total(count_operations(model, 5, execution=execution, T=T, spike_rates=0.5))["dense"]
    assert counter.get_total_flops() == pytest.approx(2 * (2 * 5) * dense, rel=1e-12)


def test_cached_step_is_what_torch_counts():
    model = gpt2().set_timesteps(3)
    with torch.no_grad():
        cache = model(torch.ones(1, 6, dtype=torch.long), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    operations = count_operations(model, 1, past=6, execution="stepwise", T=3, spike_rates=0.5)
    assert counter.get_total_flops() == 2 * total(operations)["dense"]


def test_causal_counts_half_of_the_attention_square():
    full, causal = (by_part(count_operations(gpt2(), 5, causal=causal), "dense") for causal in (False, True))
    assert full[("scores", 0)] == 5 * 8
    assert causal[("scores", 0)] == (1 + 2 + 3 + 4 + 5) / 5 * 8


def test_ratios_of_gpt2_small():
    """The method's 3.2 and 6.4 replicate everything; its 0.83 is T = 8. What the code runs costs less."""
    rows = energy_gpt2_small.rows(1024)
    ratios = {(row["execution"], row["T"]): round(row["ratio"], 2) for row in rows}
    assert [ratios["replicated", T] for T in (4, 8)] == [3.22, 6.44]
    assert [ratios["stepwise", T] for T in (4, 8)] == [2.27, 4.23]
    assert [ratios["layerwise", T] for T in (4, 8)] == [0.82, 0.83]
    table, published, costs = energy_tables.energy({(row["execution"], row["T"]): row for row in rows})
    root = Path(__file__).parents[1]
    assert f"{table}\n\n{published}\n" in (root / "benchmarks" / "energy.md").read_text()
    assert costs in (root / "docs" / "measurement.md").read_text()


def test_report_beside_the_ann():
    model = gpt2()
    report = energy_report(model, 5, execution="stepwise", T=4, spike_rates=0.25, densities=0.5, mac_pj=2.0, ac_pj=1.0)
    assert report["ann_energy_pj"] == 2 * 1856
    assert report["ratio"] == (2 * 3120 + 512 + 320) / (2 * 1856)
    assert report["ratio"] > 1
    # Half of the activations are 0: half of both products after them is skipped.
    assert report["zero_skipping_ann_energy_pj"] == 2 * (1856 - 256)
    assert sum(each["energy_pj"] for each in report["operations"]) == pytest.approx(report["energy_pj"])
    assert (MAC_PJ, AC_PJ) == (4.6, 0.9)


def test_rates_by_site():
    model = bert()
    names = [name for name, _ in model.neurons()]
    rates = dict(zip(names, (0.5, 0.25, 0.0), strict=True))
    acs = by_part(count_operations(model, 4, execution="layerwise", T=2, spike_rates=rates), "effective_acs")
    assert acs == {("mlp out", 0): 128, ("mlp out", 1): 64}
    with pytest.raises(ValueError, match=r"`spike_rates`.*pooler\.activation"):
        count_operations(model, 4, execution="layerwise", T=2, spike_rates=dict.fromkeys(names[:-1], 0.5))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"execution": "spiking", "T": 4}, "`execution` must be one of"),
        ({"execution": "stepwise"}, "`T` must be at least 1"),
        ({"execution": "stepwise", "T": 4}, "`spike_rates` must hold a number"),
        ({"execution": "layerwise", "T": 4, "spike_rates": 1.5}, "`spike_rates` must hold a number"),
        ({"length": 0}, "`length` must be at least 1"),
        ({"past": -1}, "`past` at least 0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        count_operations(gpt2(), **{"length": 5} | settings)


def test_a_model_that_does_not_spike():
    with pytest.raises(ValueError, match="`model` must be a FAS model, got Linear"):
        count_operations(torch.nn.Linear(2, 2), 5)


def test_floating_point_by_hand():
    own = {"norms": 5 * 8 * 7, "softmax": 2 * 2 * 5 * 6, "activations": 0, "rotary": 0, "residuals": 2 * 2 * 8}
    assert floating_point(gpt2(), 5) == own | {"encoding": 2 * 32 * 4}  # QCFS
    layerwise = floating_point(gpt2(), 5, execution="layerwise", T=3)
    assert layerwise == own | {"encoding": 2 * 32 * 3}
    stepwise = floating_point(gpt2(), 5, execution="stepwise", T=3)
    assert stepwise == {name: 3 * count for name, count in own.items()} | {"encoding": 2 * 32 * 3}
    accumulated = floating_point(gpt2(), 5, execution="accumulated", T=3)
    assert accumulated["norms"] == 3 * 5 * 8 * (7 + 4)
    assert accumulated["softmax"] == 3 * 2 * 2 * (5 * 6 + 4 * 4)  # two heads of 4 values


def test_floating_point_of_a_gated_model_by_hand():
    settings = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FASLlamaConfig(**settings, num_key_value_heads=2, vocab_size=20, sites="all", L=None, gain="token")
    config.activation, config.schedule, config.code = "stock", "layerwise", "phase"
    model = FASLlamaForCausalLM(config)
    inputs = 2 * (8 + 8 + 4 + 8 + 8 + 16) + 8  # qkv, queries, values, attention output, MLP; the head
    own = {"norms": 5 * 8 * 4, "softmax": 2 * 4 * 3 * 6, "activations": 2 * 16 * 5, "rotary": 2 * (8 + 4) * 3}
    found = floating_point(model, 5, execution="layerwise", T=3, causal=True)
    assert found == own | {"residuals": 2 * 2 * 8, "encoding": inputs * (3 + 3)}
    assert floating_point(model, 5)["encoding"] == 0  # the stock network


def test_floating_point_stands_beside_the_ratio():
    report = energy_report(gpt2(), 5, execution="layerwise", T=3, spike_rates=0.25)
    floating = sum(report["floating_point"].values())
    assert report["floating_point_energy_pj"] == pytest.approx(4.6 * floating)
    ann = sum(floating_point(gpt2(), 5).values())
    expected = (report["energy_pj"] + 4.6 * floating) / (report["ann_energy_pj"] + 4.6 * ann)
    assert report["ratio_with_floating_point"] == pytest.approx(expected)
