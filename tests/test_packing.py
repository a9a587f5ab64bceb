"""Several texts in one row, told apart by `position_ids` that start again at 0, are as good as rows of their own."""

import inspect

import pytest
import torch
from transformers import DataCollatorWithFlattening

import backbones
import naive
from backbones import CAUSAL, POSITIONS, some
from configuration_fas import BACKBONES


EXACT = {"atol": 1e-12, "rtol": 0}  # float64: no level can flip by rounding
MODES = [(0, "stepwise"), (4, "stepwise"), (4, "layerwise")]
PACKABLE = [
    backbone for backbone in CAUSAL if backbone != "opt"
]  # stock OPT tells texts apart in flash attention only
LEARNED = [backbone for backbone in CAUSAL if BACKBONES[backbone].positions is not None]
# RoBERTa numbers its positions from 2 on; DistilBERT of transformers 4 takes none.
ENCODERS = [
    backbone
    for backbone, table in BACKBONES.items()
    if not table.causal
    and table.positions == 0
    and "position_ids" in inspect.signature(backbones.stock_class(backbone, "AutoModelForMaskedLM").forward).parameters
]
BY_POSITION = [backbone for backbone in CAUSAL if all(site.per_position for site in BACKBONES[backbone].sites)]


def spiking(
    backbone: str, T: int, schedule: str, granularity: str | None = None, auto_class: str = "AutoModelForCausalLM"
):
    """A language model in float64; calibrated by position, with thresholds that differ between positions."""
    model = backbones.model(backbone, auto_class, T=T, schedule=schedule).double()
    if granularity is not None:
        model.begin_calibration(4, granularity, POSITIONS)
        generator = torch.Generator().manual_seed(3)
        for _, neuron in model.neurons():
            torch.nn.init.uniform_(neuron.fine_threshold, 0.4, 1.2, generator=generator)
            torch.nn.init.uniform_(neuron.initial_potential, 0.1, 0.9, generator=generator)
    return model


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, backbones.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def packed(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """All rows as one, as the collator of transformers makes it: no mask. Stock models ask for no cache then."""
    return {**DataCollatorWithFlattening()([{"input_ids": row} for row in rows]), "use_cache": False}


def padded_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows as wide as the first."""
    width = len(rows[0])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, (torch.arange(width) >= width - torch.tensor([[len(row)] for row in rows])).long()


def alone(model, row: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([row])).logits[0]


@pytest.mark.parametrize("backbone", PACKABLE)
@pytest.mark.parametrize("T, schedule", MODES)
@torch.no_grad()
def test_packed_texts_equal_rows_of_their_own(backbone, T, schedule):
    model, rows = spiking(backbone, T, schedule), texts(7, 1, 5)
    logits = model(**packed(rows)).logits[0].split([7, 1, 5])
    for found, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(found, alone(model, row), **EXACT)


@pytest.mark.parametrize("backbone", CAUSAL)
@torch.no_grad()
def test_packed_texts_equal_copies_of_the_stock_model(backbone):
    model, rows = spiking(backbone, 4, "stepwise"), packed(texts(7, 1, 5))
    del rows["use_cache"], rows["labels"]
    stock = naive.network(model, 4)(**naive.copies(4, rows), use_cache=False).logits
    logits = model(**rows, use_cache=False).logits
    torch.testing.assert_close(logits, stock.unflatten(0, (4, -1)).mean(0), **EXACT)


@pytest.mark.parametrize("backbone", PACKABLE)
@pytest.mark.parametrize("T, schedule", MODES)
@torch.no_grad()
def test_all_packed_texts_may_be_longer_than_the_positions(backbone, T, schedule):
    model, rows = spiking(backbone, T, schedule), texts(20, POSITIONS)
    logits = model(**packed(rows)).logits[0].split([20, POSITIONS])
    for found, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(found, alone(model, row), **EXACT)


@pytest.mark.parametrize("backbone", BY_POSITION)
@pytest.mark.parametrize("T, schedule", MODES)
@torch.no_grad()
def test_thresholds_by_position_go_by_position_ids_where_texts_are_packed(backbone, T, schedule):
    model, rows = spiking(backbone, T, schedule, "position"), texts(20, 1, 25)
    logits = model(**packed(rows)).logits[0].split([20, 1, 25])
    for found, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(found, alone(model, row), **EXACT)


@pytest.mark.parametrize("T, schedule", MODES)
@pytest.mark.parametrize(
    # What generate() gives to padding, in transformers 5 and 4.
    "backbone, filler",
    some(lambda backbone, filler: backbone == "gpt2" or filler == 0, BY_POSITION, [0, 1]),
)
@torch.no_grad()
def test_thresholds_by_position_go_by_position_ids_where_rows_are_padded(backbone, T, schedule, filler):
    model, rows = spiking(backbone, T, schedule, "position"), texts(9, 6, 4)
    padded, mask = padded_left(rows)
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
    logits = model(input_ids=padded, attention_mask=mask, position_ids=position_ids).logits
    for found, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(found[-len(row) :], alone(model, row), **EXACT)


@pytest.mark.parametrize(
    "use_cache, schedule, backbone",
    some(
        lambda use_cache, schedule, backbone: backbone == "gpt2" or (use_cache and schedule == "stepwise"),
        [True, False],
        ["stepwise", "layerwise"],
        BY_POSITION,
    ),
)
def test_thresholds_by_position_go_with_the_text_in_generation(backbone, schedule, use_cache):
    model, rows = spiking(backbone, 4, schedule, "position"), texts(9, 6, 4)
    padded, mask = padded_left(rows)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(input_ids=padded, attention_mask=mask, **settings)
    for i, row in enumerate(rows):
        single = model.generate(input_ids=torch.tensor([row]), **settings)
        assert torch.equal(together.sequences[i, 9:], single.sequences[0, len(row) :])
        # generate() rounds the float64 logits to float32.
        found, expected = (torch.stack(each.logits) for each in (together, single))
        torch.testing.assert_close(found[:, i], expected[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backbone", ENCODERS)
@pytest.mark.parametrize("T, schedule", MODES)
@torch.no_grad()
def test_thresholds_by_position_go_by_the_position_ids_of_encoders(backbone, T, schedule):
    model, rows = spiking(backbone, T, schedule, "position", "AutoModelForMaskedLM"), texts(9, 6, 4)
    padded, mask = padded_left(rows)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=padded, attention_mask=mask, position_ids=position_ids).logits
    for found, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(found[-len(row) :], alone(model, row), **EXACT)


# GPT-2 of transformers 4 drops what its trunk could take.
@pytest.mark.parametrize("backbone", [name for name in PACKABLE if name not in LEARNED])
@torch.no_grad()
def test_lengths_of_packed_texts_are_refused_where_rows_are_repeated(backbone):
    rows = texts(7, 1, 5)
    lengths = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": row} for row in rows])
    assert "cu_seq_lens_q" in lengths
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must not be given in stepwise mode"):
        spiking(backbone, 4, "stepwise")(**lengths, use_cache=False)
    for T, schedule in ((0, "stepwise"), (1, "stepwise"), (4, "layerwise")):
        model = spiking(backbone, T, schedule)
        assert torch.equal(model(**lengths, use_cache=False).logits, model(**packed(rows)).logits)


@pytest.mark.parametrize("T, schedule", MODES)
@pytest.mark.parametrize("granularity", ["neuron", "position"])
def test_training_on_packed_texts_is_training_on_rows(T, schedule, granularity):
    model, rows = spiking("gpt2", T, schedule, granularity), texts(7, 12, 5)
    outputs = model(**packed(rows))
    outputs.loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    singles = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
    loss = sum(singles) / (7 + 12 + 5 - 3)
    loss.backward()
    # The stock loss is in float32.
    torch.testing.assert_close(outputs.loss, loss, atol=1e-5, rtol=0)
    expected = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backbone", LEARNED)
@pytest.mark.parametrize("T, schedule", MODES)
def test_position_ids_beyond_the_positions_are_refused(backbone, T, schedule):
    model = spiking(backbone, T, schedule)
    position_ids = torch.tensor([[0, 1, 2, POSITIONS - 1]])
    ids = torch.full((1, 4), 2)
    assert model(input_ids=ids, position_ids=position_ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"`position_ids`.* {POSITIONS} positions.*got {POSITIONS + 1}"):
        model(input_ids=ids, position_ids=position_ids + 1)


@pytest.mark.parametrize("backbone", BY_POSITION)
@pytest.mark.parametrize("T, schedule", MODES[1:])
def test_position_ids_beyond_the_calibrated_ones_are_refused(backbone, T, schedule):
    model = backbones.model(backbone, "AutoModelForCausalLM", T=T, schedule=schedule)
    model.begin_calibration(4, "position", 6)
    rows = packed(texts(6, 6, 3))
    assert model(**rows).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"6 positions that the fine thresholds were calibrated for, got 7"):
        model(**packed(texts(3, 7)))


@pytest.mark.parametrize(
    "given, backbone, schedule",
    some(
        lambda given, backbone, schedule: backbone in ("gpt2", "bert") or (given and schedule == "stepwise"),
        [False, True],
        [*BY_POSITION, *ENCODERS],
        ["stepwise", "layerwise"],
    ),
)
def test_blocks_that_run_again_for_their_gradient_know_the_positions(backbone, schedule, given):
    task = "AutoModelForCausalLM" if backbone in CAUSAL else "AutoModelForMaskedLM"
    model = spiking(backbone, 4, schedule, "position", task).train()
    padded, mask = padded_left(texts(9, 6, 4))
    inputs = {"input_ids": padded}
    if given:
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            # transformers 5.23 renames it.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        found.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backbone", [backbone for backbone, table in BACKBONES.items() if table.positions == -2])
@torch.no_grad()
def test_thresholds_by_position_where_positions_are_numbered_from_2_on(backbone):
    """RoBERTa's own `position_ids` start after that of padding; giving them changes nothing."""
    model = spiking(backbone, 4, "stepwise", "position", "AutoModelForMaskedLM")
    for length in (5, POSITIONS):
        ids = torch.tensor(texts(length))
        explicit = model(input_ids=ids, position_ids=torch.arange(2, 2 + length)[None]).logits
        torch.testing.assert_close(explicit, model(input_ids=ids).logits, **EXACT)
