"""The watermark's error-correcting code: a tail-biting convolutional code of rate 1/4 and constraint length 9.

The polynomials are those of cdma2000's rate-1/4 code. Decoding is Viterbi's algorithm on soft values (Viterbi 1967),
three times round the circle, of which the middle counts.
"""

from collections.abc import Sequence

import numpy as np

LENGTH = 9
POLYNOMIALS = (0o765, 0o671, 0o513, 0o473)
_STATES = 2 ** (LENGTH - 1)
_ROUNDS = 3


def coded_bits(bits: int) -> int:
    """How many coded bits a word of that many bits becomes."""
    return bits * len(POLYNOMIALS)


def encode(bits: Sequence[int]) -> np.ndarray:
    """Eight bits or more (0 or 1) as coded signs (int64, +1 for 0 and -1 for 1); the end runs into the beginning."""
    register, signs = 0, []
    for bit in bits[-(LENGTH - 1) :]:
        register = (register << 1) | bit
    for bit in bits:
        register = ((register << 1) | bit) & (2**LENGTH - 1)
        signs += [_sign(register & polynomial) for polynomial in POLYNOMIALS]
    return np.array(signs)


def decode(soft: np.ndarray) -> list[int]:
    """The bits whose coded signs agree best with `soft`: signs, each times how sure one is of it."""
    rows = soft.reshape(-1, len(POLYNOMIALS))
    states = np.arange(_STATES)
    metric = np.zeros(_STATES)
    came_high: list[np.ndarray] = []
    for row in np.concatenate([rows] * _ROUNDS):
        branch = _OUTPUTS @ row  # of a register: the state before is register >> 1, the one after loses the top bit
        low = metric[states >> 1] + branch[:_STATES]
        high = metric[(states + _STATES) >> 1] + branch[_STATES:]
        came_high.append(high > low)
        metric = np.maximum(low, high)
    bits, state = [], int(metric.argmax())
    for chosen in reversed(came_high):
        bits.append(state & 1)
        state = (state + _STATES * int(chosen[state])) >> 1
    return bits[::-1][len(rows) : 2 * len(rows)]


def _sign(masked: int) -> int:
    return -1 if masked.bit_count() % 2 else 1


_OUTPUTS = np.array([[_sign(register & one) for one in POLYNOMIALS] for register in range(2**LENGTH)], dtype=float)
