import numpy as np
import pytest

from tasks.engines.compiling import load_bundle
from tasks.engines.pytorch import PyTorch
from tasks.validation.continuations import continue_greedily, num_matching


def test_matches_end_at_the_first_difference():
    original = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]], np.int32)
    candidate = np.array([[1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 9]], np.int32)
    assert list(num_matching(candidate, original)) == [4, 0, 2, 3]


def test_continuations_are_transformers_greedy_text(tiny_checkpoint, tiny_bundle, small_data):
    import torch
    from transformers import AutoModelForCausalLM

    prompts = np.load(small_data / "evaluation.npy")[:, :20]
    prompts = np.concatenate([prompts, prompts[:, ::-1]])  # more than one batch
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids = torch.from_numpy(prompts.astype(np.int64))
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=-1)
    expected = out[:, 20:].numpy()
    bundle, _ = load_bundle(tiny_bundle, threads=1)
    for session in (PyTorch().load(tiny_checkpoint, threads=1), bundle):
        assert continue_greedily(session, prompts, 12).tolist() == expected.tolist()


def test_what_does_not_fit_and_what_is_not_finite_is_refused(tiny_checkpoint):
    session = PyTorch().load(tiny_checkpoint, threads=1)
    with pytest.raises(ValueError, match="at most 512 tokens; prompts of 500 and 14 new ones do not fit"):
        continue_greedily(session, np.ones((1, 500), np.int32), 14)

    class Broken:
        max_length = 10

        def prefill(self, ids):
            return np.full((len(ids), 1, 4), np.nan, np.float32)

    with pytest.raises(ValueError, match="finite"):
        continue_greedily(Broken(), np.ones((2, 3), np.int32), 2)
