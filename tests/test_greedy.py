"Greedy search: the oracle's cases, batches, and repeated n-grams."

import pytest
import torch
from helpers.worlds import CASES, case, markov, padded

from decoding_book.greedy import greedy_search, repeated_ngrams
from decoding_book.toy import six_words


@pytest.mark.parametrize("name", CASES)
def test_the_greedy_text_is_that_of_the_oracle(name):
    model, T, get = case(name)
    found = greedy_search(model, "", T)
    assert padded(found, T) == get("greedy_seq").tolist()
    assert abs(found.logprob - get("greedy_logp")) < 1e-9 and found.logprob == found.score
    assert model.rows == len(found) and found.finished == (found.ids[-1].item() == model.eos)


def test_rows_of_greedy_batches_are_those_alone():
    prompts = [[1, 2, 3], [4], [0, 0, 2, 1, 3]]
    for one, prompt in zip(greedy_search(markov(), prompts, 6), prompts, strict=True):
        alone = greedy_search(markov(), prompt, 6)
        assert (
            one.ids.equal(alone.ids)
            and one.logprob == alone.logprob
            and one.prompt_ids.tolist() == prompt
        )
    assert greedy_search(markov(), [1], 6, stop=[0, 1, 2, 3, 4]).finished
    ended = next(p for p in range(5) if greedy_search(markov(), [p], 6).finished)
    assert len(greedy_search(markov(), [ended], 6, ignore_eos=True)) == 6
    with pytest.raises(ValueError, match="a search compares ids"):
        greedy_search(six_words(), "", 5, stop="I")


def test_repeated_ngrams_are_the_share_said_before():
    assert repeated_ngrams([1, 2, 3, 4, 5, 6, 7]) == 0 and repeated_ngrams([1, 2, 3]) == 0
    assert repeated_ngrams(torch.tensor([1, 2] * 4), 2) == 1 - 2 / 7  # (1,2) and (2,1) out of seven
    assert (
        repeated_ngrams([1, 1], 1) == 0.5
        and repeated_ngrams([3, 1, 2, 3, 4, 1, 2, 3], 3) == 1 - 5 / 6
    )
    with pytest.raises(ValueError, match="n: 0 is below 1"):
        repeated_ngrams([1, 2], 0)
