"""Calibration data: every source, everything that may not fit, and the split."""

from __future__ import annotations

import io
import pickle
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from lindep_onnx.data import sources
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import Samples, open_samples
from lindep_onnx.data.sources import load_function
from lindep_onnx.data.split import Part
from lindep_onnx.data.spool import Spool
from lindep_onnx.errors import CalibrationError, UsageError
from lindep_onnx.options import DataOptions

X = InputSpec("x", np.dtype(np.float32), ("N", 3))


def spec(name: str, *shape: int | str, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def opened(source: Any, *inputs: InputSpec, **options: Any) -> Samples:
    return open_samples(source, inputs or (X,), DataOptions(**{"batch_size": 4, **options}))


def rows(count: int, *rest: int, first: int = 0) -> np.ndarray:
    """Rows that tell where they were: row i begins with i."""
    result = np.random.default_rng(count).normal(size=(count, *(rest or (3,)))).astype(np.float32)
    result.reshape(count, int(np.prod(result.shape[1:])))[:, 0] = np.arange(first, first + count)
    return result


def fed(samples: Samples, name: str = "x", *parts: Part) -> np.ndarray:
    """Everything that is fed and counts, in the order of the samples."""
    with samples:
        batches = list(samples.batches(*parts))
    numbers = np.concatenate([batch.samples for batch in batches])
    values = np.concatenate([batch.feeds[name][: len(batch.samples)] for batch in batches])
    assert (np.diff(numbers) > 0).all()
    return values


def refused(match: str, source: Any, *inputs: InputSpec, **options: Any) -> str:
    """The message that a source is refused with, on opening or on reading."""
    with pytest.raises(CalibrationError, match=match) as caught, opened(source, *inputs, **options) as samples:
        list(samples.batches())
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def npz_of(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy_bytes(shape: tuple[int, ...], content: bytes = b"", descr: str = "<f4") -> bytes:
    """An `.npy` file whose header says what it likes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


class ConsumerNode:
    """What ONNX Runtime calls a calibration data reader."""

    def __init__(self, items: list[dict[str, np.ndarray]]) -> None:
        self._items = iter(items)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._items, None)


# ------------------------------------------------------------------------------------------------------------- sources


def _onnx_sets(folder: Path, values: np.ndarray, *, name: str = "x") -> Path:
    for number, value in enumerate(values):
        target = folder / f"test_data_set_{number:02}"
        target.mkdir(parents=True)
        tensor = onnx.numpy_helper.from_array(value[None], name)
        (target / "input_0.pb").write_bytes(tensor.SerializeToString())
        (target / "output_0.pb").write_bytes(b"not looked at")
    return folder


def _shard_folder(folder: Path, values: np.ndarray) -> Path:
    folder.mkdir()
    np.savez(folder / "a.npz", x=values[:5])
    np.save(folder / "b.npy", values[5:7])
    np.savez_compressed(folder / "c.npz", x=values[7:])
    (folder / "labels.txt").write_text("not data")
    return folder


def _stored(folder: Path, values: np.ndarray) -> Path:
    return saved(folder / "data.npz", x=values)


def _compressed(folder: Path, values: np.ndarray) -> Path:
    np.savez_compressed(folder / "data.npz", x=values)
    return folder / "data.npz"


def _unnamed(folder: Path, values: np.ndarray) -> Path:
    np.savez(folder / "data.npz", values)
    return folder / "data.npz"


def _npy(folder: Path, values: np.ndarray) -> str:
    np.save(folder / "data.npy", values)
    return str(folder / "data.npy")


def _column_major(folder: Path, values: np.ndarray) -> Path:
    np.save(folder / "data.npy", np.asfortranarray(values))
    return folder / "data.npy"


def _function(folder: Path, values: np.ndarray) -> str:
    np.save(folder / "values.npy", values)
    code = f"import numpy as np\ndef feeds():\n    for row in np.load({str(folder / 'values.npy')!r}):\n        yield {{'x': row[None]}}\n"
    (folder / "source.py").write_text(code)
    return f"{folder / 'source.py'}:feeds"


SOURCES: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "stored npz": _stored,
    "compressed npz": _compressed,
    "npz without names": _unnamed,
    "npy": _npy,
    "npy in column order": _column_major,
    "folder of shards": lambda folder, values: _shard_folder(folder / "shards", values),
    "ONNX test sets": lambda folder, values: _onnx_sets(folder / "sets", values),
    "ONNX test sets with other names": lambda folder, values: _onnx_sets(folder / "sets", values, name="input.1"),
    "FILE.py:FUNC": _function,
    "dict": lambda folder, values: {"x": values},
    "dict of lists": lambda folder, values: {"x": values.tolist()},
    "list of dicts": lambda folder, values: [{"x": values[:4]}, {"x": values[4:]}],
    "generator": lambda folder, values: ({"x": row[None]} for row in values),
    "get_next": lambda folder, values: ConsumerNode([{"x": row[None]} for row in values]),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_yields_the_same_samples_in_every_pass(source: Callable, tmp_path: Path) -> None:
    values = rows(13)
    samples = opened(source(tmp_path, values))
    with samples:
        first, again = ([batch.feeds["x"].copy() for batch in samples.batches()] for _ in range(2))
        assert len(samples) == 13
    np.testing.assert_allclose(np.concatenate(first), values, rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert all(len(batch) <= 4 and batch.dtype == np.float32 for batch in first)


def test_one_onnx_test_set_may_be_named_itself(tmp_path: Path) -> None:
    folder = _onnx_sets(tmp_path, rows(2)) / "test_data_set_01"
    np.testing.assert_array_equal(fed(opened(folder)), rows(2)[1:])


def test_an_infinite_generator_is_read_as_far_as_max_samples() -> None:
    taken = []

    def endless() -> Iterator[dict[str, np.ndarray]]:
        number = 0
        while True:
            taken.append(number)
            yield {"x": rows(2, first=number)}
            number += 2

    found = fed(opened(endless(), max_samples=7))
    assert len(found) == 7 and len(taken) == 4
    assert len(np.unique(found[:, 0])) == 7


def test_a_shared_array_beside_a_generator_does_not_use_up_max_samples() -> None:
    inputs = (X, spec("anchors", 50, 2))
    items = ({"x": rows(1, first=number), "anchors": rows(50, 2)} for number in range(20))
    assert len(fed(opened(items, *inputs, max_samples=10))) == 10


def test_max_samples_of_an_array_are_spread_over_it_and_over_the_parts() -> None:
    samples = opened({"x": rows(4000)}, max_samples=400)
    assert len(samples) == 400
    assert fed(samples).max() > 3500
    assert [len(samples.parts[part]) for part in Part] == pytest.approx([280, 60, 60], abs=30)


def test_only_the_seed_changes_which_samples_are_used() -> None:
    found = [fed(opened({"x": rows(200)}, max_samples=20, seed=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


# ----------------------------------------------------------------------------------------------------- batches and axes


def test_the_last_batch_of_a_fixed_size_is_filled_by_repetition_that_does_not_count() -> None:
    with opened({"x": rows(10)}, spec("x", 4, 3)) as samples:
        batches = list(samples.batches())
    assert [batch.size for batch in batches] == [4, 4, 4]
    assert all(len(batch.feeds["x"]) == 4 for batch in batches)
    assert [len(batch.samples) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(batches[2].feeds["x"], rows(10)[[8, 9, 9, 9]])


def test_a_free_batch_has_no_filler() -> None:
    with opened({"x": rows(10)}) as samples:
        assert [(batch.size, len(batch.samples)) for batch in samples.batches()] == [(4, 4), (4, 4), (2, 2)]
        assert [len(batch.samples) for batch in samples.batches(limit=5)] == [4, 1]


def test_exactly_one_fixed_batch_of_samples_is_samples() -> None:
    with opened({"x": rows(4)}, spec("x", 4, 3)) as samples:
        assert len(samples) == 4


@pytest.mark.parametrize("count", [2, 10, 11])
@pytest.mark.parametrize("generated", [False, True])
def test_arrays_without_a_sample_axis_are_fed_whole_with_every_run(count: int, generated: bool) -> None:
    inputs = (spec("anchors", 10, 2), X, spec("scale"))
    shared = {"anchors": rows(10, 2), "scale": np.float32(0.5)}
    whole = {"x": rows(count), **shared}
    items = ({"x": rows(count)[number, None], **shared} for number in range(count))
    with opened(items if generated else whole, *inputs) as samples:
        batches = list(samples.batches())
    assert sum(len(batch.samples) for batch in batches) == count
    assert len(batches) == -(-count // 4)
    for batch in batches:
        np.testing.assert_array_equal(batch.feeds["anchors"], rows(10, 2))
        assert batch.feeds["scale"].shape == () and batch.feeds["scale"] == np.float32(0.5)
    np.testing.assert_array_equal(np.concatenate([batch.feeds["x"] for batch in batches]), rows(count))


def test_a_state_of_one_row_is_shared_where_there_are_more_samples() -> None:
    inputs = (spec("x", 1, 3), spec("state", 1, 2))
    with opened({"x": rows(5), "state": rows(1, 2)}, *inputs) as samples:
        assert all(batch.feeds["state"].shape == (1, 2) for batch in samples.batches()) and len(samples) == 5
    found = fed(opened(({"x": rows(5)[n, None], "state": rows(5, 2)[n, None]} for n in range(5)), *inputs), "state")
    np.testing.assert_array_equal(found, rows(5, 2))  # one for each sample: not shared


def test_shards_of_different_length_agree_on_what_is_shared(tmp_path: Path) -> None:
    inputs = (spec("x", 2, 3), spec("state", 2, 2))
    for number, count in enumerate((6, 2)):  # the second alone could be two samples of both
        saved(tmp_path / f"{number}.npz", x=rows(count, first=10 * number), state=rows(2, 2))
    with opened(tmp_path, *inputs) as samples:
        assert len(samples) == 8
        assert all((batch.feeds["state"] == rows(2, 2)).all() for batch in samples.batches())


def test_a_shared_array_that_changes_goes_with_its_own_samples() -> None:
    items = [{"x": rows(2, first=10 * number), "scale": np.float32(number)} for number in (0, 0, 1, 2)]
    with opened(items, X, spec("scale")) as samples:
        batches = list(samples.batches())
    assert [batch.size for batch in batches] == [4, 2, 2]
    assert all((batch.feeds["x"][:, 0] // 10 == batch.feeds["scale"]).all() for batch in batches)


def test_two_fixed_leading_sizes_are_refused() -> None:
    inputs = (spec("x", 2, 3), spec("y", 3, 3))
    assert "free batch axis" in refused(r"\[2, 3\]", {"x": rows(6), "y": rows(6)}, *inputs)


def test_an_input_of_unknown_rank_takes_arrays_with_a_sample_axis() -> None:
    unknown = InputSpec("x", np.dtype(np.float32), None)
    np.testing.assert_array_equal(fed(opened({"x": rows(5, 2, 2)}, unknown)), rows(5, 2, 2))
    refused("wants arrays of shape", {"x": np.float32(1)}, unknown)


# ---------------------------------------------------------------------------------------------------- types and content


@pytest.mark.parametrize(
    ("stored", "declared"),
    [
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float16),
        (np.float32, ml_dtypes.bfloat16),
        (np.int32, np.int64),
        (np.uint8, np.int32),
    ],
)
def test_another_precision_is_cast_with_one_note(stored: Any, declared: Any) -> None:
    values = np.arange(12, dtype=stored).reshape(4, 3)
    samples = opened([{"x": values[:2]}, {"x": values[2:]}], spec("x", "N", 3, dtype=declared))
    assert samples.notes == (f"Input 'x': {np.dtype(stored)} data is cast to {np.dtype(declared)}.",)
    found = fed(samples)
    assert found.dtype == declared
    np.testing.assert_array_equal(found.astype(np.float64), values)


def test_the_declared_type_gives_no_note() -> None:
    with opened({"x": rows(4)}) as samples:
        assert samples.notes == ()


@pytest.mark.parametrize(
    ("stored", "declared"),
    [
        (np.int64, np.float32),
        (np.uint8, np.float32),
        (np.bool_, np.float32),
        (np.float32, np.int64),
        (np.complex64, np.float32),
        (np.bool_, np.int64),
        (np.int64, np.bool_),
        (np.str_, np.float32),
        (np.float32, np.str_),
    ],
)
def test_another_kind_of_value_is_refused(stored: Any, declared: Any) -> None:
    message = refused("convert it", {"x": np.ones((4, 3)).astype(stored)}, spec("x", "N", 3, dtype=declared))
    assert "'x' wants" in message
    assert ("normalise images" in message) == (stored == np.uint8)


@pytest.mark.parametrize("value", [300, -1])
def test_an_integer_that_does_not_fit_is_refused(value: int) -> None:
    values = np.full((4, 3), value)
    refused("'x' holds integers that do not fit uint8", {"x": values}, spec("x", "N", 3, dtype=np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_refused_by_input_and_sample(value: float, dtype: Any) -> None:
    values = rows(9).astype(dtype)
    values[6, 1] = value
    message = refused(
        r"input 'x' holds NaN or infinite values \(sample 6\)", {"x": values}, spec("x", "N", 3, dtype=dtype)
    )
    assert "remove or repair" in message


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_minus_infinity_may_be_fed_where_it_is_stored(dtype: Any) -> None:
    values = rows(9).astype(dtype)
    values[6, 1] = -np.inf
    assert np.isneginf(fed(opened({"x": values}))[6, 1])
    values[6, 1] = -3e38  # too large for half precision
    refused("too large for float16", {"x": values}, spec("x", "N", 3, dtype=np.float16))


def test_nan_in_a_fixed_batch_with_filler_is_reported_as_the_sample_it_is() -> None:
    values = rows(5)
    values[4, 2] = np.nan
    refused(r"sample 4\)", {"x": values}, spec("x", 4, 3))


def test_nan_in_a_shared_array_is_no_fault_of_a_sample() -> None:
    message = refused("'scale' holds NaN", {"x": rows(5), "scale": np.float32(np.nan)}, X, spec("scale"))
    assert "sample" not in message


def test_a_value_that_becomes_infinite_when_it_is_cast_is_refused(recwarn: pytest.WarningsRecorder) -> None:
    values = rows(5).astype(np.float64)
    values[3, 1] = 1e39
    refused(r"'x' holds values too large for float32 \(sample 3\)", {"x": values})
    assert not recwarn.list


def test_strings_are_fed_as_objects_and_their_copies_are_found() -> None:
    text = spec("x", "N", 2, dtype=object)
    values = np.array([["a", "b"], ["c", "ddd"], ["".join(["a"]), "b"], ["e", "f"]], dtype=object)
    with opened({"x": values}, text) as samples:
        assert "1 of 4" in samples.notes[0]
        batch = next(samples.batches())
    assert batch.feeds["x"].dtype == object and batch.feeds["x"].tolist() == values.tolist()


# -------------------------------------------------------------------------------------------------------- does not fit


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({"y": rows(4)}, "no array for the model input 'x'.*the arrays 'y'"),
        ({"x": rows(4), "y": rows(4)}, "no input 'y'.*Leave it out"),
        ({}, "no array for the model input 'x'"),
        ({"x": rows(4, 5)}, r"shape \[samples, 3\], this one is \[4, 5\]"),
        ({"x": rows(4, 3, 1)}, r"this one is \[4, 3, 1\]"),
        ({"x": np.float32(1)}, r"this one is \[\]"),
        ({"x": rows(0)}, "no samples; give at least 3"),
        ({"x": [[1.0, 2.0, 3.0], [1.0]]}, "'x' is no array of equally long rows"),
        ({"x": np.array([[object()] * 3] * 4)}, "'x' holds Python objects"),
        ([], "yields nothing"),
        (iter(()), "yields nothing"),
        (ConsumerNode([]), "yields nothing"),
        ([(rows(4), 1)], "item 0 is a tuple, not a dict of arrays by input name; make it yield {'x': array}"),
        ([{"x": rows(2)}, {"x": rows(2, 4)}], r"item 1: input 'x' wants arrays of shape \[samples, 3\]"),
        ([{"x": rows(2)}, {"y": rows(2)}], "item 1: no array for the model input 'x'"),
        (17, "expected dicts of arrays by input name, found int"),
        (None, "no calibration data"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_wanted_and_found(source: Any, match: str) -> None:
    refused(match, source)


def test_different_numbers_of_samples_are_refused_even_where_the_totals_agree() -> None:
    inputs = (X, spec("y", "N", 2))
    refused(r"different numbers of samples.*x: 4, y: 3", {"x": rows(4), "y": rows(3, 2)}, *inputs)
    items = [{"x": rows(4), "y": rows(3, 2)}, {"x": rows(3), "y": rows(4, 2)}]
    refused(r"item 0: .*x: 4, y: 3", items, *inputs)


def test_an_empty_shard_beside_others_is_no_fault() -> None:
    np.testing.assert_array_equal(fed(opened([{"x": rows(0)}, {"x": rows(4)}])), rows(4))


@pytest.mark.parametrize("where", ["items", "function"])
def test_an_exception_in_the_users_generator_is_told_with_its_place(where: str, tmp_path: Path) -> None:
    body = "    yield {'x': [[1., 2., 3.]]}\n" if where == "items" else ""
    (tmp_path / "bad.py").write_text(f"def feeds():\n{body}    raise RuntimeError('disk on fire')\n")
    count = 1 if where == "items" else 0
    refused(f"failed after {count} item.*disk on fire", f"{tmp_path / 'bad.py'}:feeds")


@pytest.mark.parametrize(
    "text", ["missing.py:feeds", "source.py:missing", "source.py:", "source.py:VALUE", "broken.py:feeds"]
)
def test_a_function_that_is_not_there_is_a_mistake_in_the_command(text: str, tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text("VALUE = 1\ndef feeds():\n    return {}\n")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(UsageError, match="--calib"):
        opened(str(tmp_path / text))
    assert load_function(f"{tmp_path / 'source.py'}:feeds", "--eval")() == {}


def test_a_users_file_may_define_dataclasses(tmp_path: Path) -> None:
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    b: int\ndef make(): return A(3).b\n"
    (tmp_path / "source.py").write_text(code)
    assert load_function(f"{tmp_path / 'source.py'}:make", "--eval")() == 3


@pytest.mark.parametrize("name", ["missing.npz", "missing", "data.csv", "empty"])
def test_a_path_that_is_no_data_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2,3\n")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / name) in refused("no such|is .npz|holds neither", str(tmp_path / name))


# -------------------------------------------------------------------------------------------------------- damaged files


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._path), "w")


def _pickled_npy(path: Path, trap: Path) -> Path:
    np.save(path, np.array([Bomb(trap)], dtype=object), allow_pickle=True)
    return path


def _pickled_npz(path: Path, trap: Path) -> Path:
    return saved(path, x=rows(4), y=np.array([Bomb(trap)], dtype=object))


def _plain_pickle(path: Path, trap: Path) -> Path:
    path.write_bytes(pickle.dumps(Bomb(trap)))
    return path


@pytest.mark.parametrize(
    ("make", "name"),
    [(_pickled_npy, "data.npy"), (_pickled_npz, "data.npz"), (_plain_pickle, "data.npy"), (_plain_pickle, "data.npz")],
)
def test_nothing_is_ever_unpickled(make: Callable[[Path, Path], Path], name: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = make(tmp_path / name, trap)
    refused("pickled Python objects|not a readable", path)
    assert not trap.exists()
    if make is not _plain_pickle:  # the trap works
        loaded = np.load(path, allow_pickle=True)
        list(loaded.values() if name.endswith("npz") else loaded)
        assert trap.exists()


def _cuts(content: bytes) -> list[int]:
    return [0, 1, 6, 40, len(content) // 3, len(content) // 2, len(content) - 100, len(content) - 23, len(content) - 1]


@pytest.mark.parametrize("make", [_stored, _compressed, _npy], ids=["stored", "compressed", "npy"])
def test_a_file_that_was_cut_short_is_refused(make: Callable, tmp_path: Path) -> None:
    path = Path(make(tmp_path, rows(50)))
    content = path.read_bytes()
    for cut in _cuts(content):
        path.write_bytes(content[:cut])
        assert str(path) in refused("not a readable", path)
    path.write_bytes(content)
    assert len(fed(opened(path))) == 50


@pytest.mark.parametrize("make", [_stored, _compressed, _npy], ids=["stored", "compressed", "npy"])
def test_changed_bytes_never_escape_as_another_error(make: Callable, tmp_path: Path) -> None:
    path = Path(make(tmp_path, rows(20)))
    content = path.read_bytes()
    rng = np.random.default_rng(3)
    caught = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            fed(opened(path))
        except CalibrationError:
            caught += 1
    assert caught > 50  # and whatever was read was read without an error


def test_damaged_data_in_an_intact_archive_is_refused(tmp_path: Path) -> None:
    path = _compressed(tmp_path, np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    refused("'x' is damaged", path)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((10**6, 3), "cut short: 12,000,000 bytes"),
        ((2**40, 2**40), "cut short"),
        ((-4, 3), "impossible"),
        ((0, 2**70), "impossible"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_a_header_that_lies_about_its_shape_is_refused_before_anything_is_allocated(
    shape: tuple[int, ...], match: str, suffix: str, tmp_path: Path
) -> None:
    content = npy_bytes(shape, b"\0" * 48)
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content) if suffix == ".npy" else npz_of(path, {"x.npy": content})
    refused(match, path)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"readme.txt": b"hello"},
        {"x.npy": b""},
        {"x.npy": b"\x93NUMPY\x09\x00"},
        {"x.npy": b"\x93NUMPY\x01\x00\xff\xff"},
        {"x.npy": b"\x93NUMPY\x01\x00\x10\x00((((((((((((((((\n"},
        {"x.npy": npy_bytes((4, 3), descr="<f4")[:60]},
    ],
)
def test_an_archive_without_a_readable_array_is_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    refused("not a readable .npz file", npz_of(tmp_path / "data.npz", members))


def test_a_locked_archive_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "data.npz", x=rows(4))
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    refused("encrypted", path)


def test_an_archive_that_unpacks_beyond_the_free_space_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 100})
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: free)
    refused("unpacks to 728 bytes, but only 100 are free", _compressed(tmp_path, rows(50)))


@pytest.mark.parametrize("content", [b"junk", b"\xff" * 50, b""])
def test_a_damaged_onnx_tensor_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    folder = _onnx_sets(tmp_path, rows(2))
    (folder / "test_data_set_01" / "input_0.pb").write_bytes(content)
    assert "test_data_set_01" in refused("readable ONNX tensor|no array for|wants", folder)


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "write", full)
    refused("No space left on device.*--max-samples", [{"x": rows(4)}])


@pytest.mark.parametrize("source", [[{"x": rows(4)}, {"y": rows(4)}], [{"x": rows(8)}]])
def test_no_temporary_file_is_left(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        with opened(source) as samples:
            assert list(tmp_path.iterdir())
            list(samples.batches())
    except CalibrationError:
        assert len(source) == 2
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ the split


def parts_of(samples: Samples) -> dict[Part, set[int]]:
    with samples:
        return {part: set(numbers.tolist()) for part, numbers in samples.parts.items()}


@pytest.mark.parametrize("count", [3, 4, 10, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_every_part_gets_a_sample_and_every_sample_one_part(count: int, seed: int) -> None:
    parts = parts_of(opened({"x": rows(count)}, seed=seed))
    assert all(parts.values())
    assert sum(map(len, parts.values())) == count
    assert set.union(*parts.values()) == set(range(count))


@pytest.mark.parametrize(("holdout", "shares"), [(0.3, (0.7, 0.15, 0.15)), (0.8, (0.2, 0.4, 0.4))])
def test_the_shares_of_the_parts_follow_holdout(holdout: float, shares: tuple[float, ...]) -> None:
    parts = parts_of(opened({"x": rows(4000)}, holdout=holdout))
    found = [len(parts[part]) / 4000 for part in (Part.FIT, Part.SELECT, Part.VERIFY)]
    np.testing.assert_allclose(found, shares, atol=0.03)


@pytest.mark.parametrize("holdout", [0.001, 0.999])
def test_an_extreme_holdout_still_leaves_a_sample_in_each_part(holdout: float) -> None:
    assert all(parts_of(opened({"x": rows(10)}, holdout=holdout)).values())


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    first, again, other = (parts_of(opened({"x": rows(100)}, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    one_by_one = ({"x": row[None]} for row in rows(100))
    assert parts_of(opened(one_by_one, batch_size=1)) == first


def test_more_samples_leave_the_part_of_the_others_as_it_was() -> None:
    few, many = (parts_of(opened({"x": rows(count)})) for count in (100, 150))
    assert all(few[part] == {number for number in many[part] if number < 100} for part in Part)


@pytest.mark.parametrize("spread", [False, True])
def test_identical_samples_share_a_part_across_shards_too(spread: bool) -> None:
    values = np.tile(rows(30), (3, 1))
    source = [{"x": values[:50]}, {"x": values[50:]}] if spread else {"x": values}
    samples = opened(source)
    assert "60 of 90 calibration samples are copies" in samples.notes[0]
    parts = parts_of(samples)
    assert all(
        {number % 30 + 30 * turn for number in members for turn in range(3)} == members for members in parts.values()
    )
    assert sum(map(len, parts.values())) == 90


def test_samples_that_differ_in_one_input_only_are_no_copies() -> None:
    same, other = np.ones((6, 3), np.float32), rows(6, 2)
    with opened({"x": same, "y": other}, X, spec("y", "N", 2)) as samples:
        assert samples.notes == () and all(len(part) for part in samples.parts.values())
    items = [{"x": same[:1], "scale": np.float32(number)} for number in range(6)]
    with opened(items, X, spec("scale")) as samples:
        assert samples.notes == ()


@pytest.mark.parametrize(("count", "copies"), [(1, 1), (2, 1), (2, 5)])
def test_fewer_than_three_different_samples_fit_nothing_and_say_so(count: int, copies: int) -> None:
    samples = opened({"x": np.tile(rows(count), (copies, 1))})
    assert f"{count} different calibration sample(s) prove nothing" in samples.notes[-1]
    parts = parts_of(samples)
    assert not parts[Part.FIT] and not parts[Part.SELECT] and len(parts[Part.VERIFY]) == count * copies


def test_parts_can_be_read_alone_and_together_are_everything() -> None:
    values = rows(40)
    alone = [fed(opened({"x": values}), "x", part) for part in Part]
    assert all(0 < len(part) < 40 for part in alone)
    np.testing.assert_array_equal(np.sort(np.concatenate(alone)[:, 0]), values[:, 0])


# --------------------------------------------------------------------------------------------------------------- memory

BIG = (512, 4096)  # 8 MB


def _peak(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["npy", "npz", "generator"])
def test_a_pass_holds_batches_and_never_the_whole_of_the_data(kind: str, tmp_path: Path) -> None:
    values = rows(*BIG)
    path = tmp_path / f"big.{kind}"
    np.save(tmp_path / "big.npy", values)
    np.savez(tmp_path / "big.npz", x=values)
    source = ({"x": values[start : start + 4]} for start in range(0, BIG[0], 4)) if kind == "generator" else path

    def read() -> None:
        with opened(source, spec("x", "N", BIG[1])) as samples:
            assert sum(batch.size for batch in samples.batches()) == BIG[0]

    assert _peak(read) < values.nbytes / 3
    assert _peak(lambda: np.load(tmp_path / "big.npy")) >= values.nbytes  # what is measured here sees arrays


def test_chosen_samples_come_in_the_order_asked_for_from_all_shards() -> None:
    parts = [{"x": rows(5)}, {"x": rows(4, first=5)}, {"x": rows(6, first=9)}]
    with opened(iter(parts)) as found:
        assert found.uniform
        assert found.take(np.array([11, 2, 7, 0]))["x"][:, 0].tolist() == [11, 2, 7, 0]
    with opened({"x": rows(9)}, spec("x", 4, 3)) as found:
        assert found.take(np.array([8, 3]))["x"][:, 0].tolist() == [8, 3, 3, 3]


def test_samples_of_different_sizes_are_not_uniform() -> None:
    parts = [{"x": rows(5, 3)}, {"x": rows(4, 6)}]
    with opened(iter(parts), spec("x", "N", "L")) as found:
        assert not found.uniform


def test_bytes_that_are_no_text_are_refused_for_a_string_input() -> None:
    refused("no ASCII text", {"s": np.array([[b"\xd3"]] * 4)}, spec("s", "N", 1, dtype="U8"))
