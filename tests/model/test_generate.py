"""Generation from the cache against recomputing everything for every token."""

import pytest
import torch

from model.generate import generate
from tests.model.small import small_model, text


def test_greedy_is_the_likeliest_token_each_time():
    model = small_model()
    prompt, _ = text(2, 5)
    expected = prompt
    for _ in range(6):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generate(model, prompt, 6), expected)
    assert torch.equal(generate(model, prompt, 0), prompt)


def test_temperature_samples_the_distribution():
    model = small_model()
    prompt = text(1, 5)[0].expand(4000, -1)
    probs = (model(prompt[:1])[0, -1] / 0.5).softmax(-1)
    drawn = generate(model, prompt, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, -1]
    assert (torch.bincount(drawn, minlength=61) / 4000 - probs).abs().max() < 0.03
    again = generate(model, prompt, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, -1]
    assert torch.equal(drawn, again)


def test_it_stops_where_every_sequence_has_stopped():
    model = small_model()
    prompt, _ = text(1, 5)
    whole = generate(model, prompt, 8)
    stop = int(whole[0, 7])
    first = whole[0, 5:].tolist().index(stop)
    assert torch.equal(generate(model, prompt, 8, stop_token=stop), whole[:, : 6 + first])


@pytest.mark.parametrize(
    ("prompt", "kwargs", "words"),
    [
        ([[]], {}, "empty"),
        ([[70]], {}, "token 70.*vocabulary has 61"),
        ([[1]], {"temperature": -1.0}, "temperature -1"),
    ],
)
def test_a_wrong_prompt_is_refused(prompt, kwargs, words):
    with pytest.raises(ValueError, match=words):
        generate(small_model(), torch.tensor(prompt, dtype=torch.int64), 3, **kwargs)
