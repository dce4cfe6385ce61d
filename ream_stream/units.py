"""Numbers as people write and read them."""

import re
from fractions import Fraction

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "t": 1000**4,
    "tb": 1000**4,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "tib": 1024**4,
}

_LEAST_WITHOUT_UNIT = 1000
"""A smaller number without a unit is no number of bytes: somebody means GB."""


def parse_size(text: str) -> int:
    """Return the bytes of ``1.5GiB``, ``5 GB``, ``700m`` or ``4096``.

    Raises
    ------
    ValueError
        The text is not a number with one of the usual units, or it is nothing.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 16GiB, 1.5GB or 700MB")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise ValueError(f"{text!r} is nothing")
    if not match[2] and size < _LEAST_WITHOUT_UNIT:
        raise ValueError(f"{text!r} is {size} bytes; write a unit, for example {match[1]}GB")
    return size


def parse_size_or_auto(text: str) -> int | None:
    """Return the bytes of a size; None of ``auto``.

    Raises
    ------
    ValueError
        It is neither.
    """
    try:
        return None if text == "auto" else parse_size(text)
    except ValueError as error:
        raise ValueError(f"{error}, or auto") from None


def parse_count_or_all(text: str) -> int:
    """Return a whole number above 0; 0 of ``all``.

    Raises
    ------
    ValueError
        It is neither.
    """
    if text == "all":
        return 0
    if not re.fullmatch(r"[0-9]{1,12}", text) or not int(text):
        raise ValueError(f"{text!r} is neither a number above 0 nor all")
    return int(text)


def parse_bits(text: str) -> float:
    """Return the bits of a number, such as 4 or 4.5: from 1 to 32.

    Raises
    ------
    ValueError
        The text is no such number.
    """
    if not re.fullmatch(r"\d{1,2}(\.\d{1,9})?", text) or not 1 <= float(text) <= 32:
        raise ValueError(f"{text!r} is not a number of bits from 1 to 32")
    return float(text)


def parse_share(text: str) -> Fraction:
    """Return the exact share of ``75%``, ``75`` or ``0.75``: above 0%, up to 100%.

    A number without a percent sign is a share up to 1, and percent above.

    Raises
    ------
    ValueError
        The text is no such share.
    """
    match = re.fullmatch(r"\s*(\d{0,9}(?:\.\d{1,9})?)\s*(%?)\s*", text)
    if match is None or not match[1]:
        raise ValueError(f"{text!r} is not a share; write for example 75%")
    number = Fraction(match[1])
    share = number / 100 if match[2] or number > 1 else number
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is out of range: a share is above 0% and up to 100%")
    return share


def parse_shares(text: str) -> tuple[Fraction, ...]:
    """Return shares with commas between them, as `parse_share` reads each.

    Raises
    ------
    ValueError
        One of them is no share.
    """
    return tuple(parse_share(each) for each in text.split(","))


def parse_weights(text: str) -> tuple[tuple[str, float], ...]:
    """Return names with their weights: ``code=0.7,math=0.3``, by name.

    Raises
    ------
    ValueError
        A word is no name with a number, a name is there twice, or no weight is above 0.
    """
    pairs = [word.strip().rpartition("=") for word in text.split(",")]
    if not all(name and re.fullmatch(r"\d{0,9}(\.\d{1,9})?", told) for name, _, told in pairs):
        raise ValueError(f"{text!r} are not weights; write for example code=0.7,math=0.3")
    weights = {name: float(told or 0) for name, _, told in pairs}
    if len(weights) < len(pairs) or not any(weights.values()):
        raise ValueError(f"{text!r}: each name once, and a weight above 0 are needed")
    return tuple(sorted(weights.items()))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Return numbers with commas between them.

    Raises
    ------
    ValueError
        A word is not a number.
    """
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(
            f"{text!r} is not a list of numbers; write for example 0.3,1"
        ) from None


def format_size(num_bytes: float) -> str:
    """Return bytes with three significant digits and a decimal unit: ``22.5 GB``."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def size_option(num_bytes: int) -> str:
    """Return at least so many bytes as an option takes them, three digits: ``414MB``."""
    exponent = max(0, len(str(num_bytes)) - 3)
    digits = -(-num_bytes // 10**exponent)
    power = -(-exponent // 3) * 3
    unit = {0: "", 3: "kB", 6: "MB", 9: "GB", 12: "TB"}[min(power, 12)]
    number = Fraction(digits * 10**exponent, 10 ** min(power, 12))
    return f"{float(number):g}{unit}"


def format_count(number: int) -> str:
    """Return a number with three significant digits: ``30.5B``, ``3.88M``, ``512``."""
    value, unit = float(number), ""
    for unit in ("", "K", "M", "B", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    digits = 0 if not unit or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def format_seconds(seconds: float) -> str:
    """Return a duration in the units that matter: ``41 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
