"""Tail-biting convolutional code of rate 1/4 and constraint length 9, for the watermark.

The polynomials are those of cdma2000. Decoding is the soft-decision Viterbi algorithm (Viterbi
1967) over three repetitions of the word, of which the middle one is used. It also returns the words
of the best paths that differ from the best one at one place.
"""

import numpy as np
from jaxtyping import Float, Int

CONSTRAINT_LENGTH = 9
POLYNOMIALS = (0o765, 0o671, 0o513, 0o473)
_STATES = 2 ** (CONSTRAINT_LENGTH - 1)


def coded_bits(bits: int) -> int:
    """Return the number of coded bits of a word of `bits` bits."""
    return bits * len(POLYNOMIALS)


def encode(words: Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b m"]:
    """Encode words of at least eight bits (0 or 1) to signs: 1 for a 0 bit, -1 for a 1 bit."""
    registers = sum(np.roll(words, back, axis=1) << back for back in range(CONSTRAINT_LENGTH))
    return _SIGNS[registers].reshape(len(words), -1)


def decode(soft: Float[np.ndarray, "b m"]) -> Int[np.ndarray, "b a n"]:
    """Decode soft values (sign times confidence) to candidate words.

    The most likely word first, then the best path with another branch at each place.
    """
    rows = soft.astype(np.float32).reshape(len(soft), -1, len(POLYNOMIALS))
    count = rows.shape[1]
    metric = np.zeros((len(soft), _STATES), dtype=np.float32)
    from_high: list[np.ndarray] = []
    for step in range(3 * count):
        branch = (
            rows[:, step % count] @ _SIGNS.T
        )  # per register; the previous state is register >> 1
        before = np.repeat(metric, 2, axis=1)
        low = before[:, :_STATES] + branch[:, :_STATES]
        high = before[:, _STATES:] + branch[:, _STATES:]
        from_high.append(high > low)
        metric = np.maximum(low, high)
    detours = np.array([-1, *range(count, 2 * count + CONSTRAINT_LENGTH - 1)])
    state = np.repeat(metric.argmax(1)[:, None], len(detours), 1)
    batch = np.arange(len(soft))[:, None]
    bits: list[np.ndarray] = []
    for step in range(3 * count - 1, count - 1, -1):
        bits.append(state & 1)
        state = (state + _STATES * (from_high[step][batch, state] ^ (detours == step))) >> 1
    return np.stack(bits[: -count - 1 : -1], 2)


def _sign(masked: int) -> int:
    return -1 if masked.bit_count() % 2 else 1


_SIGNS = np.array(
    [[_sign(register & one) for one in POLYNOMIALS] for register in range(2**CONSTRAINT_LENGTH)],
    dtype=np.float32,
)
