"""`torch.compile` with its defaults: whole graphs, and no new one for every length or every return to a T."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tiny


pytestmark = pytest.mark.slow


def graphs_compiled(kind, calls, schedule):
    """Number of graphs after each of the calls, `(T, length)`."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = tiny.model(kind, schedule=schedule)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for T, length in calls:
        ids = torch.randint(1, tiny.VOCABULARY, (3, length))
        model.set_timesteps(T)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        graphs.append(counter.frame_count)
    return graphs


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_new_length_compiles_once(kind, schedule):
    graphs = graphs_compiled(kind, [(4, length) for length in (8, 16, 24, 32)], schedule)
    assert graphs == [1, 2, 2, 2]


@pytest.mark.parametrize("schedule", ["stepwise", "layerwise"])
def test_a_new_number_of_timesteps_compiles_at_most_once_a_length(schedule):
    graphs = graphs_compiled("gpt2", [(T, length) for T in (1, 2, 4, 2, 4) for length in (8, 16)], schedule)
    assert graphs[-1] == graphs[5] <= 6
