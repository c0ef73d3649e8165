import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergeline.evaluation.datasets import load, prepare
from mergeline.evaluation.splits import CHOOSING_OF_VAL, Examples, official
from mergeline.merging.errors import UserError

RNG = np.random.default_rng(0)


def arrays(n=6, shape=(8, 8, 3), classes=3):
    x = RNG.integers(0, 256, (n, *shape), np.uint8)
    y = np.arange(n) % classes
    return {"val_x": x[: n // 2], "val_y": y[: n // 2], "test_x": x, "test_y": y}


def save_npz(path, data):
    np.savez(path, **data)
    return str(path)


def image_folder(root, **counts):
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i:03}.png")
    return str(root)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def problem(source, out, image_size=8):
    with pytest.raises(UserError) as error:
        prepare(str(source), out, image_size)
    assert "\n" not in str(error.value)
    assert not any(out.parent.glob(f"*{out.name}*")), "nothing may be left behind"
    return str(error.value)


# Arrays


def test_arrays_of_the_right_size_are_taken_as_they_are(tmp_path):
    data = arrays()
    prepare(save_npz(tmp_path / "a.npz", data), tmp_path / "out", 8)
    dataset = load(tmp_path / "out")
    assert dataset.classnames is None
    for name in ("val", "test"):
        x, y = dataset.split(name)
        assert isinstance(x, np.memmap) and y.dtype == np.int64
        assert np.array_equal(x, data[f"{name}_x"]) and np.array_equal(y, data[f"{name}_y"])


def test_the_description_holds_no_path(tmp_path):
    prepare(save_npz(tmp_path / "a.npz", arrays()), tmp_path / "out", 8)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta == {"source": "a.npz", "classnames": None, "sizes": {"val": 3, "test": 6}, "drawn": []}


def test_safetensors_and_compressed_npz_give_the_same_bytes(tmp_path):
    from safetensors.numpy import save_file

    data = arrays()
    save_file(data, tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_LZMA) as archive:
        for key, value in data.items():
            buffer = io.BytesIO()
            np.save(buffer, value)
            archive.writestr(f"{key}.npy", buffer.getvalue())
    for source in ("a.safetensors", "b.npz"):
        prepare(str(tmp_path / source), tmp_path / source[0], 8)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.pop("meta.json") and b.pop("meta.json") and a == b


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1)])
def test_grey_images_are_replicated(tmp_path, shape):
    data = arrays(shape=shape)
    prepare(save_npz(tmp_path / "a.npz", data), tmp_path / "out", 8)
    x, _ = load(tmp_path / "out").split("test")
    assert all(np.array_equal(x[..., c], data["test_x"].reshape(6, 8, 8)) for c in range(3))


@pytest.mark.parametrize("shape", [(20, 33, 3), (33, 20, 3), (5, 7, 3), (13, 21)])
def test_other_sizes_get_the_geometry_of_clip(tmp_path, shape):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    data = arrays(shape=shape)
    prepare(save_npz(tmp_path / "a.npz", data), tmp_path / "out", 12)
    clip = Compose([Resize(12, InterpolationMode.BICUBIC), CenterCrop(12)])
    x, _ = load(tmp_path / "out").split("test")
    for image, expected in zip(x, data["test_x"]):
        assert np.array_equal(image, np.asarray(clip(Image.fromarray(expected).convert("RGB"))))


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"val_y": None}, "'val_y' is missing"),
        ({"test_x": np.zeros((6, 8, 8, 3), np.float32)}, "test_x is float32"),
        ({"test_x": np.zeros((6, 8, 8, 4), np.uint8)}, "(6, 8, 8, 4)"),
        ({"test_x": np.zeros((6, 0, 8, 3), np.uint8)}, "(6, 0, 8, 3)"),
        ({"test_y": np.zeros(5, np.int64)}, "test_y is int64 (5,)"),
        ({"test_y": np.zeros(6)}, "test_y is float64"),
        ({"test_y": np.array([0, 1, 2, 0, 1, -1])}, "labels go from -1 to 2"),
        ({"test_y": np.full(6, 2**40)}, "they must lie in 0 to"),
        ({"test_y": np.array([0, {}] * 3, object)}, "allow_pickle"),
        ({"val_x": np.zeros((0, 8, 8, 3), np.uint8), "val_y": np.zeros(0, int)}, "val split is empty"),
    ],
)
def test_arrays_that_are_no_dataset(tmp_path, change, expected):
    data = {key: value for key, value in (arrays() | change).items() if value is not None}
    assert expected in problem(save_npz(tmp_path / "a.npz", data), tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 10, 300, 1500])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_truncated_files_are_named(tmp_path, keep, suffix):
    from safetensors.numpy import save_file

    path = tmp_path / f"a{suffix}"
    save_npz(path, arrays()) if suffix == ".npz" else save_file(arrays(), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert problem(path, tmp_path / "out").startswith(f"{path}: ")


def test_damaged_bytes_in_the_archive_are_noticed(tmp_path):
    path = tmp_path / "a.npz"
    save_npz(path, arrays())
    data = bytearray(path.read_bytes())
    data[400] ^= 255
    path.write_bytes(data)
    assert "CRC" in problem(path, tmp_path / "out")


def test_a_failure_leaves_the_earlier_dataset(tmp_path):
    source = tmp_path / "a.npz"
    prepare(save_npz(source, arrays()), tmp_path / "out", 8)
    before = contents(tmp_path / "out")
    save_npz(source, arrays() | {"test_y": np.full(6, -1)})
    with pytest.raises(UserError):
        prepare(str(source), tmp_path / "out", 8)
    assert contents(tmp_path / "out") == before and sorted(os.listdir(tmp_path)) == ["a.npz", "out"]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("nowhere", "no such file or folder"),
        ("ftp://a/b", "unknown scheme 'ftp'; known: torchvision, hf-dataset"),
        ("torchvision://MINST?root=x", "did you mean 'MNIST'?"),
        ("torchvision://MNIST", "add ?root="),
        ("torchvision://MNIST?root=x&val=val", "unknown option 'val'"),
        ("torchvision://MNIST?root", "bad query field"),
        ("torchvision://MNIST?root=nowhere", "Dataset not found"),
        ("torchvision://DTD?root=nowhere&split=val", "unknown option 'split'"),
        ("torchvision://StanfordCars?root=nowhere", "Dataset not found"),
        ("torchvision://transforms?root=x", "no dataset 'transforms'"),
        ("hf-dataset://a/b?labels=fine", "did you mean 'label'?"),
    ],
)
def test_sources_that_cannot_be_opened(tmp_path, source, expected):
    assert expected in problem(source, tmp_path / "out")


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    assert "must be a folder or end in .npz or .safetensors" in problem(tmp_path / "a.pt", tmp_path / "out")


# Folders


def test_a_folder_of_images(tmp_path):
    root = image_folder(tmp_path / "a", val={"b_2": 1, "a_1": 2}, test={"a_1": 2, "b_2": 3})
    prepare(root, tmp_path / "out", 8)
    dataset = load(tmp_path / "out")
    assert dataset.classnames == ["a 1", "b 2"]
    assert dataset.split("val")[1].tolist() == [0, 0, 1] and dataset.split("test")[1].tolist() == [
        0,
        0,
        1,
        1,
        1,
    ]


def test_a_tenth_of_train_is_held_out_the_same_way_each_time(tmp_path):
    root = image_folder(tmp_path / "a", train={"x": 12, "y": 18}, test={"x": 1, "y": 1})
    prepare(root, tmp_path / "one", 8)
    prepare(root, tmp_path / "two", 8)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    meta = json.loads((tmp_path / "one/meta.json").read_text())
    assert meta["drawn"] == ["val"] and meta["sizes"] == {"val": 3, "test": 2}


def test_palette_images_are_interpolated_in_colour(tmp_path):
    root = image_folder(tmp_path / "a", val={"x": 1}, test={"x": 1})
    Image.linear_gradient("L").convert("P").save(tmp_path / "a/test/x/000.png")
    prepare(root, tmp_path / "out", 8)
    column = load(tmp_path / "out").split("test")[0][0, :, 0, 0].astype(int)
    assert (np.diff(column) > 20).all()


def test_problems_in_a_folder_name_the_file(tmp_path):
    root = Path(image_folder(tmp_path / "a", val={"x": 1, "z": 1}, test={"x": 1}))
    assert "no class 'z'" in problem(root, tmp_path / "out")
    (root / "val/z").rename(root / "test/z")
    (root / "test/z/000.png").write_bytes(b"no image")
    assert "test/z/000.png" in problem(root, tmp_path / "out")
    Image.new("RGB", (9, 9)).save(root / "test/z/000.png")
    picture = (root / "test/x/000.png").read_bytes()
    (root / "test/x/000.png").write_bytes(picture[:-40])
    assert "test/x/000.png" in problem(root, tmp_path / "out")
    assert "no folder test/" in problem(root / "test", tmp_path / "out")


# torchvision


def write_idx(path, array):
    """The format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvision_with_a_train_flag(tmp_path):
    images = {"train": RNG.integers(0, 256, (40, 28, 28)), "t10k": RNG.integers(0, 256, (7, 28, 28))}
    for name, x in images.items():
        write_idx(tmp_path / f"MNIST/raw/{name}-images-idx3-ubyte", x)
        write_idx(tmp_path / f"MNIST/raw/{name}-labels-idx1-ubyte", np.arange(len(x)) % 10)
    prepare(f"torchvision://MNIST?root={tmp_path}", tmp_path / "out", 28)
    dataset = load(tmp_path / "out")
    x, y = dataset.split("test")
    assert np.array_equal(x[..., 1], images["t10k"]) and y.tolist() == list(range(7))
    x, y = dataset.split("val")
    assert len(x) == 4 and all(any(np.array_equal(image[..., 0], t) for t in images["train"]) for image in x)


def test_torchvision_with_named_splits(tmp_path):
    root, first = tmp_path / "dtd/dtd", {"train": 0, "val": 100, "test": 200}
    (root / "labels").mkdir(parents=True)
    for name in ("polka-dotted", "zig_zag"):
        (root / "images" / name).mkdir(parents=True)
    for split, start in first.items():
        files = [f"{('polka-dotted', 'zig_zag')[i % 2]}/{start + i}.png" for i in range(20)]
        (root / f"labels/{split}1.txt").write_text("\n".join(files))
        for i, file in enumerate(files):
            Image.new("RGB", (8, 8), (start + i, 0, 0)).save(root / "images" / file)

    def reds(query, split):
        prepare(f"torchvision://DTD?root={tmp_path}{query}", tmp_path / "out", 8)
        dataset = load(tmp_path / "out")
        assert dataset.classnames == ["polka-dotted", "zig zag"]
        x, y = dataset.split(split)
        assert np.array_equal(y, x[:, 0, 0, 0] % 2)
        return sorted(x[:, 0, 0, 0].tolist())

    assert reds("", "test") == list(range(200, 220))
    assert reds("&val=val", "val") == list(range(100, 120))
    drawn = reds("", "val")
    assert len(drawn) == 2 and set(drawn) <= set(range(20))
    assert "'vla'" in problem(f"torchvision://DTD?root={tmp_path}&val=vla", tmp_path / "bad")


def test_torchvision_without_splits_draws_two_disjoint_tenths(tmp_path):
    for label, name in enumerate(["Forest", "River"]):
        folder = tmp_path / f"eurosat/2750/{name}"
        folder.mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (label, i, 0)).save(folder / f"{i:02}.png")
    prepare(f"torchvision://EuroSAT?root={tmp_path}", tmp_path / "out", 8)
    dataset = load(tmp_path / "out")
    assert dataset.classnames == ["Forest", "River"]
    seen = set()
    for name in ("val", "test"):
        x, y = dataset.split(name)
        assert len(x) == 4 and np.array_equal(x[:, 0, 0, 0], y)
        seen |= {(int(a), int(b)) for a, b in x[:, 0, 0, :2]}
    assert len(seen) == 8
    assert json.loads((tmp_path / "out/meta.json").read_text())["drawn"] == ["val", "test"]


def test_files_are_drawn_in_the_order_of_their_names(tmp_path):
    """SUN397 lists its files in the order of the file system."""
    outs = []
    for attempt, order in enumerate([range(20), reversed(range(20))]):
        root = tmp_path / str(attempt) / "SUN397"
        (root / "a/airport_terminal").mkdir(parents=True)
        (root / "ClassName.txt").write_text("/a/airport_terminal\n/b/bow_window/indoor\n")
        for i in order:
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"a/airport_terminal/sun_{i:02}.jpg")
        prepare(f"torchvision://SUN397?root={root.parent}", tmp_path / f"out{attempt}", 8)
        outs.append(load(tmp_path / f"out{attempt}"))
    assert outs[0].classnames == ["airport terminal", "bow window indoor"]
    assert np.array_equal(outs[0].split("val")[0], outs[1].split("val")[0])


# Hugging Face


def test_a_hub_dataset_kept_in_a_local_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a_cat", "dog"])}
    )
    for name, n in (("train", 20), ("test", 4)):
        rows = {"img": [Image.new("L", (9, 9), i) for i in range(n)], "fine": [i % 2 for i in range(n)]}
        (tmp_path / "org/name").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(f"org/name/{name}.parquet")
    prepare("hf-dataset://org/name?image=img&label=fine&val=train[90%:]", tmp_path / "out", 9)
    dataset = load(tmp_path / "out")
    assert dataset.classnames == ["a cat", "dog"]
    assert dataset.split("val")[0][:, 0, 0, 0].tolist() == [18, 19] and dataset.split("test")[1].tolist() == [
        0,
        1,
        0,
        1,
    ]

    prepare("hf-dataset://org/name?image=img&label=fine", tmp_path / "drawn", 9)
    assert len(load(tmp_path / "drawn").split("val")[1]) == 2
    assert "no column 'image'; there are img, fine" in problem("hf-dataset://org/name", tmp_path / "bad")
    assert "is not an image" in problem("hf-dataset://org/name?image=fine&label=fine", tmp_path / "bad")
    assert "validation" in problem(
        "hf-dataset://org/name?image=img&label=fine&val=validation", tmp_path / "bad"
    )


# Loading


@pytest.mark.parametrize(
    "file, content", [("meta.json", b"{"), ("meta.json", b"[]"), ("val_x.npy", b"no"), ("val_y.npy", b"")]
)
def test_a_damaged_folder_is_named(tmp_path, file, content):
    prepare(save_npz(tmp_path / "a.npz", arrays()), tmp_path / "out", 8)
    (tmp_path / "out" / file).write_bytes(content)
    with pytest.raises(UserError, match="not a prepared dataset"):
        load(tmp_path / "out").split("val")


def test_arrays_that_do_not_belong_together_are_noticed(tmp_path):
    prepare(save_npz(tmp_path / "a.npz", arrays()), tmp_path / "out", 8)
    np.save(tmp_path / "out/val_y.npy", np.arange(5))
    with pytest.raises(UserError, match="do not fit"):
        load(tmp_path / "out").split("val")


# What merges are fitted to


def test_without_images_to_fit_to_every_other_one_of_val_is_taken(tmp_path):
    prepare(save_npz(tmp_path / "a.npz", arrays(n=20)), tmp_path / "out", 8)
    dataset = load(tmp_path / "out")
    x, y = dataset.split("val")
    assert dataset.fits_val
    for name, chosen in (("fit", x[::2]), (None, x[CHOOSING_OF_VAL])):
        assert len(chosen) == 5 and (name is None or np.array_equal(dataset.split(name)[0], chosen))
    assert np.array_equal(dataset.split("fit")[1], y[::2])


@pytest.mark.parametrize("labelled", [False, True])
def test_images_to_fit_to_need_no_labels(tmp_path, labelled):
    x = RNG.integers(0, 256, (4, 8, 8, 3), np.uint8)
    own = {"fit_x": x} | ({"fit_y": np.array([2, 1, 0, 1])} if labelled else {})
    prepare(save_npz(tmp_path / "a.npz", arrays() | own), tmp_path / "out", 8)
    dataset = load(tmp_path / "out")
    found, y = dataset.split("fit")
    assert np.array_equal(found, x) and not dataset.fits_val
    assert y.tolist() == ([2, 1, 0, 1] if labelled else [-1] * 4)
    assert json.loads((tmp_path / "out/meta.json").read_text())["sizes"]["fit"] == 4


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"fit_y": np.zeros(4, int)}, "fit_y is there, but no fit_x"),
        ({"fit_x": np.zeros((0, 8, 8, 3), np.uint8)}, "the fit split is empty"),
        ({"fit_x": np.zeros((4, 8, 8, 3), np.uint8), "fit_y": np.zeros(3, int)}, "fit_y is int64 (3,)"),
        ({"fit_x": np.zeros((4, 8, 8), np.float32)}, "fit_x is float32"),
    ],
)
def test_wrong_arrays_to_fit_to_are_refused(tmp_path, own, expected):
    assert expected in problem(save_npz(tmp_path / "a.npz", arrays() | own), tmp_path / "out")


def test_a_folder_may_have_images_to_fit_to_with_and_without_classes(tmp_path):
    root = Path(image_folder(tmp_path / "a", test={"x": 2, "y": 2}, val={"x": 1, "y": 1}, fit={"y": 3}))
    prepare(str(root), tmp_path / "out", 8)
    assert load(tmp_path / "out").split("fit")[1].tolist() == [1, 1, 1]
    for i, file in enumerate(sorted((root / "fit/y").iterdir())):
        file.rename(root / "fit" / f"{i}.png")
    assert "lies beside folders of classes" in problem(root, tmp_path / "other")
    (root / "fit/y").rmdir()
    prepare(str(root), tmp_path / "out", 8)
    assert load(tmp_path / "out").split("fit")[1].tolist() == [-1, -1, -1]


def test_examples_to_fit_to_are_drawn_beside_val_and_never_named_as_val_or_test():
    def split(name):
        return Examples({"train": 100, "test": 10, "val": 10, "more": 7}[name], lambda i: (name, i))

    opened = official(split, {"fit": "30"}, "here")
    val, fit = (
        {opened_split.get(i) for i in range(opened_split.size)} for opened_split in (opened.val, opened.fit)
    )
    assert len(val) == 10 and len(fit) == 30 and not val & fit and opened.drawn == ("val", "fit")
    assert official(split, {"fit": "more", "val": "val"}, "here").fit.size == 7
    assert official(split, {"fit": "30", "val": "val"}, "here").fit.size == 30
    for options, expected in (
        ({"fit": "0"}, "is no example"),
        ({"fit": "91"}, "has 90 that are not in val"),
        ({"fit": "test", "val": "val"}, "test, which reports alone"),
        ({"fit": "val", "val": "val"}, "is val, which chooses"),
        ({"fit": "train"}, "write fit=400"),
    ):
        with pytest.raises(UserError, match=expected):
            official(split, options, "here")
