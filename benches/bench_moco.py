"""A step of MoCo against the original's (facebookresearch/moco), written in plain PyTorch, and one of lightly's parts:
time, and memory beside it.

All train the same encoder from the same weights on the same batches by SGD; tests/test_moco.py holds loss and
gradients of several steps against each other, and the largest difference over the steps of this run is in the table.

The floor is the flop of the query encoder, forward and backward, of the key encoder, forward, and of the loss's two
products with the queue, at the pace of a square product of the same run.

`python -m benches.bench_moco` prints the table and writes the rows to benches/results.csv; `--profile FOLDER` leaves a
trace and a picture of one step of ours instead.
"""

from __future__ import annotations

import copy
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benches import common
from benches.common import Provider, Table
from benches.machine import DEVICE
from benches.timing import Step
from ssl_fast import MoCo
from ssl_fast.backbones import ConvNet

PLAIN, OURS, LIGHTLY = "original's step in plain PyTorch", "ssl_fast.MoCo", "lightly"


def cases(quick: bool) -> list[tuple[int, int, int]]:
    """Images, K and pixels of a side."""
    return [(32, 1024, 8)] if quick else [(256, 65536, 8), (256, 65536, 28)]


class PlainMoCo(nn.Module):
    """moco/builder.py of the original on one process: the same operations in the same order."""

    def __init__(self, encoder_q: nn.Module, K: int, dim: int, m: float, T: float) -> None:
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.encoder_q, self.encoder_k = encoder_q, copy.deepcopy(encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @classmethod
    def like(cls, model: MoCo) -> PlainMoCo:
        """With the weights and the queue of one of ours."""
        K, dim = model.queue.keys.shape
        plain = cls(copy.deepcopy(nn.Sequential(model.encoder, model.head)), K, dim, model.key.momentum, model.T)
        plain.to(model.queue.keys).queue.copy_(model.queue.keys.T)
        return plain

    def keys(self, im_k: Tensor) -> Tensor:
        return F.normalize(self.encoder_k(im_k), dim=1)

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                param_k.data = param_k.data * self.m + param_q.data * (1.0 - self.m)
            k = self.keys(im_k)
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1)
        logits /= self.T
        labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        with torch.no_grad():
            ptr = int(self.queue_ptr)
            self.queue[:, ptr : ptr + len(k)] = k.T  # type: ignore[index, operator]
            self.queue_ptr[0] = (ptr + len(k)) % self.K  # type: ignore[operator]
        return F.cross_entropy(logits, labels)


class LightlyMoCo(nn.Module):
    """The same step of lightly's loss, memory bank and average."""

    def __init__(self, plain: PlainMoCo) -> None:
        from lightly.loss import NTXentLoss

        super().__init__()
        self.encoder_q, self.encoder_k, self.m = plain.encoder_q, plain.encoder_k, plain.m
        keys = plain.queue.T.clone()  # type: ignore[operator]
        self.criterion = NTXentLoss(plain.T, memory_bank_size=tuple(keys.shape)).to(keys)
        self.criterion.memory_bank.bank = keys

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        from lightly.models.utils import update_momentum

        q = self.encoder_q(im_q)
        with torch.no_grad():
            update_momentum(self.encoder_q, self.encoder_k, self.m)
            k = self.encoder_k(im_k)
        return self.criterion(q, k)


def untrained(K: int) -> MoCo:
    return MoCo(ConvNet(1), K=K, T=0.2, mlp=True, features=128)


@cache
def flop_of_a_step(N: int, K: int, size: int) -> float:
    def query() -> nn.Module:
        model = untrained(1)
        return nn.Sequential(model.encoder, model.head)

    encoders = sum(common.flop_of(query, N, 1, size, size, backward=backward) for backward in (True, False))
    return encoders + 2 * 2.0 * N * K * 128


def model_of(name: str, K: int) -> nn.Module:
    """From the same weights and queue, whichever it is."""
    torch.manual_seed(0)
    ours = untrained(K).to(DEVICE)
    if name == OURS:
        return ours
    plain = PlainMoCo.like(ours)
    return LightlyMoCo(plain) if name == LIGHTLY else plain


def step_of(model: nn.Module, images: Tensor) -> Step:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03, momentum=0.9)

    def step() -> float:
        loss = model(*images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def setup(N: int, K: int, size: int) -> Table:
    def build(name: str, dtype: torch.dtype = torch.float32) -> Step:
        model = model_of(name, K).to(dtype)
        images = torch.randn(2, N, 1, size, size, generator=torch.Generator().manual_seed(1))
        return step_of(model, images.to(DEVICE, dtype))

    def error(name: str) -> float:
        """Of the losses of five steps, against those of the plain one in fp64."""
        steps = build(name), build(PLAIN, torch.float64)
        losses = [torch.stack([step() for _ in range(5)]) for step in steps]
        return common.relative_error(losses[:1], losses[1:])

    names = [PLAIN, OURS]
    with common.peer("lightly"):
        import lightly.loss  # noqa: F401

        names.append(LIGHTLY)
    work = flop_of_a_step(N, K, size) / common.SQUARE
    found = [Provider(p, partial(build, p), work=work, floor=common.PRODUCT, error=partial(error, p)) for p in names]
    return Table("moco", f"N {N} K {K} {size}x{size}", [*found, common.square_product()], flop=common.SQUARE)


if __name__ == "__main__":
    common.main(__doc__, cases, setup, seconds=10.0, allocators=("default",))
