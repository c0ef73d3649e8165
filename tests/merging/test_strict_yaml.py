"""YAML that stands for more than it is, or waits for ever: refused soon, by file and line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoints import refused
from places import REPOSITORY
from soon import soon

from mergeline.evaluation.clip.suite import load_suite
from mergeline.merging.recipes.loading import load_recipe
from mergeline.merging.strict_yaml import YamlFile
from mergeline.tasks.params import load_params

NINE = ",".join("x" * 9)
BOMB = f"a: &a [{NINE}]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
BOMBS = {
    "aliases of aliases": (BOMB, "aliases stand for more than"),
    "many merges": ("a: &a {x: 1}\n" + "".join(f"b{i}: {{<<: *a}}\n" for i in range(900)), "aliases; write it out"),
    "an alias of itself": ("a: &a [*a]", "an alias of itself"),
    "a mapping in itself": ("a: &a {b: *a}", "an alias of itself"),
    "deep brackets": ("a: " + "[" * 3000 + "]" * 3000, "nested deeper than"),
    "brackets that are never closed": ("[" * 20_000, "nested deeper than"),
    "braces that are never closed": ("{" * 20_000, "nested deeper than"),
    "brackets among other things": ("a: " + "[1,{b: " * 40, "nested deeper than"),
    "deep dashes": ("- " * 20_000, "nested deeper than"),
    "deep keys": ("? " * 20_000, "nested deeper than"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(600)), "nested deeper than"),
    "keys that are mappings": ("{{{{a: 1}: 1}: 1}: 1}", "a key is a list or a mapping"),
    "a list as key": ("{[a]: 1}", "a key is a list or a mapping"),
    "many values": ("a: [" + "1," * 30_000 + "1]", "more than 20000 values"),
    "many bytes": ("a: " + "x" * (1 << 21), "bytes; is it the right file"),
    "many digits": ("seed: " + "1" * 5000, "4300 digits"),
    "a NUL": ("a: \0", "not valid YAML"),
    "bytes that are no text": (b"a: \xff", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_soon(kind, tmp_path):
    content, part = BOMBS[kind]
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with soon(), refused(str(path), part):
        YamlFile(path)


def test_parameters_and_recipes_are_read_so(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(BOMB)
    for read in (load_params, load_suite, lambda path: load_recipe(path, Path)):
        with soon(), refused(str(path), "aliases stand for more than"):
            read(path)


def test_anchors_that_people_write_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("usual: &usual {rank: 0.1}\none: {<<: *usual, scale: 2}\ntwo: [*usual, *usual]\n")
    usual = {"rank": 0.1}
    assert YamlFile(path).data == {"usual": usual, "one": {"scale": 2, **usual}, "two": [usual, usual]}


@pytest.mark.parametrize(
    ("text", "loc", "line"),
    [
        ("usual: &u\n  rank: 1\nown:\n  <<: *u\n  scale: 2\n", ["own", "rank"], 3),
        ("usual: &u\n  rank: 1\nown:\n  <<: *u\n  scale: 2\n", ["own", "scale"], 5),
        ("usual: &u\n  rank: 1\nown: *u\n", ["own", "rank", "more"], 2),
        ("x: 1\na: !tag [1, 2]\n", ["a", 1], 2),
        ("x: 1\na: !!omap [b: 1]\n", ["a", "b"], 2),
        ("x: 1\na: !!set {b, c}\n", ["a", "b"], 2),
        ("x: 1\na: [1,\n 2]\n", ["a", 1], 3),
        ("x: 1\na: [1,\n 2]\n", ["a", 2], 2),
        ("x: 1\na: [1,\n 2]\n", ["a", "b"], 2),
        ("", ["a"], 1),
    ],
)  # fmt: skip
def test_a_mistake_is_blamed_on_the_deepest_line_that_is_known(text, loc, line, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    assert str(YamlFile(tmp_path / "x.yaml").error(loc, "wrong")) == f"{tmp_path / 'x.yaml'}:{line}: wrong"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "a link to itself"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "x.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    with soon(), refused(str(path)):
        YamlFile(path)


def test_the_longest_file_of_the_repository_is_far_from_the_limits():
    for path in REPOSITORY.glob("examples/*.yaml"):
        assert 10 * path.stat().st_size < 1 << 20
