"""YAML in which a key stands twice is refused, wherever people write it."""

import pytest

from stormline.models.strict_yaml import load_yaml
from stormline.models.training.recipe import load_recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands twice, first in line 1"),
        ("s:\n  - {x: 1}\n  - y: 1\n    z: 2\n    y: 3\n", "line 5: the key 'y' stands twice, first in line 3"),
        ("{1: a, 0x1: b}", "line 1: the key 1 stands twice"),
        ("a: [1", "expected ',' or ']'"),
        ("a: 2026-13-01", "month must be in"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
    ],
)
def test_yaml_when_it_is_none_or_a_key_stands_twice_then_refused_with_the_line(text, message):
    with pytest.raises(ValueError, match=message):
        load_yaml(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", None),
        ("a: {x: 1}\nb: {x: 2}\n", {"a": {"x": 1}, "b": {"x": 2}}),
        (
            "base: &base {x: 1, y: 2}\na: &a {<<: *base, x: 3}\nb: {<<: *a, y: 4}\n",
            {"base": {"x": 1, "y": 2}, "a": {"x": 3, "y": 2}, "b": {"x": 3, "y": 4}},
        ),
        ("a: &a [1]\nb: *a\n", {"a": [1], "b": [1]}),
    ],
)
def test_yaml_when_keys_differ_then_its_values(text, values):
    assert load_yaml(text) == values


def test_yaml_when_an_alias_stands_within_itself_then_it_is_read():
    values = load_yaml("a: &a {b: *a}")

    assert values["a"]["b"] is values["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nseed: 2\nstages: []\n", "r.yaml is not YAML: line 3: the key 'seed' stands twice"),
        ("name: [a\n", "r.yaml is not YAML: "),
        (b"name: \xff\n", "r.yaml is not YAML: "),
    ],
)
def test_recipe_when_the_file_is_no_yaml_then_the_error_names_it(text, message, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(ValueError, match=message):
        load_recipe(file)
