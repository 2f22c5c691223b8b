"""Data sets by name and folder, damaged files, the order of batches, and the augmentations."""

import gzip
import io
import itertools
import logging
import struct
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_fast import data as data_module
from ssl_fast import folder as folder_module
from ssl_fast.augment import MEAN_STD, POLICIES, Policy, TwoViews, plain_view, policy_named
from ssl_fast.data import DEBIAN_FASHION, FASHION_FILES, Loader, Split, ahead, epoch_batches, in_order, load_data
from ssl_fast.folder import ImageFiles, find_images
from ssl_fast.run import read_rows
from ssl_fast.train import train

CPU = torch.device("cpu")


def save_images(folder, n, colour=0, mode="RGB", size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.full((size[1], size[0], 3), (colour, i, 100), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.png")
    return folder


def write_fashion(folder, n=12, compressed=True):
    folder.mkdir(exist_ok=True)
    for name in FASHION_FILES:
        shape = (n, 28, 28) if "images" in name else (n,)
        raw = struct.pack(f">HBB{len(shape)}i", 0, 8, len(shape), *shape) + bytes(
            i % 10 for i in range(int(np.prod(shape)))
        )
        (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(raw) if compressed else raw)


def test_digits():
    digits = load_data("digits")
    assert digits.train.images.shape == (1437, 1, 8, 8) and digits.test.images.shape == (360, 1, 8, 8)
    assert digits.train.images.dtype == torch.uint8 and digits.train.images.max() == 255
    assert torch.equal(load_data("digits").test.images, digits.test.images)
    assert digits.test.labels.bincount(minlength=10).min() >= 25  # a draw over all writers, not a run of the file


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_from_a_flat_folder_that_is_read_only(tmp_path, compressed):
    write_fashion(tmp_path / "fashion", compressed=compressed)
    (tmp_path / "fashion").chmod(0o555)
    for found in (load_data(tmp_path / "fashion"), load_data("fashion_mnist", tmp_path / "fashion")):
        assert found.name == "fashion_mnist" and found.train.images.shape == (12, 1, 28, 28)
        assert found.test.labels.tolist() == [i % 10 for i in range(12)]


def test_fashion_mnist_of_debian():
    if not DEBIAN_FASHION.exists():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    found = load_data(DEBIAN_FASHION)
    assert len(found.train) == 60000 and len(found.test) == 10000 and found.test.labels.bincount().eq(1000).all()


DAMAGES = {
    "cut": lambda raw: raw[:-1],
    "empty": lambda raw: b"",
    "no header": lambda raw: gzip.compress(b"\0\0\x08"),
    "one byte short": lambda raw: gzip.compress(gzip.decompress(raw)[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_fashion_mnist_names_the_file(tmp_path, damage):
    write_fashion(tmp_path)
    path = tmp_path / f"{FASHION_FILES[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=path.name):
        load_data(tmp_path)


class FakeDataset:
    """A torchvision data set that is there, or whose download fails."""

    there = True

    def __init__(self, root, download, split=None, train=None):
        if not self.there:
            raise ConnectionError("no route to host") if download else RuntimeError("Dataset not found")
        n = 4 if train or split == "unlabeled" else 2
        if split is None:
            self.data, self.targets = np.zeros((n, 32, 32, 3), np.uint8), [1] * n
        else:
            self.data, self.labels = np.zeros((n, 3, 96, 96), np.uint8), np.ones(n)


@pytest.mark.parametrize("name, kind, size", [("cifar10", "CIFAR10", 32), ("stl10", "STL10", 96)])
def test_torchvision_sets(monkeypatch, tmp_path, name, kind, size):
    monkeypatch.setattr(f"torchvision.datasets.{kind}", FakeDataset)
    found = load_data(name, tmp_path)
    assert found.train.images.shape == (4, 3, size, size) and found.test.labels.tolist() == [1, 1]
    assert (found.train.labels is None) == (name == "stl10")


@pytest.mark.parametrize(
    "name, file",
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("stl10", "stl10_binary.tar.gz"),
        ("fashion_mnist", "t10k-images-idx3-ubyte"),
    ],
)
def test_failed_download_says_where_to_put_which_files(monkeypatch, tmp_path, name, file):
    monkeypatch.setattr(FakeDataset, "there", False)
    for kind in ("CIFAR10", "STL10", "FashionMNIST"):
        monkeypatch.setattr(f"torchvision.datasets.{kind}", FakeDataset)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*no route to host.*{file}.*data_dir"):
        load_data(name, tmp_path)


def test_folder_of_classes(tmp_path):
    save_images(tmp_path / "cat", 15, colour=10)
    save_images(tmp_path / "dog", 15, colour=200)
    found = load_data(tmp_path, image_size=14)
    assert (len(found.train), len(found.test), found.size, found.channels) == (27, 3, 14, 3)
    assert found.test.labels.tolist() == [0, 1, 1] == [int(image[0].max() > 100) for image, _ in found.test.images]
    assert any("every tenth" in note for note in found.notes)


def test_folder_with_train_and_val(tmp_path):
    for part, n in (("train", 6), ("val", 4)):
        save_images(tmp_path / part / "cat", n), save_images(tmp_path / part / "dog", n)
    found = load_data(tmp_path)
    assert (len(found.train), len(found.test), found.size) == (12, 8, 224)
    save_images(tmp_path / "val" / "dogs", 1)
    with pytest.raises(ValueError, match="class 'dogs'.*did you mean 'dog'"):
        load_data(tmp_path)


def test_folder_without_labels(tmp_path):
    save_images(tmp_path, 3), save_images(tmp_path / "more", 2)
    found = load_data(tmp_path)
    assert len(found.train) == 5 and found.train.labels is None and found.bank is None and found.test is None
    only = save_images(tmp_path / "nested" / "only", 2).parent
    assert find_images(only)[1] is None  # one subfolder is no classification


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    files, _, _ = find_images(save_images(tmp_path, 2, mode=mode))
    image, indices = ImageFiles(files, 16)[1]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and indices.tolist() == [1, 1]


def test_damaged_image_is_named_once_and_replaced(tmp_path, caplog):
    save_images(tmp_path, 6, colour=50)
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "003.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        found = load_data(tmp_path)
        for workers in (0, 2):
            batches = list(Loader(found.train, CPU, workers)(in_order(6, 4)))
            assert torch.cat([indices for _, indices in batches]).tolist() == [0, 1, 4, 4, 4, 5]
            assert batches[0][0][:, 1, 0, 0].tolist() == [0, 1, 4, 4]
    assert sorted(record.args[0].name for record in caplog.records) == ["002.png", "003.png"]


def test_folder_of_broken_files_fails_at_once(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="3 files in a row cannot be decoded.*2.jpg"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("fashion_mnits", FileNotFoundError, "did you mean 'fashion_mnist'"),
        ("/no/such/folder", FileNotFoundError, "neither a data set nor a folder.*digits, fashion_mnist"),
    ],
)
def test_data_that_is_not_there(name, error, message):
    with pytest.raises(error, match=message):
        load_data(name)


def test_empty_folder_and_tiny_views(tmp_path):
    with pytest.raises(ValueError, match="no images in .*jpg"):
        load_data(tmp_path)
    with pytest.raises(ValueError, match="image_size: got 1, allowed: a whole number >= 4"):
        load_data("digits", image_size=1)


def test_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    monkeypatch.delitem(__import__("sys").modules, "sklearn.datasets", raising=False)
    with pytest.raises(ImportError, match=r'data=digits needs scikit-learn.*pip install "ssl_fast\[train\]"'):
        load_data("digits")


def test_epochs_are_permutations_fixed_by_seed_and_epoch():
    batches = epoch_batches(10, 4, seed=1, epoch=2)
    assert [len(b) for b in batches] == [4, 4] and len(set(torch.cat(batches).tolist())) == 8
    torch.rand(3)
    assert torch.equal(torch.cat(batches), torch.cat(epoch_batches(10, 4, seed=1, epoch=2)))
    others = [epoch_batches(10, 4, seed=1, epoch=3), epoch_batches(10, 4, seed=2, epoch=1)]
    assert all(not torch.equal(torch.cat(batches), torch.cat(other)) for other in others)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_of_files_keeps_order_and_global_generator(tmp_path, workers):
    files, _, _ = find_images(save_images(tmp_path, 8))
    loader = Loader(data_module.Split(ImageFiles(files, 8)), CPU, workers)
    state = torch.get_rng_state()
    for _ in range(2):  # a second epoch uses the same workers
        for batch, (images, indices) in zip(batches := epoch_batches(8, 3, 0, 0), loader(batches), strict=True):
            assert torch.equal(indices, batch) and torch.equal(images[:, 1, 0, 0].long(), batch)
    assert torch.equal(torch.get_rng_state(), state)


def images_of(channels, n=6, size=16):
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_policy_makes_two_views(name, channels):
    images = images_of(channels)
    view1, view2 = TwoViews(name, 12)(images, torch.arange(6))
    assert view1.shape == (6, channels, 12, 12) and view1.dtype == torch.float32 and view1.isfinite().all()
    assert not torch.equal(view1, view2)


def test_policy_without_any_change_is_the_plain_view():
    nothing = Policy(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, strength=0.0, gray=0.0, blur=0.0)
    images = images_of(3)
    for view in TwoViews(nothing, 16)(images):
        torch.testing.assert_close(view, plain_view(images, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_images_of_a_folder_are_packed(tmp_path, workers):
    save_images(tmp_path, 3, size=(40, 30)), save_images(tmp_path / "more", 2, colour=9, size=(90, 200))
    files, _, _ = find_images(tmp_path)
    (packed, indices), _ = Loader(data_module.Split(ImageFiles(files, 30)), CPU, workers, whole=True)(in_order(5, 4))
    assert indices.tolist() == [0, 1, 2, 3] and len(packed) == 4
    assert [tuple(packed[i].shape) for i in range(4)] == [(3, 30, 40)] * 3 + [(3, 67, 30)]  # 200 x 90 by 3
    assert packed[2][:, 5, 7].tolist() == [0, 2, 100] and packed[3][:, -1, -1].tolist() == [9, 0, 100]
    assert all(view.shape == (4, 3, 16, 16) for view in TwoViews("simclr", 16)(packed, indices))


def test_training_on_a_folder_does_not_depend_on_workers_or_a_thread(monkeypatch, tmp_path):
    source = tmp_path / "in"
    save_images(source / "cat", 12, colour=10), save_images(source / "dog", 12, colour=99, size=(50, 70))
    settings = {"model": "convnet", "epochs": 1, "batch_size": 11, "image_size": 12, "log_every": 1}
    ends = [train(tmp_path / f"{n}", source, num_workers=n, augment="simclr", **settings)["loss"] for n in (0, 2)]
    monkeypatch.setattr(Loader, "_fetches_ahead", lambda self: True)
    ends.append(train(tmp_path / "ahead", source, num_workers=0, augment="simclr", **settings)["loss"])
    assert ends[0] == ends[1] == ends[2]


def threads_ahead():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ssl_fast_ahead")]


def test_a_thread_is_one_item_ahead():
    asked, second = [], threading.Event()

    def items():
        for i in range(4):
            asked.append((i, threading.current_thread() is threading.main_thread()))
            if i == 1:
                second.set()
            yield i

    fetched = ahead(items())
    assert not asked and next(fetched) == 0
    assert second.wait(30) and len(asked) == 2  # while the caller is busy with 0, and no further
    assert list(fetched) == [1, 2, 3] and asked == [(i, False) for i in range(4)] and not threads_ahead()
    assert list(ahead(())) == []


def test_a_thread_ahead_ends_with_its_loop_and_passes_on_what_it_raises():
    for item in ahead(itertools.count()):
        if item == 3:
            break
    assert not threads_ahead()

    def broken(error):
        yield 1
        raise error

    for error in (ValueError("no image"), KeyboardInterrupt()):
        fetched = ahead(broken(error))
        assert next(fetched) == 1
        with pytest.raises(type(error)) as raised:
            next(fetched)
        assert raised.value is error and not threads_ahead()
    with pytest.raises(KeyboardInterrupt):  # of the caller, in the middle of its loop
        for _ in ahead(itertools.count()):
            raise KeyboardInterrupt
    assert not threads_ahead()


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_loader_with_a_thread_delivers_the_same(monkeypatch, tmp_path, workers):
    images = images_of(3, n=9) if workers is None else ImageFiles(find_images(save_images(tmp_path, 9))[0], 8)
    loader, batches = Loader(Split(images), CPU, workers or 0), in_order(9, 4)
    plain = list(loader(batches))
    monkeypatch.setattr(Loader, "_fetches_ahead", lambda self: True)
    next(loader(batches))  # stopped early, and started anew
    for (a, i), (b, j) in zip(plain, loader(batches), strict=True):
        assert torch.equal(a, b) and torch.equal(i, j)
    assert not threads_ahead()


def test_time_for_views_is_time_waiting_for_data(monkeypatch, tmp_path):
    now, forward = [0.0], TwoViews.forward

    def slow(self, *args):
        now[0] += 1
        return forward(self, *args)

    clock = types.SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: 0.0)  # in which only views take time
    monkeypatch.setattr("ssl_fast.progress.time", clock)
    monkeypatch.setattr(TwoViews, "forward", slow)
    save_images(tmp_path / "in", 8)
    settings = {"model": "convnet", "image_size": 12, "num_workers": 0, "epochs": 1, "batch_size": 4, "log_every": 1}
    train(tmp_path / "run", tmp_path / "in", **settings)
    waits = [row["data_wait"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "data_wait" in row]
    assert waits == [1.0, 1.0]


def save_jpegs(folder):
    """Smooth images of several shapes; one turned by its EXIF data, one a PNG, one cut off."""
    folder.mkdir()
    shapes = [(90, 70), (64, 200), (37, 41), (300, 260), (50, 60), (50, 60), (50, 60)]
    for i, (width, height) in enumerate(shapes):
        coarse = np.random.RandomState(i).randint(0, 256, (3, 4, 3), np.uint8)
        image, file = Image.fromarray(coarse).resize((width, height), Image.BICUBIC), io.BytesIO()
        exif = Image.Exif()
        exif[folder_module.ORIENTATION] = 6 if i == 4 else 1
        image.save(file, "PNG" if i == 5 else "JPEG", quality=95, **({} if i == 5 else {"exif": exif}))
        (folder / f"{i}.jpg").write_bytes(file.getvalue()[: -200 if i == 6 else None])
    return ImageFiles(find_images(folder)[0], 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_jpegs_decoded_on_the_device_are_pillows(monkeypatch, tmp_path, workers, caplog):
    """On a CPU in the place of nvJPEG: which files go there, in which sizes they come back, what is replaced."""
    from torchvision.io import ImageReadMode, decode_jpeg

    given = []

    def decode(device, files):
        given.append(len(files))
        return decode_jpeg(files, ImageReadMode.RGB)

    images, order = save_jpegs(tmp_path / "in"), [torch.tensor([0, 1, 2, 3]), torch.tensor([6, 5, 4])]
    plain = list(Loader(Split(images), CPU, workers, whole=True)(order))
    loader = Loader(Split(images), CPU, workers, whole=True)
    assert not loader._nvjpeg  # a CPU decodes in the processes
    monkeypatch.setattr(data_module, "decodes_jpegs", lambda device: True)
    monkeypatch.setattr(folder_module, "_decode_on", decode)
    loader = Loader(Split(images), CPU, workers, whole=True)
    for (a, i), (b, j) in zip(plain, loader(order), strict=True):
        assert torch.equal(i, j) and torch.equal(a.table, b.table)
        assert (a.data.float() - b.data.float()).abs().mean() < 3
    assert given == [4] and plain[1][1].tolist() == [0, 5, 4]  # the other three are Pillow's

    def broken(device, files):
        raise RuntimeError("nvJPEG")

    monkeypatch.setattr(folder_module, "_decode_on", broken)
    for (a, i), (b, j) in zip(plain, loader(order), strict=True):
        assert torch.equal(i, j) and torch.equal(a.table, b.table) and torch.equal(a.data, b.data)


def test_where_nvjpeg_does_not_work_the_processes_decode(monkeypatch):
    gpu, asked = torch.device("cuda:1"), []

    def decode(files, mode, device):
        asked.append(device)
        return [torch.zeros(3, 8, 8)]

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    assert folder_module.decodes_jpegs(gpu) and not folder_module.decodes_jpegs(CPU) and asked == [gpu]
    monkeypatch.setattr("torchvision.io.decode_jpeg", lambda files, mode, device: 1 / 0)
    assert not folder_module.decodes_jpegs(gpu)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert not folder_module.decodes_jpegs(gpu)


def test_plain_view_is_normalised_and_resized():
    white = torch.full((2, 3, 20, 20), 255, dtype=torch.uint8)
    mean, std = (torch.tensor(v) for v in MEAN_STD[3])
    view = plain_view(white, 10)
    assert view.shape == (2, 3, 10, 10)
    torch.testing.assert_close(view[0, :, 5, 5], (1 - mean) / std)


def test_unknown_policy():
    with pytest.raises(ValueError, match="augment: got 'simcrl', did you mean 'simclr'"):
        policy_named("simcrl")
