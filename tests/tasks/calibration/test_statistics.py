import torch

from tasks.calibration.statistics import InputActivity, InputGram, InputNorm


def test_norm_is_that_of_all_tokens_together():
    norm = InputNorm(2)
    norm.update(torch.tensor([[[3.0, 1.0]], [[4.0, 0.0]]]))
    norm.update(torch.tensor([[[0.0, 0.0], [0.0, 2.0]]]))
    torch.testing.assert_close(norm.value, torch.tensor([5.0, 5.0**0.5]))


def test_activity_is_the_mean_over_a_sequence_and_the_norm_over_sequences():
    torch.manual_seed(0)
    x = torch.randn(5, 7, 3)
    activity = InputActivity(3)
    activity.update(x[:2])
    activity.update(x[2:])
    expected = []
    for channel in range(3):
        means = [sum(abs(x[sequence, token, channel].item()) for token in range(7)) / 7 for sequence in range(5)]
        expected.append(sum(mean**2 for mean in means) ** 0.5)
    torch.testing.assert_close(activity.value, torch.tensor(expected))


def test_gram_is_that_of_all_tokens_together():
    torch.manual_seed(0)
    batches = [torch.randn(2, 5, 8), torch.randn(1, 3, 8)]
    gram = InputGram(8)
    for batch in batches:
        gram.update(batch)
    x = torch.cat([batch.reshape(-1, 8) for batch in batches]).double()
    torch.testing.assert_close(gram.value.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert gram.num_tokens == 13
