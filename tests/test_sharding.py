"""Sharded parameters (FSDP2): two processes on the CPU against one, and what a sharded model saves."""

import json
import shutil

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import ProcessRaisedException
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tiny
from benchmarks import sharded
from benchmarks import training_processes as processes
from fas import convert_to_spiking
from modeling_fas import FASGPT2LMHeadModel, FASLlamaForCausalLM
from neurons_fas import MIN_THRESHOLD
from training import run_clm
from training.layout import auto_class
from training.results import fingerprint, read_results
from training_helpers import in_two_processes, save_gpt2, sentences, tensors, write_corpus


SPIKES = {
    "T": 3,
    "calib_T": 3,
    "schedule": "layerwise",
    "sites": "all",
    "activation": "stock",
    "L": None,
    "code": "phase",
    "gain": "token",
}
LOADS = "import sys\nfrom transformers import AutoModelForCausalLM as A\n"
LOADS += "print(type(A.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"


@pytest.fixture
def shard():
    """Shards a model as FSDP2 does, block by block, over this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def apply(model):
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    yield apply
    distributed.destroy_process_group()


def test_a_sharded_model_is_saved_as_the_model_that_it_is(shard, tmp_path):
    model = tiny.model("gpt2", **SPIKES)
    expected, plain = fingerprint(model), {name: each.clone() for name, each in model.state_dict().items()}
    shard(model)
    assert auto_class(model) == "AutoModelForCausalLM"
    assert fingerprint(model) == expected
    model.save_pretrained(tmp_path, state_dict=plain)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_fas.FASGPT2LMHeadModel"
    assert config["architectures"] == ["FASGPT2LMHeadModel"]
    assert {path.stem.rpartition("_")[2] for path in tmp_path.glob("*.py")} == {"fas"}
    assert type(model).__name__ == "FSDPFASGPT2LMHeadModel"  # which goes on training


def test_thresholds_of_a_sharded_model_stay_positive(shard):
    model = shard(tiny.model("gpt2", **SPIKES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("threshold", ".gain")):
                parameter.fill_(-1.0)
    model.clamp_thresholds_()
    lifted = [each for name, each in model.state_dict().items() if name.endswith(("threshold", ".gain"))]
    assert lifted and all(each.full_tensor().eq(MIN_THRESHOLD).all() for each in lifted)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_corpus(folder / "corpus.json", 1000)
    write_corpus(folder / "held_out.json", 100, seed=1)
    save_gpt2(folder / "gpt2", dropout=0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 32, "initializer_range": 0.2}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    spiking = convert_to_spiking(str(folder / "llama"), sentences(40), progress=False, code="phase", T=3)
    spiking.save_pretrained(folder / "phase-llama")
    tokenizer.save_pretrained(folder / "phase-llama")
    return folder


def flags(model, inputs, out, size, kind=None, steps=6):
    """Of a short training of 6 steps: QCFS, or a converted model by its teacher; sharded where a kind says how."""
    found = [*processes.command("gpt2", "downstream", inputs, out, size, steps)[1:], "--save_steps", "3"]
    found += ["--do_eval", "--validation_file", str(inputs / "held_out.json"), "--T", "3"]
    found[found.index("--model_name_or_path") + 1] = str(inputs / model)
    found += ["--teacher", str(inputs / "llama")] if model == "phase-llama" else []
    if kind is not None:
        block = {"gpt2": "GPT2Block", "phase-llama": "LlamaDecoderLayer"}[model]
        settings = {"transformer_layer_cls_to_wrap": [block], "state_dict_type": kind}
        found += ["--fsdp", "true", "--fsdp_config", json.dumps(settings)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("model", ["gpt2", "phase-llama"])
def test_sharded_training_equals_that_of_one_process_goes_on_and_loads(model, kind, inputs, tmp_path, run_outside):
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    run_clm.main(flags(model, inputs, one, 8))
    in_two_processes(sharded.main, flags(model, inputs, two, 4, kind))
    assert list((two / "checkpoint-3").glob("pytorch_model_fsdp*")), "it was sharded"
    assert processes.apart(processes.losses(two), processes.losses(one)) < 1e-5
    found = processes.difference(one, two)
    assert found["thresholds"] < 1e-4
    assert found["weights"] < 1e-4
    (quality, rates), (expected, expected_rates) = processes.measured(two), processes.measured(one)
    assert quality == pytest.approx(expected, rel=1e-3)
    assert rates == pytest.approx(expected_rates, rel=0.05)
    model_class = FASGPT2LMHeadModel if model == "gpt2" else FASLlamaForCausalLM
    assert run_outside(["-c", LOADS, str(two)]).split()[-1] == model_class.__name__
    made = model_class.from_pretrained(two)
    assert fingerprint(made) == read_results(two / "evaluation.json")["configuration"]["weights_sha256"]

    shutil.copytree(two / "checkpoint-3", resumed / "checkpoint-3")
    in_two_processes(sharded.main, [*flags(model, inputs, resumed, 4, kind), "--resume_from_checkpoint", "true"])
    after, before = tensors(resumed), tensors(two)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_sharded_training_that_diverges_stops(inputs, tmp_path):
    diverging = [*flags("gpt2", inputs, tmp_path / "out", 4, "FULL_STATE_DICT"), "--learning_rate", "1e38"]
    with pytest.raises(ProcessRaisedException, match="the weights of step 1 are"):
        in_two_processes(sharded.main, diverging)


@pytest.mark.slow
def test_sharding_on_cpus_which_accelerate_leaves_out_is_refused(inputs, tmp_path):
    with pytest.raises(
        ProcessRaisedException, match="`fsdp` must be left out on cpu, where accelerate shards nothing"
    ):
        in_two_processes(run_clm.main, flags("gpt2", inputs, tmp_path / "out", 4, "FULL_STATE_DICT"))
