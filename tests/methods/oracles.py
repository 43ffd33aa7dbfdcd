"""Formulas that several tests share, written as loops."""


def affine(values, bits):
    """s = (max - min) / (2^k - 1), z = round(-min / s), q = clip(round(w / s) + z); the range holds 0."""
    low, high, top = min(0.0, *values), max(0.0, *values), 2**bits - 1
    step = (high - low) / top or 1.0
    zero = round(-low / step)
    return [step * (min(max(round(v / step) + zero, 0), top) - zero) for v in values]
