"""The watermark's error-correcting code: a tail-biting convolutional code of rate 1/4 and constraint length 9.

The polynomials are those of cdma2000's rate-1/4 code. Decoding is Viterbi's algorithm on soft values (Viterbi 1967),
three times round the circle, of which the middle counts; the words beside the best one take a detour somewhere.
"""

import numpy as np
from jaxtyping import Float, Int

LENGTH = 9
POLYNOMIALS = (0o765, 0o671, 0o513, 0o473)
_STATES = 2 ** (LENGTH - 1)


def coded_bits(bits: int) -> int:
    """How many coded bits a word of that many bits becomes."""
    return bits * len(POLYNOMIALS)


def encode(words: Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b m"]:
    """Words of eight bits or more (0 or 1) as coded signs, 1 for 0 and -1 for 1; the end runs into the beginning."""
    registers = sum(np.roll(words, back, axis=1) << back for back in range(LENGTH))
    return _SIGNS[registers].reshape(len(words), -1)


def decode(soft: Float[np.ndarray, "b m"]) -> Int[np.ndarray, "b a n"]:
    """The words whose coded signs agree best with `soft` (signs, each times how sure one is of it).

    First the likeliest, then those that take the other way at one place, in the order of places.
    """
    rows = soft.astype(np.float32).reshape(len(soft), -1, len(POLYNOMIALS))
    count = rows.shape[1]
    metric = np.zeros((len(soft), _STATES), dtype=np.float32)
    came_high: list[np.ndarray] = []
    for step in range(3 * count):
        branch = (
            rows[:, step % count] @ _SIGNS.T
        )  # of a register: the state before is register >> 1
        before = np.repeat(metric, 2, axis=1)
        low, high = (
            before[:, :_STATES] + branch[:, :_STATES],
            before[:, _STATES:] + branch[:, _STATES:],
        )
        came_high.append(high > low)
        metric = np.maximum(low, high)
    others = np.array([-1, *range(count, 2 * count + LENGTH - 1)])  # where the other way is taken
    state, every = (
        np.repeat(metric.argmax(1)[:, None], len(others), 1),
        np.arange(len(soft))[:, None],
    )
    bits: list[np.ndarray] = []
    for step in range(3 * count - 1, count - 1, -1):
        bits.append(state & 1)
        state = (state + _STATES * (came_high[step][every, state] ^ (others == step))) >> 1
    return np.stack(bits[: -count - 1 : -1], 2)


def _sign(masked: int) -> int:
    return -1 if masked.bit_count() % 2 else 1


_SIGNS = np.array(
    [[_sign(register & one) for one in POLYNOMIALS] for register in range(2**LENGTH)],
    dtype=np.float32,
)
