"""Every Triton kernel compiles ahead of time for sm_80, sm_90 and sm_100, without spills and within shared memory.

The launchers themselves say what to compile: a process without the interpreter runs them on CPU tensors with the
launch replaced by a recorder, so that the signatures and configurations tested are those that a GPU would get.
By hand, with every row of the tables: python tests/test_aot.py 90 all
"""

import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may take
MATRIX_KERNELS = {"_fwd_kernel", "_bwd_kernel", "_one_pass_kernel", "_columns_kernel", "_rows_kernel"}


def launch_nt_xent(module, complete):
    """Both launchers over the dtypes, the widths that select a row of the tables, and both paths."""
    import torch

    matmul = torch.backends.cuda.matmul
    cases = [
        (torch.bfloat16, 128, True, "ieee"),
        (torch.float16, 256, True, "ieee"),
        (torch.float32, 128, True, "tf32"),
    ]
    cases += [(torch.bfloat16, 768, True, "ieee")]  # the chunked path
    if complete:
        half, full = (torch.float16, torch.bfloat16), (torch.float32,)
        cases += [(d, w, n, "ieee") for d in half for w in (64, 128, 256) for n in (True, False)]
        cases += [(d, w, n, "tf32") for d in full for w in (64, 128, 256) for n in (True, False)]
    N = 512
    rows = torch.zeros(2 * N)
    for dtype, width, normalize, precision in cases:
        matmul.fp32_precision = precision
        z = torch.zeros(N, width, dtype=dtype)
        module.nt_xent_fwd(z, z, torch.tensor(0.1), normalize, 1)
        module.nt_xent_bwd(rows, rows, z, z, torch.tensor(0.1), rows, rows, normalize)


def launch_info_nce(module, complete):
    """All launchers over the dtypes, what rows may not see, and both paths; the fused one over its tables."""
    import torch

    matmul = torch.backends.cuda.matmul
    N, K = 256, 512
    ids = torch.zeros(N, dtype=torch.int64), torch.zeros(K, dtype=torch.int64)
    hidden = [(None, None, None), (None, None, 0), (*ids, None), (*ids, 0)]
    rows, columns, t = torch.zeros(6, N), torch.zeros(4, K), torch.tensor(0.1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = torch.zeros(N, 64, dtype=dtype), torch.zeros(K, 64, dtype=dtype)
        for seen in hidden:
            for normalize in (True, False):
                module.info_nce_fwd(x, y, t, *seen, normalize, True)
                for column in (columns[0], None):
                    module.info_nce_bwd(rows[0], column, x, y, t, rows[:4], columns, *seen, normalize)
        module.sup_con_fwd(x, ids[0], None, t, True)
        module.sup_con_bwd(rows[0], rows[0], x, ids[0], None, t, rows, True)
    cases = [(torch.bfloat16, 128, hidden[0]), (torch.float16, 256, hidden[3]), (torch.float32, 128, hidden[0])]
    if complete:
        widths = (50, 64, 100, 128, 200, 256)
        cases += [(d, w, h) for d in (torch.float32, torch.bfloat16, torch.float16) for w in widths for h in hidden]
    matmul.fp32_precision = "tf32"
    for dtype, width, seen in cases:
        x, y = torch.zeros(N, width, dtype=dtype), torch.zeros(K, width, dtype=dtype)
        for normalize in (True, False) if complete else (True,):
            module.info_nce_one_pass(x, y, t, *seen, normalize)


def launch_barlow_twins(module, complete):
    """Both launchers over the dtypes, with and without gradients, one process's rows and others', and both paths."""
    import torch

    cases = [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
    for dtype, precision in cases + [(torch.float16, "ieee")] * complete:
        torch.backends.cuda.matmul.fp32_precision = precision
        z, on = torch.zeros(256, 512, dtype=dtype), torch.zeros(512)
        for gradients in (True, False) if complete else (True,):
            module.barlow_twins_columns(z[:, :128], z, on[:128] if gradients else None, 128, 0.1, 0.1, gradients)
            module.barlow_twins_rows(z, z, None, None, on if gradients else None, 0.1, 0.1, gradients)
            module.barlow_twins_rows(z, z, z, z, None, 0.1, 0.1, gradients)


def launch_ema(module, complete):
    """The launcher with a momentum of each dtype, on and off the 16-byte grid, with stochastic rounding and without."""
    import torch

    count = torch.zeros(3, dtype=torch.int64)
    for at in (0, 1):
        target, copy = torch.zeros(4096)[at:], torch.zeros(4096, dtype=torch.bfloat16)[at:]
        for dtype in (torch.float32, torch.float64) if complete else (torch.float64,):
            for seed in (None, count[0]):
                momentum = torch.tensor(0.9, dtype=dtype)
                module.ema_update_([target, count], [target, count], momentum, 1, [copy], seed)


def launch_batch_norm(module, complete):
    """What a ResNet runs in channels_last, another activation on planes, and the other sources of statistics."""
    import torch

    def launch(dtype, activation, residual, momentum, last, splits=1, running=True):
        x = torch.zeros(8, 64, 14, 14, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        residual = x if residual else None
        by_sign = residual is not None and activation in (1, 2)
        options = (True, momentum, 1e-5, splits, activation, by_sign)
        statistics = (w, w, count if momentum is None else None) if running else (None, None, None)
        _, stats, mask = module.batch_norm_fwd(x, residual, w, w, *statistics, None, *options)
        mask = mask if by_sign else None
        module.batch_norm_bwd(x, x, residual, mask, w, w, stats, None, True, activation, True, by_sign)
        return x

    w, count = torch.zeros(64), torch.tensor(1)
    x = launch(torch.bfloat16, 1, True, 0.1, True)
    launch(torch.float16, 4, False, None, False)
    for last in (True, False):  # an instance norm
        launch(torch.bfloat16, 1, last, 0.1, last, splits=8, running=False)
    module.batch_norm_stats(x, 2)
    module.batch_norm_(x, None, w, None, w, w, None, None, False, 0.1, 1e-5, 1, 0)
    if complete:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for activation, residual, last in itertools.product(range(5), (True, False), (True, False)):
                launch(dtype, activation, residual, 0.1, last)
                launch(dtype, activation, residual, 0.1, last, splits=8, running=False)


def launch_layer_norm(module, complete):
    """Rows of a ViT, wider ones that take two sweeps, and the channels of images in both formats."""
    import torch

    def launch(dtype, shape, channels, activation, residual, layout=torch.contiguous_format):
        x = torch.zeros(shape, dtype=dtype)
        x = x.contiguous(memory_format=layout) if len(shape) == 4 else x
        width = shape[1]
        w, residual = torch.zeros(width), x if residual else None
        _, stats = module.layer_norm_fwd(x, residual, w, w, width, channels, 1e-5, activation)
        through = activation != 0
        saved = (x, x, residual if through else None, w, w, stats, width, channels, activation)
        module.layer_norm_bwd(*saved, True, through, True)

    planes = (4, 96, 14, 14)
    launch(torch.bfloat16, (64, 768), False, 0, False)
    launch(torch.float32, (64, 4096), False, 0, False)
    launch(torch.bfloat16, (8, 16384), False, 1, True)
    launch(torch.float16, planes, True, 0, False)
    launch(torch.float32, (4, 768, 14, 14), True, 4, True)
    if complete:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for activation, residual in itertools.product(range(5), (True, False)):
                for width in (3, 65, 384, 1024, 1025, 4097, 8192, 65537):
                    launch(dtype, (64, width), False, activation, residual)
                for layout in (torch.contiguous_format, torch.channels_last):
                    launch(dtype, planes, True, activation, residual, layout)


def launch_conv_bn(module, complete):
    """A weight, a bias and a copy: every table has the same signature."""
    import torch

    weight, vector, count = torch.zeros(8, 4, 3, 3), torch.zeros(8), torch.zeros(3, dtype=torch.int64)
    module.conv_bn_fold_([weight, vector, count], [weight, vector, count], [vector] * 4, [1e-5], [0])


def launch_two_views(module, complete):
    """Views of a batch in both formats and of packed images, in each dtype and of either number of channels."""
    import torch

    table = torch.zeros(2, 3, dtype=torch.int64)
    flat, params = torch.zeros(4096, dtype=torch.uint8), torch.zeros(4, 15)
    cases = [(torch.bfloat16, 3, 224), (torch.float32, 1, 28)]
    if complete:
        cases = [
            (d, c, s) for d in (torch.float32, torch.bfloat16, torch.float16) for c in (1, 3) for s in (8, 32, 224)
        ]
    for dtype, channels, size in cases:
        batch = torch.zeros(2, channels, 16, 16, dtype=torch.uint8)
        for images, rows in ((batch, None), (batch.contiguous(memory_format=torch.channels_last), None), (flat, table)):
            module.two_views(images, rows, params, channels, size, [0.5] * channels, [0.25] * channels, dtype)


LAUNCHES = {
    "nt_xent": launch_nt_xent,
    "info_nce": launch_info_nce,
    "barlow_twins": launch_barlow_twins,
    "ema": launch_ema,
    "batch_norm": launch_batch_norm,
    "layer_norm": launch_layer_norm,
    "conv_bn": launch_conv_bn,
    "two_views": launch_two_views,
}


# ---- in the process without the interpreter


def kernel_modules():
    import importlib

    stems = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    return [importlib.import_module(f"ssl_fast.kernels.{stem}") for stem in stems]


def record(arch, complete):
    """(kernel, its arguments by name, its options) of each different launch, with the tables' rows for an arch."""
    import importlib

    from triton.runtime.jit import JITFunction

    launches, names = {}, set()

    def recorder(kernel, *args, grid, warmup, **options):
        bound = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        arguments = {name: bound.pop(name) for name in kernel.arg_names}
        options = {name: value for name, value in bound.items() if name not in kernel.arg_names}
        source = ast_source(kernel, arguments)
        key = kernel.__module__, kernel.__name__, str((source.signature, source.constants, source.attrs, options))
        launches.setdefault(key, (kernel, source, options, describe(arguments, options)))

    JITFunction.run = recorder
    for stem, launch in LAUNCHES.items():
        module = importlib.import_module(f"ssl_fast.kernels.{stem}")
        module.arch = lambda device: arch
        launch(module, complete)
    for module in kernel_modules():
        names |= {name for name, f in vars(module).items() if isinstance(f, JITFunction) and name.endswith("_kernel")}
    missed = names - {kernel.__name__ for kernel, *_ in launches.values()}
    assert not missed, f"kernels that no launch in tests/test_aot.py reaches: {missed}"
    return list(launches.values())


def ast_source(kernel, arguments):
    """The specialisation that a launch would compile: None and 1 are constants, multiples of 16 are known as such."""
    import torch
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
    pointers |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, attrs = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value = arguments[param.name]
        is_tensor = isinstance(value, torch.Tensor)
        specialise = not param.do_not_specialize
        if param.is_constexpr or value is None or (specialise and not is_tensor and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        signature[param.name] = pointers[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
        if specialise and not isinstance(value, float) and (value.data_ptr() if is_tensor else value) % 16 == 0:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attrs)


def describe(arguments, options):
    import torch

    dtype = next(str(v.dtype).removeprefix("torch.") for v in arguments.values() if isinstance(v, torch.Tensor))
    shown = (
        "NORMALIZE",
        "BLOCK_M",
        "BLOCK_N",
        "DP",
        "D",
        "INNERMOST",
        "ACTIVATION",
        "VECTOR",
        "BLOCK_R",
        "BLOCK_K",
        "BLOCK_D",
        "PLANES",
    )
    sizes = " ".join(f"{name}={int(arguments[name])}" for name in shown if name in arguments)
    return dtype, f"{sizes} " + " ".join(f"{name}={value}" for name, value in options.items())


def compile_launch(launch, arch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    kernel, source, options, (dtype, configuration) = launch
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = f"sm_{arch}" + ("a" if arch >= 90 else "")
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "configuration": configuration,
        "registers": int(re.findall(r"Used (\d+) registers", log)[-1]),
        "shared": compiled.metadata.shared,
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        "wgmma": ptx.count("wgmma.mma_async"),
    }


_recorded: list = []  # inherited by the forked workers: kernels do not pickle


def _compile_recorded(job):
    return compile_launch(_recorded[job[0]], job[1])


def main(archs, complete):
    import multiprocessing

    jobs = []
    for arch in archs:
        seen: Counter[str] = Counter()
        for launch in record(arch, complete):
            kernel = launch[0].__name__
            seen[kernel] += 1
            if not complete and arch != 90 and seen[kernel] % 3 != 1:
                continue  # every third variant of each kernel; all of them for the chip that has tables
            jobs.append((len(_recorded), arch))
            _recorded.append(launch)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        rows = list(pool.map(_compile_recorded, jobs))
    for (_, arch), row in zip(jobs, rows, strict=True):
        print(json.dumps({"arch": arch, **row}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main([int(arch) for arch in sys.argv[1].split(",")], "all" in sys.argv[2:])


# ---- the test


def test_every_kernel_compiles():
    """For the chip at hand, or for all where there is none."""
    import torch
    from common import DEVICE
    from ssl_fast.kernels._common import arch

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    archs = ARCHS if DEVICE == "cpu" else (arch(torch.device(DEVICE)),)
    command = [sys.executable, inspect.getfile(inspect.currentframe()), ",".join(map(str, archs))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        print(*(f"{name}={value}" for name, value in row.items()))
    assert {row["arch"] for row in rows} == set(archs)
    spilled = [row for row in rows if row["spills"]]
    assert not spilled, spilled
    too_big = [row for row in rows if row["shared"] > SHARED[row["arch"]]]
    assert not too_big, too_big
    matrix = [r for r in rows if r["arch"] == 90 and r["kernel"] in MATRIX_KERNELS and r["dtype"] != "float32"]
    assert bool(matrix) == (90 in archs) and all(row["wgmma"] for row in matrix), matrix
