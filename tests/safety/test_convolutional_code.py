"""Convolutional code: decoding inverts encoding, also with errors."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from skyloom.safety.convolutional_code import coded_bits, decode, encode

words = st.lists(st.integers(0, 1), min_size=24, max_size=72)


@given(words)
def test_decoding_undoes_encoding(bits):
    signs = encode(np.array([bits]))
    assert signs.shape == (1, coded_bits(len(bits)))
    assert set(signs[0].tolist()) <= {-1, 1}
    assert decode(signs)[0, 0].tolist() == bits


@given(words, st.integers(0, 2**32 - 1))
def test_weak_wrong_signs_are_corrected(bits, seed):
    signs = encode(np.array([bits]))
    wrong = np.random.default_rng(seed).choice(signs.shape[1], signs.shape[1] // 16, replace=False)
    signs[:, wrong] *= -0.3
    assert decode(signs)[0, 0].tolist() == bits


def test_batches_equal_single_words():
    words = np.random.default_rng(0).integers(0, 2, (5, 48))
    soft = encode(words) + np.random.default_rng(1).normal(size=(5, 192))
    assert np.array_equal(decode(soft), np.concatenate([decode(one[None]) for one in soft]))


def test_candidates_contain_more_correct_words_than_the_best():
    words = np.random.default_rng(2).integers(0, 2, (300, 60))
    soft = encode(words) + np.random.default_rng(3).normal(size=(300, 240)) * 1.5
    found = (decode(soft) == words[:, None]).all(2)
    assert found[:, 0].mean() + 0.05 < found.any(1).mean() < 1
