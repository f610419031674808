"""The code gives back what went in, also where some of it is lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from skyloom.safety.convolution import coded_bits, decode, encode

words = st.lists(st.integers(0, 1), min_size=24, max_size=72)


@given(words)
def test_decoding_undoes_encoding(bits):
    signs = encode(bits)
    assert len(signs) == coded_bits(len(bits))
    assert set(signs.tolist()) <= {-1, 1}
    assert decode(signs.astype(float)) == bits


@given(words, st.integers(0, 2**32 - 1))
def test_some_of_the_signs_may_be_wrong_where_they_are_weak(bits, seed):
    signs = encode(bits).astype(float)
    wrong = np.random.default_rng(seed).choice(len(signs), len(signs) // 16, replace=False)
    signs[wrong] *= -0.3
    assert decode(signs) == bits
