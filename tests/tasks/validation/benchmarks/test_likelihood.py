import numpy as np
import pytest

from tasks.calibration.checkpoints import load_tokenizer
from tasks.engines.compiling import load_bundle
from tasks.engines.pytorch import PyTorch
from tasks.validation.benchmarks.likelihood import Request, encode_pair, score


@pytest.fixture(scope="module")
def requests(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    pairs = [("def f(x):", " return x"), ("def f(x):", " pass"), ("import", "a"), ("import", "b"), ("import ", "os")]
    return [encode_pair(tokenizer, *pair) for pair in pairs]


def test_likelihoods_are_transformers_loss(tiny_checkpoint, requests):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    session = PyTorch().load(tiny_checkpoint, threads=1)
    for request, found in zip(requests, score(session, requests), strict=True):
        ids = torch.tensor([[*request.context, *request.continuation]])
        labels = ids.clone()
        labels[:, : len(request.context)] = -100
        with torch.inference_mode():
            out = model(input_ids=ids, labels=labels)
        assert found.log_probability == pytest.approx(-out.loss.item() * len(request.continuation), rel=1e-5)
        greedy = out.logits[0, len(request.context) - 1 : -1].argmax(-1).tolist()
        assert found.is_greedy == (greedy == list(request.continuation))


def test_an_engine_scores_as_pytorch_does_in_batches(tiny_checkpoint, tiny_bundle, requests):
    session, _ = load_bundle(tiny_bundle, threads=1)
    reference = PyTorch().load(tiny_checkpoint, threads=1)
    many = requests + [Request(tuple(range(n + 1, n + 9)), (n, 7)) for n in range(1, 20)]
    ours, theirs = score(session, many), score(reference, many)
    np.testing.assert_allclose([a.log_probability for a in ours], [b.log_probability for b in theirs], atol=1e-3)
    assert [a.is_greedy for a in ours] == [b.is_greedy for b in theirs]


def test_continuations_of_one_token_after_the_same_context_are_read_once():
    reads = []

    class Session:
        max_length = 10

        def prefill(self, ids, num_logits):
            reads.append(ids.shape)
            return np.zeros((*ids.shape[:1], num_logits, 4), np.float32)

    found = score(
        Session(), [Request((1, 2), (0,)), Request((1, 2), (3,)), Request((2, 1), (3,)), Request((1,), (2, 3))]
    )
    assert reads == [(2, 2)]  # the last reads (1, 2) as well
    assert [each.log_probability for each in found] == pytest.approx([np.log(1 / 4)] * 3 + [2 * np.log(1 / 4)])


def test_spaces_go_where_tokenizers_keep_them(tiny_checkpoint):
    tokenizer = load_tokenizer(tiny_checkpoint)
    context, continuation = encode_pair(tokenizer, "return ", "x")
    assert tokenizer.decode(context) == "return"
    assert tokenizer.decode(continuation) == " x"
    with pytest.raises(ValueError, match="must have a token"):
        encode_pair(tokenizer, "  ", "x")


def test_texts_that_are_too_long_and_logits_that_are_not_finite_are_refused():
    class Session:
        max_length = 4

        def prefill(self, ids, num_logits):
            return np.full((*ids.shape[:1], num_logits, 4), np.nan, np.float32)

    with pytest.raises(ValueError, match=r"at most 4 tokens; a prompt with its answer has 5"):
        score(Session(), [Request((1, 2, 3), (1, 2, 3))])
    with pytest.raises(ValueError, match="finite"):
        score(Session(), [Request((1, 2), (1,))])
