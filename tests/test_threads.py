"""Threads that share a model: what belongs to a call is no other thread's."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import backbones
import tiny


def together(functions, rounds=12):
    """Results of functions that run again and again at the same time, one thread each; they meet before each round."""
    barrier = threading.Barrier(len(functions))

    def work(function):
        results = []
        for _ in range(rounds):
            barrier.wait(timeout=60)
            results.append(function())
        return results

    with ThreadPoolExecutor(len(functions)) as pool:
        return [done.result() for done in [pool.submit(work, function) for function in functions]]


def assert_alone_as_together(calls):
    """Calls give in threads what they give alone, which is returned."""
    expected = [call() for call in calls]
    for found, want in zip(together(calls), expected, strict=True):
        assert all(torch.equal(each, want) for each in found)
    return expected


def by_position(**settings):
    model = tiny.model("gpt2", **settings).begin_calibration(4, "position", tiny.POSITIONS)
    for _, neuron in model.neurons():
        torch.nn.init.uniform_(neuron.fine_threshold, 0.3, 1.5)
    return model


def prompt(length, seed):
    return torch.randint(1, tiny.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def test_two_threads_generate_with_thresholds_by_position():
    model = by_position(T=4)
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True}
    prompts = [prompt(length, length) for length in (3, 11)]
    calls = [
        lambda ids=ids: torch.stack(model.generate(ids, return_dict_in_generate=True, **asked).logits)
        for ids in prompts
    ]
    assert_alone_as_together(calls)


@torch.no_grad()
def test_threads_run_one_model_for_different_times():
    model, ids = tiny.model("gpt2"), prompt(9, 0)

    def at(T, schedule):
        def call():
            with model.running(T, schedule):
                assert (model.config.T, model.config.schedule) == (T, schedule)
                assert {neuron.T for _, neuron in model.neurons()} == {T}
                return model(ids).logits

        return call

    calls = [at(*mode) for mode in ((1, "stepwise"), (4, "stepwise"), (4, "accumulated"), (6, "layerwise"))]
    calls.append(lambda: model(ids).logits)  # at what the model is set to
    *others, own = assert_alone_as_together(calls)
    assert all(not torch.equal(own, each) for each in others)
    assert model.config.T == 0


@torch.no_grad()
def test_early_exit_in_a_thread_leaves_other_calls_alone():
    model, inputs = tiny.model("classify"), tiny.batch("classify")
    inputs.pop("labels")
    calls = [lambda: model.early_exit(4, **inputs), lambda: model(**inputs).logits, lambda: run_at_4()]

    def run_at_4():
        with model.running(4, "stepwise"):
            return model(**inputs).logits

    exits, at_0, at_4 = assert_alone_as_together(calls)
    torch.testing.assert_close(exits[-1], at_4)
    assert exits.shape == (4, *at_4.shape) and not torch.equal(at_0, at_4)


@torch.no_grad()
def test_setting_a_model_in_two_threads_is_detected():
    model, ids = tiny.model("gpt2"), prompt(9, 0)
    model.set_timesteps(2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: model.set_timesteps(4)(ids)).result()
        with pytest.raises(
            ValueError, match=r"`set_timesteps` must not be called.* \(2, 'stepwise'\).*`with model.running"
        ):
            model(ids)
        model.set_timesteps(4)(ids)  # what the other one set
        pool.submit(lambda: model(ids)).result()
        model.config.T = 3  # by hand, in this thread
        model(ids)


@torch.no_grad()
def test_setting_a_model_in_the_middle_of_a_call_changes_the_next_one():
    model, ids = tiny.model("gpt2", T=4), prompt(9, 0)
    expected = model(ids).logits
    with ThreadPoolExecutor(1) as pool:
        block = model.transformer.h[1].register_forward_pre_hook(
            lambda *_: pool.submit(model.set_timesteps, 2).result() and None
        )
        assert torch.equal(model(ids).logits, expected)
        block.remove()
    assert model.config.T == 2 and not torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_copies_for_data_parallel_run_as_the_thread_that_made_them():
    model, ids = tiny.model("gpt2"), prompt(9, 0)
    with model.running(4), ThreadPoolExecutor(1) as pool:
        expected = model(ids).logits
        replica = model._replicate_for_data_parallel()
        assert torch.equal(pool.submit(lambda: replica(ids).logits).result(), expected)
        assert not torch.equal(pool.submit(lambda: model(ids).logits).result(), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_run_again_as_in_their_call_whatever_thread_wants_gradients(reentrant):
    """As autograd does on an accelerator: in a thread of its own."""
    model = by_position().train()
    inputs = tiny.batch("gpt2", "left")
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        model.zero_grad()
        with model.running(4):
            loss = model(**inputs, use_cache=False).loss
        model(tiny.batch("gpt2")["input_ids"][:, 3:])  # another call, for other positions
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("backbone", backbones.BACKBONES)
def test_a_model_that_runs_for_a_while_is_copied_pickled_and_saved_as_it_is_set(backbone, tmp_path):
    model = backbones.model(backbone, "AutoModelForSequenceClassification", T=2)
    with model.running(4):
        assert copy.deepcopy(model).config.T == 2
        assert pickle.loads(pickle.dumps(model)).config.T == 2
        model.save_pretrained(tmp_path)
        assert model.config.T == 4 and model.config.to_dict()["T"] == 2
    assert type(model).from_pretrained(tmp_path).config.T == 2


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_follow_positions_and_time():
    """Whatever a thread holds when they are compiled."""
    torch._dynamo.reset()
    model, ids = by_position(), prompt(9, 0)

    def logits():
        with model.running(4, "stepwise"):
            cache = model(ids[:, :5], use_cache=True).past_key_values
            late = model(ids[:, 5:7], past_key_values=cache, use_cache=True).logits
            return late, model(ids[:, 7:], past_key_values=cache, use_cache=True).logits, model(ids).logits

    expected, ann = logits(), model(ids).logits
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, backend="eager")
    for _ in range(2):
        for found, want in zip(logits(), expected, strict=True):
            torch.testing.assert_close(found, want)
        torch.testing.assert_close(model(ids).logits, ann)
