import pytest
from places import REPOSITORY

from mergeline.evaluation.clip.suite import load_suite
from mergeline.merging.errors import UserError
from mergeline.tasks.params import load_params


@pytest.mark.parametrize(
    "file, classes",
    [
        ("samples/suite.yaml", [10, 10, 26, 30, 20, 24, 12, 12]),
        ("examples/clip-8-tasks.suite.yaml", [None, None, None, 10, 10, 43, 10, None]),
        (
            "examples/clip-20-tasks.suite.yaml",
            [None, None, None, 10, 10, 43, 10, None, 102, 2, 7, 37, 10, 100, 10, 101, 10, 26, 10, 2],
        ),
    ],
)
def test_the_suites_that_come_with_mergeline(file, classes):
    tasks = load_suite(REPOSITORY / file).tasks
    assert [t.classnames and len(t.classnames) for t in tasks.values()] == classes


def test_the_templates_of_the_eight_tasks_are_as_many_as_the_field_uses():
    tasks = load_suite(REPOSITORY / "examples/clip-8-tasks.suite.yaml").tasks
    assert {name: len(task.templates) for name, task in tasks.items()} == {
        "SUN397": 2, "Cars": 8, "RESISC45": 18, "EuroSAT": 3, "SVHN": 1, "GTSRB": 3, "MNIST": 1, "DTD": 8,
    }  # fmt: skip


def test_the_twenty_tasks_begin_with_the_eight_and_the_fourteen():
    eight, twenty = (load_suite(REPOSITORY / f"examples/clip-{n}-tasks.suite.yaml").tasks for n in (8, 20))
    assert [*twenty][:8] == [*eight] and all(twenty[name] == task for name, task in eight.items())
    families = [load_params(REPOSITORY / f"examples/clip-vit-b32-{n}-tasks.yaml") for n in (8, 14, 20)]
    for small, large in zip(families, families[1:]):
        for ours, theirs in ((small.sources, large.sources), (small.datasets.uris, large.datasets.uris)):
            assert [*theirs.items()][: len(ours)] == [*ours.items()]
    assert [params.experts for params in families] == [[*twenty][:n] for n in (8, 14, 20)]
    assert all(params.experts == params.tasks for params in families)


@pytest.mark.parametrize(
    "text, line, problem",
    [
        ("tasks:\n  a:\n    templats: ['{}']", 3, "tasks.a.templats: unknown key; did you mean 'templates'?"),
        ("task: {}", 1, "did you mean 'tasks'?"),
        ("tasks: {}", 1, "tasks: must list 1 or more"),
        ("tasks:\n  a: {classnames: [x, y]}", 2, "tasks.a.templates: is required, and missing"),
        ("tasks:\n  a:\n    templates:\n      - a {}\n      - a photo", 5, "holds {} once"),
        ("tasks:\n  a: {templates: ['{0} {}']}", 2, "holds {} once"),
        ("tasks:\n  a: {templates: []}", 2, "tasks.a.templates: must list 1 or more"),
        ("tasks:\n  a:\n    templates: ['{}']\n    classnames: [one, 2]", 4, "must be text"),
        ("tasks:\n  a:\n    templates: ['{}']\n    classnames: [one, one]", 4, "'one' is listed twice"),
        ("tasks:\n  ../a: {templates: ['{}']}", 2, "match pattern"),
        ("- tasks", 1, "the file must hold keys and values"),
        ("", 1, "the file is empty"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, text, line, problem):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_suite(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: ") and problem in message and "\n" not in message


@pytest.mark.parametrize("text", ["tasks: [", "a: 1\na: 2", "\tx"])
def test_a_file_that_is_not_yaml_is_refused(tmp_path, text):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="not valid YAML") as error:
        load_suite(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: No such file"):
        load_suite(tmp_path / "nowhere.yaml")
