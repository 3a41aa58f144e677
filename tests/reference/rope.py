"""Rotary positions from the formulas, one pair at a time.

RoFormer (arXiv 2104.09864, eq. 15 and 34), position interpolation (2306.15595), YaRN (2309.00071, section 3),
Llama 3.1's scaling (2407.21783, as its released code has it), dynamic NTK scaling. Frequencies are Python floats.
"""

import math

import torch


def default_frequencies(width: int, theta: float) -> list[float]:
    """theta_i = theta^(-2 i / width) for each pair i."""
    return [theta ** (-2 * i / width) for i in range(width // 2)]


def linear_frequencies(width: int, theta: float, factor: float) -> list[float]:
    """Positions squeezed by `factor`."""
    return [frequency / factor for frequency in default_frequencies(width, theta)]


def dynamic_frequencies(width: int, theta: float, factor: float, trained: int, length: int) -> list[float]:
    """A larger theta once `length` exceeds the `trained` one."""
    growth = factor * max(length, trained) / trained - (factor - 1)
    return default_frequencies(width, theta * growth ** (width / (width - 2)))


def llama3_frequencies(
    width: int, theta: float, factor: float, low_factor: float, high_factor: float, trained: int
) -> list[float]:
    """Waves longer than trained / low_factor are squeezed, those shorter than trained / high_factor kept."""
    result = []
    for frequency in default_frequencies(width, theta):
        turns = trained * frequency / (2 * math.pi)
        if turns < low_factor:
            result.append(frequency / factor)
        elif turns > high_factor:
            result.append(frequency)
        else:
            smooth = (turns - low_factor) / (high_factor - low_factor)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return result


def yarn_frequencies(
    width: int, theta: float, factor: float, trained: int, beta_fast: float = 32, beta_slow: float = 1
) -> list[float]:
    """Pairs that turn more than beta_fast times are kept, less than beta_slow squeezed, a ramp between."""

    def pair_that_turns(times: float) -> float:
        return width * math.log(trained / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), width - 1)
    result = []
    for i, frequency in enumerate(default_frequencies(width, theta)):
        ramp = min(max((i - low) / max(high - low, 0.001), 0), 1)
        result.append(frequency / factor * ramp + frequency * (1 - ramp))
    return result


def yarn_magnitude(factor: float, mscale: float) -> float:
    """m = 0.1 mscale ln(factor) + 1 (2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def frequencies_of(rope: dict, width: int, trained: int, length: int) -> tuple[list[float], float]:
    """Frequencies for a config's `rope_parameters`, and the factor on cos and sin.

    Args:
        trained: the config's max_position_embeddings, where the dictionary has no original one.
        length: tokens of the sequence, which dynamic scaling asks for.
    """
    kind, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor", 1.0)
    if kind == "default":
        return default_frequencies(width, theta), 1.0
    if kind == "linear":
        return linear_frequencies(width, theta, factor), 1.0
    if kind == "dynamic":
        return dynamic_frequencies(width, theta, factor, trained, length), 1.0
    trained = rope.get("original_max_position_embeddings") or trained
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return llama3_frequencies(width, theta, factor, low, high, trained), 1.0
    betas = {key: rope[key] for key in ("beta_fast", "beta_slow") if rope.get(key)}
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    on_cos_sin = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim) if mscale and all_dim else None
    return yarn_frequencies(width, theta, factor, trained, **betas), on_cos_sin or yarn_magnitude(factor, 1.0)


def rotate(
    x: torch.Tensor, position: int, frequencies: list[float], interleaved: bool, factor: float = 1.0
) -> torch.Tensor:
    """Turn each pair i of a vector [W] by position * frequencies[i], every number staying at its place.

    Args:
        interleaved: pair i is (2 i, 2 i + 1); else (i, i + W / 2).
        factor: on the result.
    """
    half = len(frequencies)
    result: list[torch.Tensor] = [x.new_zeros(())] * (2 * half)
    for i, frequency in enumerate(frequencies):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        cos, sin = factor * math.cos(position * frequency), factor * math.sin(position * frequency)
        result[first] = cos * x[first] - sin * x[second]
        result[second] = sin * x[first] + cos * x[second]
    return torch.stack(result)
