"""Tasks: unpacking, checks that say what is wrong with labels, scores against a reference, and the round trip through text."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from sklearn.metrics import r2_score

from edgekd.contracts import Task
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.identity.provenance import code_hash
from edgekd.tasks import Classification, MultiTask, Regression, as_task, has_bounded_scores, task_from, unpack_batch
from edgekd.tree import flatten_outputs

RANDOM = np.random.default_rng(0)
X, Z, Y = np.zeros((6, 3), dtype=np.float32), np.ones((6, 2), dtype=np.float32), np.arange(6)
LOGITS = {"output": RANDOM.standard_normal((6, 4)).astype(np.float32)}


# ------------------------------------------------------------------------------------------ unpacking


@pytest.mark.parametrize(
    ("batch", "names", "expected"),
    [
        ((X, Y), (), {"input": X}),
        ([X, Y], ("pixels",), {"pixels": X}),
        ((X, Z, Y), (), {"input_0": X, "input_1": Z}),
        ((X, Z, Y), ("a", "b"), {"a": X, "b": Z}),
        (({"b": Z, "a": X}, Y), ("a", "b"), {"a": X, "b": Z}),
        ({"b": Z, "a": X, "labels": Y}, ("a", "b"), {"a": X, "b": Z}),
        ({"a": X, "spare": Z, "y": Y}, ("a",), {"a": X}),
    ],
)
def test_batch_is_split_into_named_inputs_and_a_target(batch: Any, names: tuple[str, ...], expected: dict[str, Any]) -> None:
    inputs, target = unpack_batch(batch, names)
    assert list(inputs) == list(expected)
    assert all(inputs[name] is value for name, value in expected.items())
    assert target is Y


@pytest.mark.parametrize(
    ("batch", "names", "remedy"),
    [
        ({"a": X}, (), "Classification(target=...)"),
        ({"a": X, "y": Y}, ("b",), "'b'"),
        ((X, Z, Y), ("a",), "more inputs"),
        (X, (), "(input, ..., target)"),
        ((X,), (), "(input, ..., target)"),
    ],
)
def test_batch_that_cannot_be_split_names_the_remedy(batch: Any, names: tuple[str, ...], remedy: str) -> None:
    with pytest.raises(DataError) as caught:
        unpack_batch(batch, names)
    assert remedy in str(caught.value)


def test_target_is_taken_under_the_name_of_the_task() -> None:
    inputs, target = Classification(target="kind").unpack({"a": X, "kind": Y, "y": Z}, ())
    assert (sorted(inputs), target is Y) == (["a", "y"], True)


def test_multi_task_takes_its_targets_from_a_flat_or_a_nested_batch() -> None:
    task = MultiTask({"kind": Classification(), "size": Regression()})
    for batch in ({"a": X, "kind": Y, "size": Z}, ({"a": X}, {"kind": Y, "size": Z}), {"a": X, "target": {"kind": Y, "size": Z}}):
        inputs, targets = task.unpack(batch, ("a",))
        assert (list(inputs), sorted(targets)) == (["a"], ["kind", "size"])
    with pytest.raises(DataError, match="lacks the target of a task") as caught:
        task.unpack({"a": X, "kind": Y}, ("a",))
    assert caught.value.subject == "size"


# ------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("outputs", "targets", "error", "text"),
    [
        (LOGITS, np.array([0, 1, 2, 3, 4, 0]), DataError, "0 to 3"),
        (LOGITS, np.array([0, 1, -1, 3, 2, 0]), DataError, "-1 to 3"),
        (LOGITS, np.zeros(6), DataError, "must be integers"),
        (LOGITS, np.array(["a"] * 6), DataError, "must be integers"),
        (LOGITS, np.zeros(5, dtype=np.int64), ModelError, "labels (6,)"),
        (LOGITS, np.zeros((6, 1), dtype=np.int64), ModelError, "labels (6,)"),
        ({"output": np.zeros(6, dtype=np.float32)}, np.zeros(6, dtype=np.int64), ModelError, "axis of classes"),
        ({"a": X, "b": X}, np.zeros(6, dtype=np.int64), ModelError, 'Classification(output="...")'),
    ],
)
def test_labels_that_do_not_fit_are_refused(outputs: dict[str, Any], targets: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        Classification().check(outputs, targets)
    assert text in str(caught.value)


MAPS = {"output": RANDOM.standard_normal((6, 4, 2, 2))}
HEADS = {"kind": LOGITS["output"], "size": np.zeros((6, 1))}


@pytest.mark.parametrize(
    ("task", "outputs", "what"),
    [
        (Classification(), LOGITS, "the labels of the test split are outside the classes"),
        (Classification(), MAPS, "the labels of the test split are outside the classes"),
        (MultiTask({"size": Regression(), "kind": Classification()}), HEADS, "the labels of the test split are outside the classes of 'kind'"),
    ],
    ids=["classification", "segmentation", "multi"],
)
def test_labels_outside_the_classes_are_told_with_the_split_and_the_remedy(task: Task, outputs: dict[str, np.ndarray], what: str) -> None:
    def told(labels: np.ndarray) -> DataError:
        wanted = labels if outputs is not MAPS else np.broadcast_to(labels[:, None, None], (6, 2, 2))
        with pytest.raises(DataError) as caught:
            task.check(outputs, {"kind": wanted, "size": np.zeros((6, 1))} if outputs is HEADS else wanted, "test")
        return caught.value

    from_one = told(np.array([1, 2, 3, 4, 1, 2]))
    assert (from_one.what, from_one.found, from_one.allowed, from_one.hint) == (what, "1 to 4", "0 to 3", "they start at 1: subtract 1")
    for labels, found in (([0, 1, 2, 3, 4, 0], "0 to 4"), ([1, 2, 3, 5, 1, 2], "1 to 5"), ([-1, 0, 1, 2, 3, 0], "-1 to 3")):
        other = told(np.array(labels))
        assert (other.what, other.found, other.allowed) == (what, found, "0 to 3")
        assert "label encoding" in str(other.hint)


def test_output_that_the_model_lacks_is_refused_with_near_names() -> None:
    with pytest.raises(ModelError, match=r"logits \(did you mean this\?\)"):
        Classification(output="logit").check({"logits": LOGITS["output"], "features": X}, np.zeros(6, dtype=np.int64))


@pytest.mark.parametrize(("targets", "error"), [(np.zeros((6, 3)), ModelError), (np.array(["a"] * 6), DataError)])
def test_regression_targets_that_do_not_fit_are_refused(targets: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Regression().check({"output": np.zeros((6, 2))}, targets)


def test_equal_regression_targets_have_no_score() -> None:
    with pytest.raises(DataError, match="R²"):
        Regression().scores({"output": np.zeros((6, 1))}, np.ones(6))


@pytest.mark.parametrize("targets", [Y, {"kind": Y % 4}])
def test_multi_task_without_a_target_is_refused(targets: Any) -> None:
    task = MultiTask({"kind": Classification(), "size": Regression()})
    with pytest.raises(DataError, match="size"):
        task.check({"kind": LOGITS["output"], "size": np.zeros((6, 1))}, targets)


def test_multi_task_without_tasks_or_with_a_strange_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one task"):
        MultiTask({})
    with pytest.raises(ConfigError, match="weight"):
        MultiTask({"kind": Classification()}, weights={"knid": 2.0})


# ------------------------------------------------------------------------------------------ scores


def test_classification_scores_are_hits_and_segmentation_scores_are_shares() -> None:
    targets = LOGITS["output"].argmax(axis=1)
    targets[0] = (targets[0] + 1) % 4
    task = Classification()
    task.check(LOGITS, targets)
    assert task.binary
    assert task.scores(LOGITS, targets).tolist() == [0, 1, 1, 1, 1, 1]
    maps = {"output": RANDOM.standard_normal((2, 3, 4, 5))}
    wanted = maps["output"].argmax(axis=1)
    wanted[1, :2] = (wanted[1, :2] + 1) % 3
    task.check(maps, wanted)
    assert not task.binary
    assert task.scores(maps, wanted).tolist() == [1.0, 0.5]
    assert task.classes(wanted) is None


@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_regression_scores_have_r2_as_their_mean(shape: tuple[int, ...]) -> None:
    targets = RANDOM.standard_normal(shape)
    outputs = targets + 0.3 * RANDOM.standard_normal(shape)
    mean = Regression().scores({"output": outputs}, targets).mean()
    assert mean == pytest.approx(r2_score(targets.reshape(-1), outputs.reshape(-1)), abs=1e-12)


def test_regression_scores_of_several_values_are_weighted_by_variance() -> None:
    targets = RANDOM.standard_normal((50, 3)) * [1.0, 2.0, 5.0]
    outputs = targets + 0.3 * RANDOM.standard_normal((50, 3))
    mean = Regression().scores({"output": outputs}, targets).mean()
    assert mean == pytest.approx(r2_score(targets, outputs, multioutput="variance_weighted"), abs=1e-12)


def test_multi_task_scores_are_the_mean_of_its_parts() -> None:
    task = MultiTask({"kind": Classification(), "size": Regression(output="value")})
    outputs: dict[str, Any] = {"kind": LOGITS["output"], "value": RANDOM.standard_normal((6, 1))}
    targets = {"kind": np.array([0, 1, 2, 3, 0, 1]), "size": RANDOM.standard_normal(6)}
    task.check(outputs, targets)
    own = Classification().scores(LOGITS, targets["kind"]), Regression().scores({"value": outputs["value"]}, targets["size"])
    assert np.allclose(task.scores(outputs, targets), (own[0] + own[1]) / 2)
    assert np.allclose(task.agreement(outputs, outputs), 1.0)


class Near(Classification):
    """A part of one's own: its scores, loss and agreement are not a classification's, and it counts how often it was asked."""

    def __init__(self, within: int) -> None:
        super().__init__(output="head.kind")
        self.within = within
        self.asked: list[str] = []

    def check(self, outputs: Any, targets: Any, split: str = "") -> None:
        self.asked.append(split)
        super().check(outputs, targets, split)

    def scores(self, outputs: Any, targets: Any) -> Any:
        return (abs(outputs["head.kind"].argmax(axis=1) - targets) <= self.within).astype(np.float64)

    def agreement(self, outputs: Any, reference: Any) -> Any:
        return np.full(len(outputs["head.kind"]), 0.25)

    def loss(self, outputs: Any, target: Any) -> Any:
        return outputs["head.kind"].sum() * 0 + 7.0

    def distillation(self, outputs: Any, teacher: Any, loss: str, temperature: float) -> Any:
        return (outputs["head.kind"] - teacher["head.kind"]).sum() + 11.0


def test_multi_task_asks_a_part_of_one_s_own_as_it_is() -> None:
    torch = pytest.importorskip("torch")
    near = Near(3)
    task = MultiTask({"kind": near, "sort": Classification()}, weights={"kind": 2.0, "sort": 0.0})
    outputs = {"head.kind": LOGITS["output"], "sort": LOGITS["output"]}
    targets = {"kind": np.zeros(6, dtype=np.int64), "sort": LOGITS["output"].argmax(axis=1)}
    task.check(outputs, targets, "test")
    assert near.asked == ["test"]
    assert task.scores(outputs, targets).tolist() == [1.0] * 6
    assert task.agreement(outputs, outputs).tolist() == [0.625] * 6
    tensors = {name: torch.from_numpy(value) for name, value in outputs.items()}
    goal = {name: torch.from_numpy(value) for name, value in targets.items()}
    assert float(task.loss(tensors, goal)) == 14.0
    assert float(task.distillation(tensors, tensors, "kd", 2.0)) == 22.0
    assert not task.bounded, "the part has scores of its own and states no range"


@pytest.mark.parametrize("part", [Classification, MultiTask({"a": Regression()}), "classification", None])
def test_multi_task_refuses_a_part_that_is_no_task_of_one_output(part: Any) -> None:
    with pytest.raises(ConfigError, match="the part 'kind'"):
        MultiTask({"kind": part})


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    "task",
    [
        Classification(),
        Classification(output="logits", target="kind", labels=["a cat", "a dog"]),
        Regression(output="value", target="size"),
        MultiTask({"kind": Classification(output="head.kind"), "size": Regression()}, weights={"size": 0.1}),
    ],
)
def test_described_task_is_rebuilt(task: Any) -> None:
    again: Any = task_from(task.describe())
    assert type(again) is type(task)
    assert again.describe() == task.describe()


@pytest.mark.parametrize("task", ["clasification", "", None, 3, Classification])
def test_unknown_task_is_refused(task: Any) -> None:
    with pytest.raises(ConfigError, match="classification"):
        as_task(task)


# ------------------------------------------------------------------------------------------ outputs by name


def test_outputs_are_named_by_their_key_path_in_order() -> None:
    assert list(flatten_outputs(X)) == ["output"]
    assert list(flatten_outputs({"b": X, "a": {"c": X, "d": (X, X)}})) == ["b", "a.c", "a.d.0", "a.d.1"]
    assert list(flatten_outputs((X, [X, None], {"k": X}))) == ["output.0", "output.1.0", "output.2.k"]


@pytest.mark.parametrize(
    ("outputs", "text"),
    [({"a.b": X, "a": {"b": X}}, "a.b"), ({"output": {"0": X}, "": (X,)}, "output.0"), ({0: X}, "not text"), ({}, "no tensor"), (None, "no tensor")],
)
def test_outputs_without_a_name_of_their_own_are_refused(outputs: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        flatten_outputs(outputs)


def test_scores_are_bounded_only_where_the_task_states_it() -> None:
    class Own:
        """A task of another package that states nothing."""

    both = MultiTask({"kind": Classification(), "sort": Classification()})
    mixed = MultiTask({"kind": Classification(), "size": Regression()})
    known = [has_bounded_scores(task) for task in (Classification(), Regression(), both, mixed, cast("Task", Own()))]
    assert known == [True, False, True, False, False]


def test_scores_of_a_subclass_are_bounded_only_where_it_states_so_itself() -> None:
    class Inherits(Classification):
        def classes(self, targets: Any) -> None:
            return None

    class Overrides(Classification):
        def scores(self, outputs: Any, targets: Any) -> Any:
            return np.full(len(targets), 3.0)

    class States(Overrides):
        bounded = True

    class Again(States):
        def scores(self, outputs: Any, targets: Any) -> Any:
            return np.full(len(targets), 3.0)

    stated = Overrides()
    stated.bounded = True
    assert [has_bounded_scores(task) for task in (Inherits(), Overrides(), States(), Again(), stated)] == [True, False, True, False, True]


def test_task_that_was_used_has_the_hash_of_a_new_one_and_other_arguments_another() -> None:
    used = Classification()
    used.check({"output": np.zeros((2, 3, 4))}, np.zeros((2, 4), dtype=np.int64))
    assert not used.binary
    assert code_hash(used) == code_hash(Classification()) != code_hash(Classification(labels=["a"]))
