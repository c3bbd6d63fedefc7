from __future__ import annotations

import random

from engine.output.flat_names import FlatNames


def test_folders_spaces_dots_and_letters_that_readers_break_at_are_gone() -> None:
    names = FlatNames()
    assert names.of("sub/dir/IMG_1.JPG") == "sub-dir-IMG_1.jpg"
    assert names.of("a b.c.jpeg") == "a_b_c.jpg"
    assert names.of("Kühe/Zürich.PNG") == "Kuhe-Zurich.png"
    assert names.of("写真/日本.jpg") == "image.jpg"
    assert names.of("写真/京都.jpg") == "image-2.jpg"
    assert names.of("000012.jpg") == "000012.jpg"


def test_no_two_images_share_a_stem_whatever_the_case_and_a_name_stays() -> None:
    given = [
        f"{folder}IMG.{suffix}" for folder in ("", "a/", "A/", "a-") for suffix in ("jpg", "png")
    ]
    given += ["a/img.jpg", "x" * 300 + ".jpg", "y" + "x" * 299 + ".jpg", "..jpg", "-.jpg", "_.png"]
    random.Random(0).shuffle(given)
    names = FlatNames()
    flat = [names.of(name) for name in given]
    stems = [name.rpartition(".")[0].casefold() for name in flat]
    assert len(set(stems)) == len(given)
    assert all(name.isascii() and name.count(".") == 1 and " " not in name for name in flat)
    assert max(map(len, flat)) < 120
    again = FlatNames(names.given)
    assert [again.of(name) for name in reversed(given)] == flat[::-1]


def test_names_of_files_that_are_there_are_not_given() -> None:
    assert FlatNames(taken=["a-B"]).of("a/b.jpg") == "a-b-2.jpg"
    names = FlatNames()
    assert names.of("a.jpg", key="1") == "a.jpg"
    assert names.of("a.jpg", key="2") == "a-2.jpg"
