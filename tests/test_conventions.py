"""Programs of other packages that load models by themselves: what they ask for is there."""

import importlib

import pytest
import torch
import transformers

import backbones
from backbones import CAUSAL
from checkpoints import tiny_checkpoint
from configuration_fas import BACKBONES, FASConfig
from modeling_fas import FASGPT2LMHeadModel


SERVE = """
import os, sys
from transformers import AutoProcessor  # as docs/use.md starts the server
from transformers.cli.serving.model_manager import ModelManager
model, _ = ModelManager(device="cpu", trust_remote_code=True).load_model_and_processor(sys.argv[1] + "@main")
assert type(model).__module__.startswith("transformers_modules."), type(model)
print(type(model).__name__, flush=True)
os._exit(0)  # a timer of the manager
"""


@pytest.mark.parametrize("backbone", BACKBONES)
def test_architectures_are_found_where_transformers_looks_them_up(backbone):
    FASConfig(backbone=backbone)
    now = importlib.import_module("transformers")  # which makes itself anew when a part of it is imported
    for auto, name in BACKBONES[backbone].models.items():
        assert getattr(now, name) is getattr(now, auto)


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5", reason="of transformers 5")
def test_the_server_of_transformers_loads_a_checkpoint(tmp_path, run_outside):
    tiny_checkpoint(tmp_path / "gpt2", "gpt2", results=False)
    assert "FASGPT2LMHeadModel" in run_outside(["-c", SERVE, str(tmp_path / "gpt2")])


@pytest.mark.skipif(transformers.__version__ < "5", reason="4 makes no tokenizer without files")
def test_a_pipeline_takes_the_path_of_an_assistant(tmp_path):
    """Where the project is imported; else it takes the assistant as a model."""
    tiny_checkpoint(tmp_path, "gpt2", results=False)
    helped = transformers.pipeline("text-generation", model=str(tmp_path), assistant_model=str(tmp_path))
    assert type(helped.assistant_model) is FASGPT2LMHeadModel


def test_sentence_transformers_takes_the_settings_as_config_kwargs(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    tiny_checkpoint(tmp_path, "mlm", results=False)
    settings = {"T": 2, "schedule": "layerwise"}
    loaded = library.SentenceTransformer(str(tmp_path), trust_remote_code=True, config_kwargs=settings, device="cpu")
    config = loaded[0].auto_model.config
    assert (config.T, config.schedule) == (2, "layerwise")
    assert loaded.encode(["the cat sat"]).shape == (1, config.hidden_size)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for something by its old name
@pytest.mark.parametrize(
    "settings", [{"T": 4}, {"T": 3, "schedule": "accumulated"}, {"T": 4, "schedule": "layerwise"}]
)
@pytest.mark.parametrize("backbone", CAUSAL)
def test_prefix_tuning_of_peft_works_at_every_timestep(backbone, settings):
    peft = pytest.importorskip("peft")
    model = backbones.model(backbone, "AutoModelForCausalLM", **settings).double()
    inputs = backbones.batch(backbone, "AutoModelForCausalLM")
    inputs.pop("position_ids")
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(each.grad.any() for _, each in tuned.named_parameters() if each.requires_grad)
    with torch.no_grad():
        whole = tuned.eval()(**inputs).logits
        alone = tuned(**{name: value[1:2, :6] for name, value in inputs.items()}).logits[0]
    torch.testing.assert_close(whole[1, :6], alone, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(transformers, "ContinuousBatchingConfig"), reason="of transformers 5")
@pytest.mark.parametrize("backbone", ["gpt2", "llama"])
def test_continuous_batching_gives_the_tokens_of_generate_or_says_why_not(backbone):
    pytest.importorskip("psutil")
    model = backbones.model(backbone, "AutoModelForCausalLM", T=4, schedule="layerwise")
    rows = backbones.batch(backbone, "AutoModelForCausalLM")["input_ids"]
    prompts = [rows[0].tolist(), rows[1, :6].tolist()]
    asked = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [model.generate(torch.tensor([p]), generation_config=asked)[0, len(p) :].tolist() for p in prompts]
    # By default it takes most of the memory of the machine.
    small = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    found = model.generate_batch(prompts, generation_config=asked, continuous_batching_config=small)
    assert [each.generated_tokens for each in found.values()] == expected
    model.set_timesteps(4, "stepwise")
    for each in model.generate_batch(prompts[:1], generation_config=asked, continuous_batching_config=small).values():
        assert "must not be given in stepwise mode" in each.error
