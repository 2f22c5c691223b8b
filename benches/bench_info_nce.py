"""InfoNCE with a queue, CLIP and SupCon, forward and backward, against plain PyTorch, their peers and one product.

`python -m benches.bench_info_nce` prints the tables and writes the rows to benches/results.csv.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import ssl_fast
from benches import common, timing
from benches.bench_nt_xent import dense_bf16_runs
from benches.common import Provider, Table
from benches.machine import DEVICE

TEMPERATURE = 0.07
# N rows, K columns, D.
SHAPES = {"info_nce": (256, 65536, 128), "clip": (4096, 4096, 512), "sup_con": (4096, 4096, 128)}
GPU_SHAPES = {"info_nce": (256, 65536, 128), "clip": (32768, 32768, 512), "sup_con": (16384, 16384, 128)}
QUICK = {"info_nce": (32, 512, 64), "clip": (128, 128, 64), "sup_con": (128, 128, 64)}
# Products of all rows and columns that a forward and backward pass needs (docs/kernels.md): CLIP's keys have a
# gradient, SupCon's similarities are symmetric.
WORK = {"info_nce": 2.0, "clip": 3.0, "sup_con": 2.0}

Loss = Callable[..., Tensor]


def cases(quick: bool) -> list[tuple[str, int, int, int]]:
    """The loss, N, K and D."""
    shapes = QUICK if quick else GPU_SHAPES if DEVICE == "cuda" else SHAPES
    return [(op, *shape) for op, shape in shapes.items()]


# ---- InfoNCE with a queue: q and k (N, D), the queue (K, D)


def moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """As MoCo writes it, its queue transposed and cloned at each step."""
    q, k = F.normalize(q), F.normalize(k)
    positive, negative = torch.einsum("nc,nc->n", q, k)[:, None], q @ queue.clone().detach()
    logits = torch.cat([positive, negative], 1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def queue_losses(queue: Tensor) -> dict[str, Loss]:
    transposed = queue.T.contiguous()
    found: dict[str, Loss] = {
        "ssl_fast": lambda q, k: ssl_fast.InfoNCE(TEMPERATURE)(q, k, queue),
        "mm + cat + cross_entropy": lambda q, k: moco(q, k, transposed),
        "torch.compile": lambda q, k: torch.compile(moco)(q, k, transposed),
    }
    with common.peer("info-nce-pytorch"):
        from info_nce import info_nce as peer

        found["info-nce-pytorch"] = lambda q, k: peer(q, k, queue, TEMPERATURE)
    with common.peer("lightly"):
        from lightly.loss import NTXentLoss

        criterion = NTXentLoss(TEMPERATURE, memory_bank_size=tuple(queue.shape)).to(queue.device)
        criterion.memory_bank.bank = queue.float().clone()  # which it fills
        found["lightly"] = criterion
    return found


# ---- CLIP: images and texts (N, D), unit rows


def dense_clip(image: Tensor, text: Tensor) -> Tensor:
    """S once, its transpose for the other direction."""
    logits, labels = image @ text.T / TEMPERATURE, torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def clip_losses() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "ssl_fast": lambda image, text: ssl_fast.CLIPLoss()(image, text, 1 / TEMPERATURE),
        "dense PyTorch": dense_clip,
        "torch.compile": torch.compile(dense_clip),
    }
    with common.peer("open_clip"):
        from open_clip.loss import ClipLoss

        criterion = ClipLoss()
        found["open_clip"] = lambda image, text: criterion(image, text, torch.tensor(1 / TEMPERATURE))
    return found | (blockwise_clip_losses() if DEVICE == "cuda" else {})


def blockwise_clip_losses() -> dict[str, Loss]:
    """Peers that refuse tensors of a CPU; both multiply in TF32 where inputs are fp32."""
    found: dict[str, Loss] = {}
    with common.peer("inf-cl"):
        from inf_cl import cal_flash_loss

        def one_way(x: Tensor, y: Tensor) -> Tensor:
            return cal_flash_loss(x, y, scale=1 / TEMPERATURE, head_dim=min(256, x.shape[1])).mean()

        found["inf-cl"] = lambda image, text: (one_way(image, text) + one_way(text, image)) / 2
    with common.peer("memeff"):
        from memeff import MemoryEfficientCLIPLoss

        # Unless told otherwise its gradients are another multiple of the loss's.
        found["memeff"] = MemoryEfficientCLIPLoss(TEMPERATURE, normalized_inputs=True, stable=False)
    return found


# ---- SupCon: embeddings (N, D)


def labels_of(z: Tensor) -> Tensor:
    """40 rows a class."""
    return torch.arange(len(z), device=z.device) % (len(z) // 40)


def dense_sup_con(z: Tensor, _: Tensor) -> Tensor:
    z, labels = F.normalize(z), labels_of(z)
    eye = torch.eye(len(z), dtype=torch.bool, device=z.device)
    alike = (labels[:, None] == labels) & ~eye
    log_p = (z @ z.T / TEMPERATURE).masked_fill(eye, -torch.inf).log_softmax(1)
    return -(log_p.masked_fill(~alike, 0).sum(1) / alike.sum(1)).mean()


def sup_con_losses() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "ssl_fast": lambda z, _: ssl_fast.SupConLoss(TEMPERATURE)(z, labels_of(z)),
        "dense PyTorch": dense_sup_con,
        "torch.compile": torch.compile(dense_sup_con),
    }
    with common.peer("pytorch-metric-learning"):
        from pytorch_metric_learning.losses import SupConLoss

        criterion = SupConLoss(TEMPERATURE)
        found["pytorch-metric-learning"] = lambda z, _: criterion(z, labels_of(z))
    return found


# ---- the tables


def inputs(op: str, N: int, K: int, D: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two tensors (N, D), the first with a gradient, and for a queue (K, D)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(N, D, generator=generator)
    b = a + torch.randn(N, D, generator=generator)
    if op == "clip":
        a, b = F.normalize(a), F.normalize(b)
    queue = F.normalize(torch.randn(K if op == "info_nce" else 1, D, generator=generator))
    a, b, queue = (x.to(DEVICE, getattr(torch, dtype)) for x in (a, b, queue))
    return a.requires_grad_(), b.requires_grad_(op == "clip"), queue


def losses(op: str, queue: Tensor) -> dict[str, Loss]:
    """By provider: ours, then plain PyTorch, then the peers."""
    return {"info_nce": lambda: queue_losses(queue), "clip": clip_losses, "sup_con": sup_con_losses}[op]()


def provider(name: str, op: str, N: int, K: int, D: int, dtype: str) -> Provider:
    def build() -> timing.Step:
        a, b, queue = inputs(op, N, K, D, dtype)
        loss = losses(op, queue)[name]

        def step() -> None:
            a.grad = b.grad = None
            loss(a, b).backward()

        return step

    def gradient(name: str, *given: Tensor) -> Tensor:
        a, b, queue = given
        a = a.detach().requires_grad_()
        return torch.autograd.grad(losses(op, queue)[name](a, b.detach()), a)[0]

    def error() -> float:
        given = inputs(op, N, K, D, dtype)
        plain = list(losses(op, given[2]))[1]
        return common.relative_error([gradient(name, *given)], [gradient(plain, *(x.double() for x in given))])

    judged = error if N <= 4096 else None
    return Provider(name, build, dtype, work=WORK[op], error=judged, compiled=name == "torch.compile")


def setup(op: str, N: int, K: int, D: int) -> Table:
    names = list(losses(op, torch.empty(1, D)))
    # As a training step has them: ours on bf16 inputs, and the plain one too where that is sane.
    kinds = [(name, "float32") for name in names]
    kinds += [(name, "bfloat16") for name in names[: 2 if dense_bf16_runs() else 1]]
    shape = f"N={N} K={K} D={D}" if op == "info_nce" else f"N={N} D={D}"
    found = [common.product_of(N, K, D), *(provider(name, op, N, K, D, dtype) for name, dtype in kinds)]
    return Table(op, shape, found, flop=2.0 * N * K * D)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=8.0)
