"""YAML of others: plain data or one line that says what is wrong, in bounded time and memory."""

from __future__ import annotations

import tracemalloc

import pytest

from engine.plain_yaml import load_plain_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
)


def test_plain_data_is_read() -> None:
    text = "sift: {max_features: 7, ratios: [0.5, 1e3]}\nname: caf\u00e9\nnone: ~"
    assert load_plain_yaml(text) == {
        "sift": {"max_features": 7, "ratios": [0.5, "1e3"]},
        "name": "caf\u00e9",
        "none": None,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases are refused"),
        ("x: &x [*x]", "aliases are refused"),
        ("a: &a {b: 1}\nc: {<<: *a}", "aliases are refused"),
        ("[" * 3000, "too deep"),
        ("{" * 3000, "too deep"),
        ("- " * 3000, "too deep"),
        ("when: 2026-99-99", "month must be"),
        ("9" * 5000, "cannot be read"),
        ("!!int ''", "not of the type"),
        ("!!float ''", "not of the type"),
        ("!!bool x", "not of the type"),
        ("!!timestamp x", "not of the type"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("!" + "x" * 100_000 + " 1", "could not determine a constructor"),
        ("a: [1, 2", "line 1: "),
        ("a: b: c", "line 1: "),
        ("? [a]\n: b", "unhashable"),
        ("a: '\0'", "special characters"),
        ("!<tag:x\n> 1", "line 1: "),
        ("---\n---\n", "another document"),
        ("!!binary \u00e9", "base64"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_short_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        load_plain_yaml(text)
    said = str(refused.value)
    assert len(said) < 300
    assert said.isprintable()


def test_a_kilobyte_of_aliases_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="aliases are refused"):
            load_plain_yaml(BOMB)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5e6
