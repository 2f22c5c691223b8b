"""Views against torchvision, step by step and in chains; what is drawn against its distributions; bad input."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import DEVICE, backends
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

import ssl_fast
from ssl_fast.augment import POLICIES, Policy, TwoViews, sample_view_params
from ssl_fast.functional import two_views
from ssl_fast.ops import two_views as home
from ssl_fast.ops.two_views import COLUMNS, NOTHING, ORDERS, PackedImages

BACKENDS = backends(home._two_views, torch.float32)
PLAIN = {1: {"mean": [0.0], "std": [1.0]}, 3: {"mean": [0.0] * 3, "std": [1.0] * 3}}
FORMATS = (torch.contiguous_format, torch.channels_last)


def images_of(channels, height=23, width=31, n=2, seed=0):
    """Smooth images with edges and flat corners: hues of all kinds, black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 5, 6, generator=generator)
    x = (torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 1.6 - 0.3).clamp(0, 1)
    x[:, :, : height // 4, : width // 4] = 0
    x[:, :, -(height // 4) :, : width // 4] = 1
    return (x * 255).round().byte().to(DEVICE)


def rows(n=2, **drawn):
    """n rows, all with these values."""
    values = {**NOTHING, "height": 23, "width": 31, **drawn}
    return torch.tensor([[float(values[name]) for name in COLUMNS]] * n, device=DEVICE)


def views(images, params, size, backend, **options):
    channels = images.channels if isinstance(images, PackedImages) else images.shape[1]
    with ssl_fast.backend(backend):
        return two_views(images, params, size, **PLAIN[channels], **options)


def each(function):
    return lambda x: torch.stack([function(image) for image in x])


def torchvision_view(image, row, size):
    """The chain of torchvision.transforms.v2.functional for one image of bytes or floats."""
    d = dict(zip(COLUMNS, row.tolist(), strict=True))
    if d["angle"]:
        image = TF.rotate(image, d["angle"], interpolation=InterpolationMode.BILINEAR)
    box = (int(d[name]) for name in COLUMNS[:4])
    image = TF.resized_crop(image, *box, [size, size], antialias=True)
    image = TF.horizontal_flip(image) if d["flip"] else image
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for step in ORDERS[int(d["order"])]:
        if d[COLUMNS[7 + step]] != (step != 3):
            image = adjust[step](image, d[COLUMNS[7 + step]])
    image = TF.rgb_to_grayscale(image, image.shape[0]) if d["gray"] else image
    if d["sigma"]:
        image = TF.gaussian_blur(image, [int(d["kernel"])] * 2, [d["sigma"]] * 2)
    if d["solarize"] <= 1:
        image = TF.solarize(image, d["solarize"] * (255 if image.dtype == torch.uint8 else 1))
    return image


STEPS = {
    "nothing": {},
    "crop": {"top": 3, "left": 7, "height": 11, "width": 13},
    "one pixel": {"top": 22, "left": 30, "height": 1, "width": 1},
    "flip": {"flip": 1, "left": 4, "width": 20},
    "rotation": {"angle": 13.0},
    "rotation to the other side, cropped": {"angle": -77.0, "top": 2, "left": 9, "height": 17, "width": 22},
    "brightness": {"brightness": 1.6},
    "contrast": {"contrast": 0.4},
    "more contrast": {"contrast": 1.8},
    "saturation": {"saturation": 1.7},
    "hue": {"hue": -0.2},
    "hue, half a circle": {"hue": 0.5},
    "gray": {"gray": 1},
    "blur": {"sigma": 1.3, "kernel": 7},
    "slight blur": {"sigma": 0.15, "kernel": 5},
    "solarize": {"solarize": 0.5},
}


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then few and small cases


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_step_is_torchvisions(step, channels, backend):
    small, geometric = backend == "triton" and INTERPRETED, {"top", "left", "angle", "flip"} & set(STEPS[step])
    if small and channels == 1 and step not in ("nothing", "contrast", "blur"):
        pytest.skip("one channel takes the same way in the interpreter")
    images, params = images_of(channels), rows(**STEPS[step])
    sizes = (8, 37, 50)  # smaller, larger, and not of the vectors' width
    if small:
        sizes, little = (8 if step == "nothing" else 16,), {"top": 5, "left": 3, "height": 12, "width": 14}
        params = rows(**({} if step == "nothing" else little) | STEPS[step])
    for size in sizes:
        on_floats = torch.stack([torchvision_view(x, params[0], size) for x in images.cpu().float() / 255])
        got = views(images, params, size, backend).cpu()
        assert got.shape == on_floats.shape and got.is_contiguous(memory_format=torch.channels_last)
        assert (got - on_floats).abs().max() * 255 < 0.02
    if small:
        return
    # On bytes, which torchvision rounds or cuts off after every step: this step alone, without a resize before it.
    size, alone = (37, {}) if geometric else (23, {"width": 23})
    images, params = images[..., : alone.get("width", 31)], rows(**STEPS[step] | alone)
    on_bytes = torch.stack([torchvision_view(x, params[0], size) for x in images.cpu()])
    assert (views(images, params, size, backend).cpu() * 255 - on_bytes).abs().max() <= 1.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_chains_in_every_order_are_torchvisions(backend):
    size, n = 16, 4 if backend == "triton" and INTERPRETED else 48
    policy = replace(POLICIES["barlow_twins"].second, crop_area=(0.08, 0.5), blur=0.6, solarize=0.5, jitter=1.0)
    policy = replace(policy, rotate=10.0 * (n > 4))
    images = images_of(3, n=n)
    params = sample_view_params(torch.arange(n), 23, 31, policy, size=size)
    params[:, COLUMNS.index("order")] = torch.arange(n) * (1 if n > 4 else 7) % 24
    truth = torch.stack([torchvision_view(x, row, size) for x, row in zip(images.cpu() / 255, params, strict=True)])
    for layout in FORMATS[n == 4 :]:
        got = views(images.contiguous(memory_format=layout), params.to(DEVICE), size, backend).cpu()
        assert (got - truth).abs().max() * 255 < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_rounded_once(dtype, backend):
    images = images_of(3)
    params = rows(sigma=1.0, kernel=5, contrast=1.2, brightness=0.7, height=8, width=8)
    exact = two_views(images, params, 9)
    with ssl_fast.backend(backend):
        got = two_views(images, params, 9, dtype=dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), exact, atol=1e-4, rtol=2 * torch.finfo(dtype).eps)
    double = home._reference(images, None, params, 3, 9, *map(list, home.MEAN_STD[3]), torch.float64)
    torch.testing.assert_close(exact.double(), double, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_packed_images_of_all_shapes_give_the_views_of_each_alone(channels, backend):
    if backend == "triton" and INTERPRETED and channels == 1:
        pytest.skip("one channel takes the same way in the interpreter")
    shapes = (
        [(1, 1), (9, 12), (7, 3)]
        if backend == "triton" and INTERPRETED
        else [(23, 31), (1, 1), (5, 90), (64, 2), (61, 17)]
    )
    images = [images_of(channels, h, w, n=1, seed=i)[0] for i, (h, w) in enumerate(shapes)]
    packed = PackedImages.of(images)
    height, width = home.sizes_of(packed)
    policy = replace(POLICIES["simclr"], rotate=5.0 * (len(shapes) > 3))
    params = [sample_view_params(torch.arange(len(images)), height, width, policy, size=12, view=v) for v in (0, 1)]
    params = torch.cat(params).to(DEVICE)
    got = views(packed, params, 12, backend)
    for i, image in enumerate(images):
        alone = views(image[None], params[i :: len(images)].contiguous(), 12, backend)
        assert torch.equal(packed[i], image)
        torch.testing.assert_close(got[i :: len(images)], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_taps_and_a_wide_blur(backend):
    if backend == "triton" and INTERPRETED:
        pytest.skip("slow in the interpreter")
    images = images_of(3, 301, 207, n=1)
    params = rows(1, height=301, width=207, sigma=30.0, kernel=77)
    truth = TF.gaussian_blur(TF.resize(images / 255, [39, 39], antialias=True), [77, 77], [30.0, 30.0])
    assert (views(images, params, 39, backend) - truth).abs().max() * 255 < 0.1


def test_strided_and_empty_batches_and_one_pixel():
    images = images_of(3, 40, 40, n=3)
    params = rows(3, height=20, width=20, hue=0.1)
    for strided in (images[:, :, ::2, ::2], images.transpose(2, 3)[:, :, :20, :20], images.flip(1)[..., :20, :20]):
        assert torch.equal(two_views(strided, params, 7), two_views(strided.contiguous(), params, 7))
    assert two_views(images[:0], params[:0], 7).shape == (0, 3, 7, 7)
    assert two_views(images[:, :, :1, :1], rows(6, height=1, width=1), 1).shape == (6, 3, 1, 1)


def test_two_runs_and_thread_counts_are_equal_to_the_bit():
    images = images_of(3, n=5)
    params = torch.cat(
        [sample_view_params(torch.arange(5), 23, 31, POLICIES["simclr"], size=33, view=v) for v in (0, 1)]
    )
    params, threads, found = params.to(DEVICE), torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            found.append(two_views(images, params, 33))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_operator_and_compile():
    images, params = images_of(3), rows(contrast=1.3)
    args = (images, None, params, 3, 9, *map(list, home.MEAN_STD[3]), torch.bfloat16)
    torch.library.opcheck(torch.ops.ssl_fast.two_views.default, args)
    compiled = torch.compile(lambda x, p: two_views(x, p, 9) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3):
        x, p = images_of(3, n=n), rows(2 * n, contrast=1.3)
        assert torch.equal(compiled(x, p), two_views(x, p, 9) * 2)


# ---- what is drawn


def distance(a, b):
    """Kolmogorov and Smirnov's, over the value that samples of these sizes exceed once in a million times."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    largest = np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()
    return largest / (2.7 * math.sqrt(1 / len(a) + 1 / len(b)))


N = 100_000


def column(params, name):
    return params[:, COLUMNS.index(name)].double().numpy()


@pytest.mark.parametrize("height, width", [(32, 32), (60, 150)])
def test_crops_are_distributed_as_torchvisions(height, width):
    params = sample_view_params(torch.arange(N), height, width, POLICIES["simclr"], size=32)
    crop = v2.RandomResizedCrop(32, antialias=True)
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = [crop.make_params([image]) for _ in range(N)]
    for name in ("top", "left", "height", "width"):
        assert distance(column(params, name), np.array([drawn[name] for drawn in theirs])) < 1, name
    area = np.array([d["height"] * d["width"] for d in theirs]) / (height * width)
    assert distance(column(params, "height") * column(params, "width") / (height * width), area) < 1
    ratio = np.array([d["width"] / d["height"] for d in theirs])
    assert distance(column(params, "width") / column(params, "height"), ratio) < 1


def test_crops_that_do_not_fit_are_the_largest_in_the_middle():
    for height, width, expected in ((10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (3, 3, (0, 0, 3, 3))):
        policy = Policy(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0) if height == 3 else (3 / 4, 4 / 3))
        params = sample_view_params(torch.arange(50), height, width, policy, size=8)
        assert (params[:, :4] == torch.tensor(expected)).all()


def test_colours_are_distributed_as_torchvisions():
    params = sample_view_params(torch.arange(N), 32, 32, replace(POLICIES["simclr"], jitter=1.0), size=32)
    jitter = v2.ColorJitter(0.8, 0.8, 0.8, 0.2)
    torch.manual_seed(0)
    theirs = [jitter.make_params([]) for _ in range(N)]
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert distance(column(params, name), np.array([float(d[f"{name}_factor"]) for d in theirs])) < 1, name
    ours = np.bincount(column(params, "order").astype(int), minlength=24)
    names = {order: i for i, order in enumerate(ORDERS)}
    other = np.bincount([names[tuple(d["fn_idx"].tolist())] for d in theirs], minlength=24)
    assert ((ours - N / 24) ** 2 / (N / 24)).sum() < 70  # chi-squared, 23 degrees: 1e-6
    assert ((ours - other) ** 2 / (ours + other)).sum() < 70
    blur = v2.GaussianBlur(23, (0.1, 2.0))
    drawn = np.array([blur.make_params([])["sigma"][0] for _ in range(N)])
    sigma = column(params, "sigma")
    assert distance(sigma[sigma > 0], drawn) < 1


def test_probabilities_and_independence():
    """Of torchvision's classes the probabilities are arguments, which they compare one uniform number with."""
    policy = Policy(flip=0.3, jitter=0.7, gray=0.15, blur=0.4, solarize=0.25, rotate=20.0)
    params = sample_view_params(torch.arange(N), 64, 48, policy, size=48)
    happens = {
        "flip": column(params, "flip") == 1,
        "jitter": column(params, "brightness") != 1,
        "gray": column(params, "gray") == 1,
        "blur": column(params, "sigma") > 0,
        "solarize": column(params, "solarize") < 1,
    }
    for name, happened in happens.items():
        p = getattr(policy, name)
        assert abs(happened.mean() - p) < 5 * math.sqrt(p * (1 - p) / N), name
    assert abs(column(params, "angle")).max() <= 20 and distance(column(params, "angle"), np.linspace(-20, 20, N)) < 1
    others = [sample_view_params(torch.arange(N), 64, 48, policy, size=48, **key) for key in
              ({"view": 1}, {"epoch": 1}, {"seed": 1})]  # fmt: skip
    values = [
        column(p, name) for p in (params, *others) for name in ("top", "left", "width", "brightness", "hue", "angle")
    ]
    values += [values[0][1:].tolist() + [0]]  # of the next image
    correlation = np.corrcoef(np.array(values)) - np.eye(len(values))
    correlation[2::6, 0::6] = correlation[0::6, 2::6] = correlation[2::6, 1::6] = correlation[1::6, 2::6] = 0
    correlation[0:24:6, 1:24:6] = correlation[1:24:6, 0:24:6] = 0  # a large crop has little room
    own = correlation.copy()
    own[-1, 0] = own[0, -1] = 0
    assert abs(correlation[-1, 0]) < 0.02 and abs(own).max() < 0.02


# ---- a view depends on (seed, epoch, image, view) alone


def test_views_do_not_depend_on_the_batch_or_the_order():
    images, index = images_of(3, n=7), torch.tensor([5, 0, 3, 6, 1, 2, 9])
    draw = TwoViews("barlow_twins", 11, seed=4)
    state = torch.get_rng_state()
    whole = draw(images, index, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)
    for part in (torch.tensor([3]), torch.tensor([6, 2, 0]), torch.arange(7).flip(0)):
        for view, again in zip(whole, draw(images[part], index[part], epoch=2), strict=True):
            assert torch.equal(view[part], again)
    ranks = [torch.cat(parts) for parts in zip(*map(draw, images.chunk(2), index.chunk(2), (2, 2)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(whole, ranks, strict=True))
    for other in (
        draw(images, index, 3),
        TwoViews("barlow_twins", 11, seed=5)(images, index, 2),
        draw(images, index + 1, 2),
    ):
        assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    same = draw(images[:1].repeat(5, 1, 1, 1), torch.arange(5))
    assert len({tuple(v.flatten().tolist()) for views in same for v in views}) == 10


class Views(torch.utils.data.Dataset):
    """Views made in a DataLoader's workers."""

    def __init__(self, images):
        self.images, self.draw = images, TwoViews("simclr", 9)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.draw(self.images[i], torch.tensor([i]))


def test_views_do_not_depend_on_workers():
    images = images_of(3, n=6).cpu()
    together = TwoViews("simclr", 9)(images, torch.arange(6))
    for workers in (0, 2):
        batches = list(DataLoader(Views(images), batch_size=4, num_workers=workers))
        for i, view in enumerate(together):
            assert torch.equal(torch.cat([batch[i] for batch in batches]), view)


def test_without_numbers_torchs_generator_decides():
    images, draw = images_of(3), TwoViews("simclr", 9)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(draw(images)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_transform_of_one_image():
    draw = TwoViews("simclr", 9)
    pixels = images_of(3, n=1)[0].cpu()
    number = torch.tensor([3])
    expected = [view[0] for view in draw(pixels[None], number)]
    pillow = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for image in (pixels, pillow, pillow.convert("RGBA")):
        got = draw(image, number)
        assert isinstance(got, list) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert draw(pillow.convert("L"))[0].shape == (1, 9, 9)
    data = TensorDataset(torch.arange(4))
    loader = DataLoader(
        data, 2, collate_fn=lambda items: torch.utils.data.default_collate([draw(pillow) for _ in items])
    )
    assert all(view1.shape == view2.shape == (2, 3, 9, 9) for view1, view2 in loader)


def test_multi_crop_and_other_options():
    images, index = images_of(3, n=4), torch.arange(4)
    local = replace(POLICIES["simclr"], crop_area=(0.05, 0.14))
    draw = TwoViews(["simclr", local, "simclr", local], [12, 7, 12, 7], dtype=torch.bfloat16)
    found = draw(images, index)
    assert [tuple(v.shape) for v in found] == [(4, 3, s, s) for s in (12, 7, 12, 7)]
    assert all(v.dtype == torch.bfloat16 and v.is_contiguous(memory_format=torch.channels_last) for v in found)
    assert torch.equal(found[2], TwoViews("simclr", 12, views=3, dtype=torch.bfloat16)(images, index)[2])
    assert len(TwoViews("simclr", 9, views=1)(images, index)) == 1
    plain = TwoViews(
        Policy(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, strength=0, gray=0, blur=0), 8, **PLAIN[3]
    )
    square = images_of(3, 16, 16)
    for view in plain(square, index[:2]):
        assert (view - TF.resize(square / 255, [8, 8], antialias=True)).abs().max() < 1e-5


def test_memory_is_that_of_the_views():
    from benches.memory import extra_memory

    if DEVICE == "cuda" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("measures the memory of a Linux process")
    images, index = images_of(3, 32, 32, n=4096), torch.arange(4096)
    torch.use_deterministic_algorithms(False)
    draw = TwoViews("simclr", 32)
    draw(images[:2], index[:2])
    output = 2 * 4096 * 3 * 32 * 32 * 4 / 1e6
    assert extra_memory(lambda: draw(images, index)) < 1.2 * output + 20


# ---- bad input


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"images": lambda x: x.float()}, TypeError, r"images: got torch.float32, allowed: torch.uint8 .*ToTensor"),
        ({"images": lambda x: x[:, :2]}, ValueError, r"images: got shape \(2, 2, 23, 31\).*C of 1 or 3"),
        ({"images": lambda x: x[0]}, ValueError, r"images: got shape \(3, 23, 31\)"),
        ({"images": lambda x: x[:, :, :0]}, ValueError, "at least 1 pixel"),
        ({"images": lambda x: x.cpu().numpy()}, TypeError, "images: got ndarray"),
        ({"params": lambda p: p[:, :4]}, ValueError, r"params: got shape \(2, 4\), allowed: \(V, 15\)"),
        ({"params": lambda p: p[:1]}, ValueError, "a multiple of the 2 images"),
        ({"params": lambda p: p.double()}, TypeError, "params: got torch.float64"),
        ({"size": lambda _: 0}, ValueError, "size: got 0"),
        ({"dtype": lambda _: torch.float64}, TypeError, "dtype: got torch.float64"),
        ({"mean": lambda _: [0.5]}, ValueError, r"mean: got \[0.5\], allowed: 3 finite numbers"),
        ({"mean": lambda _: 0.5}, ValueError, r"mean: got \[0.5\], allowed: 3 finite numbers"),
        ({"mean": lambda _: torch.zeros(2)}, ValueError, r"mean: got \[0.0, 0.0\], allowed: 3 finite numbers"),
        ({"std": lambda _: [1, 1, 0]}, ValueError, "std: got .*above 0"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"images": images_of(3), "params": rows(), "size": 8, "dtype": torch.float32, "mean": None, "std": None}
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(error, match=message):
        two_views(given.pop("images"), given.pop("params"), given.pop("size"), **given)


BAD_ROWS = [
    ({"top": 1}, "row 1 has top 1, .*a crop within its image; the image is 23 x 31 pixels"),
    ({"left": -1}, "a crop within its image"),
    ({"height": 0}, "a crop of at least 1 pixel"),
    ({"order": 24}, "an order from 0 to 23"),
    ({"contrast": -0.1}, "factors from 0 up"),
    ({"hue": 0.6}, "a hue within -0.5 to 0.5"),
    ({"sigma": 1, "kernel": 4}, "a blur within the view"),
    ({"sigma": 1, "kernel": 17}, "kernel odd, below 2 size"),
    ({"brightness": math.nan}, "not finite"),
]


@pytest.mark.parametrize("drawn, message", BAD_ROWS)
def test_bad_rows(drawn, message):
    images, params = images_of(3), torch.cat([rows(1), rows(1, **drawn)])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=f"params: .*{message}"):
            two_views(images, params, 8)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_bad_rows_below_the_checks_read_nothing_outside(backend):
    """As on a GPU, where values are not looked at: other views, and those of the good rows."""
    images, bad = (
        images_of(3, 4, 5, n=1),
        {"top": 9, "left": math.nan, "height": 1e30, "width": -3, "sigma": 1, "kernel": 99},
    )
    params = torch.cat([rows(1, **(bad if row else {"height": 4, "width": 5})) for row in range(2)])
    got = torch.ops.ssl_fast.two_views(images, None, params, 3, 8, *PLAIN[3].values(), torch.float32, backend=backend)
    assert got.isfinite().all() and torch.equal(got[:1], views(images, params[:1], 8, backend))


@pytest.mark.parametrize(
    "table, message",
    [
        ([[0, 4, 4], [48, 4, 5]], "image of 4 x 5 pixels at 48 in row 1.*within the 96 bytes"),
        ([[-1, 4, 4]], "at -1 in row 0"),
        ([[0, 0, 4]], "0 x 4 pixels"),
        ([[0, 2**62, 4]], "allowed: at least 1 x 1"),
        ([[97, 1, 1]], "at 97"),
    ],
)
def test_tables_beyond_the_buffer(table, message):
    data = torch.zeros(96, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        PackedImages(data, torch.tensor(table))
    if DEVICE == "cpu":  # the operator itself
        params = rows(len(table), height=1, width=1)
        with pytest.raises(RuntimeError, match="does not lie in a buffer of 96 bytes"):
            torch.ops.ssl_fast.two_views(
                data, torch.tensor(table), params, 3, 4, *PLAIN[3].values(), torch.float32, backend="native"
            )


def test_bad_packs_policies_and_views():
    with pytest.raises(TypeError, match="data: got torch.float32"):
        PackedImages(torch.zeros(3), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"table: got torch.int32 \(1, 3\)"):
        PackedImages(torch.zeros(3).byte(), torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"images: got torch.uint8 \(1, 4, 4\) on cpu at 1, allowed: torch.uint8 \(3"):
        PackedImages.of([torch.zeros(3, 4, 4).byte(), torch.zeros(1, 4, 4).byte()])
    with pytest.raises(ValueError, match="images: got none"):
        PackedImages.of([])
    for given, message in (
        ({"crop_area": (1.5, 2.0)}, r"crop_area: got \(1.5, 2.0\), allowed: two numbers above 0.*up to 1.0"),
        ({"crop_area": (0.0, 0.0)}, "crop_area"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"sigma": (0.0, 1.0)}, "sigma"),
        ({"crop_area": 0.5}, "crop_area: got 0.5, allowed: two numbers"),
        ({"blur": 1.1}, "blur: got 1.1, allowed: 0 to 1"),
        ({"hue": 0.6}, "hue: got 0.6, allowed: 0 to 0.5"),
        ({"strength": -1.0}, "strength"),
        ({"flip": "0.5"}, "flip: got '0.5', allowed: 0 to 1"),
        ({"rotate": None}, "rotate: got None, allowed: 0 to 180"),
        ({"sigma": ("a", "b")}, r"sigma: got \('a', 'b'\), allowed: two numbers"),
        ({"second": "simclr"}, "second: got 'simclr', allowed: a Policy"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Policy(**given)
    with pytest.raises(ValueError, match="did you mean 'simclr'"):
        TwoViews("simcrl")
    with pytest.raises(ValueError, match="size: got .*one for each of the policies"):
        TwoViews(["simclr"] * 3, [8, 8])
    with pytest.raises(ValueError, match=r"index: got shape \(3,\), allowed: \(2,\)"):
        TwoViews("simclr", 8)(images_of(3), torch.arange(3))
    with pytest.raises(TypeError, match="images: got str"):
        TwoViews("simclr", 8)("image.png")
    with pytest.raises(TypeError, match="images: got torch.float32"):
        TwoViews("simclr", 8)(images_of(3)[0] / 255)
    for size in (16.0, 0, True, [8, "8"]):
        with pytest.raises(ValueError, match="size: got .*whole numbers from 1 up"):
            TwoViews("simclr", size)
    with pytest.raises(TypeError, match="augment: got None"):
        TwoViews(None, 8)
    with pytest.raises(TypeError, match="index: got torch.float32, allowed: integers"):
        TwoViews("simclr", 8)(images_of(3), torch.tensor([0.2, 0.4]))
    for key in ({"epoch": -1}, {"seed": 2**32}, {"seed": None}, {"seed": 1.5}):
        with pytest.raises(ValueError, match="allowed: whole numbers from 0 to"):
            sample_view_params(torch.arange(2), 8, 8, "simclr", size=8, **key)
    with pytest.raises(ValueError, match="height, width: got 0, 8"):
        sample_view_params(torch.arange(2), 0, 8, "simclr", size=8)


@pytest.mark.parametrize("ratio, side", [((100, 200), 32), ((0.001, 0.002), 32), ((3, 4), 1)])
def test_a_crop_that_no_image_holds(ratio, side):
    with pytest.raises(ValueError, match=rf"crop_ratio: got .* which no crop of an image of {side} x {side} pixels"):
        sample_view_params(torch.arange(9), side, side, Policy(crop_ratio=ratio), size=8)


def test_a_single_image_takes_its_number():
    views, image = TwoViews("simclr", 8), images_of(3)[0]
    for index in (3, [3], torch.tensor(3)):
        assert torch.equal(views(image, index)[0], views(image[None], torch.tensor([3]))[0][0])


def test_no_read_or_write_out_of_bounds(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root, include, program = Path(__file__).parents[1], Path(torch.__file__).parent / "include", tmp_path / "views"
    cpu = Path("/proc/cpuinfo")
    wide = cpu.exists() and " avx2 " in cpu.read_text() and " f16c " in cpu.read_text()
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-Wno-psabi",
        "-DTORCH_STABLE_ONLY",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", *(["-mavx2", "-mfma", "-mf16c"] * wide)]
    command += [f"-I{path}" for path in (root / "csrc", include, include / "torch/csrc/api/include")]
    subprocess.run([*command, str(root / "tests/two_views_on_host.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr[-4000:]
