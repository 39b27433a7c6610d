"""Multi-token prediction keeps documents apart where it is told to."""

import torch

from model.mtp import mtp_losses
from tests.model.small import small_model, text


def _states(model, tokens, labels, documents):
    h_BLD, _ = model.hidden(tokens, documents)
    _, outputs = mtp_losses(
        model.mtp, h_BLD, tokens, labels, model.model.embed_tokens, model.lm_head, tokens.numel(), documents
    )
    return [output.h_BLD for output in outputs]


def test_no_depth_lets_a_document_see_the_one_before():
    model = small_model(num_nextn_predict_layers=2)
    tokens, labels = text(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % 61
    with torch.no_grad():
        before, after = (_states(model, t, labels, documents) for t in (tokens, changed))
        unmasked = _states(model, changed, labels, None)
    for k, (was, now) in enumerate(zip(before, after, strict=True), start=1):
        torch.testing.assert_close(was[:, 5:], now[:, 5:], rtol=0, atol=1e-10, msg=f"depth {k}")
        assert (was[:, :5] - now[:, :5]).abs().max() > 1e-3
    assert (unmasked[0][:, 5:] - before[0][:, 5:]).abs().max() > 1e-3
