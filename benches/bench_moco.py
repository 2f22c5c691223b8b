"""A step of MoCo against the original's (facebookresearch/moco), written in plain PyTorch: time, and memory beside it.

Both train the same encoder from the same weights on the same batches by SGD; tests/test_moco.py holds loss and
gradients of several steps against each other, and the largest difference over the steps of this run is in the table.

`python -m benches.bench_moco` prints the table and writes the rows to benches/results.csv; `--quick` takes a small
queue and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benches import common
from ssl_fast import MoCo
from ssl_fast.backbones import ConvNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = "original's step in plain PyTorch"


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


Shape = tuple[int, int, int]  # batch, K, pixels of a side


def models(K: int, *names: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ours = MoCo(ConvNet(1), K=K, T=0.2, mlp=True, features=128).to(DEVICE)
    built = {"ssl_fast.MoCo": ours, PLAIN: PlainMoCo.like(ours)}
    return {name: built[name] for name in names or built}


def step_of(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03, momentum=0.9)

    def step() -> Tensor:
        loss = model(*images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def bench(shape: Shape, seconds: float) -> list[common.Row]:
    N, K, size = shape
    images = torch.randn(2, N, 1, size, size, device=DEVICE)
    steps = {name: step_of(model, images) for name, model in models(K).items()}
    losses: dict[str, list[Tensor]] = {name: [] for name in steps}

    def recorded(name: str) -> Callable[[], None]:
        return lambda: losses[name].append(steps[name]())

    measured = common.interleave({name: recorded(name) for name in steps}, seconds=seconds)
    same = torch.tensor([[float(x) for x in losses[name][:5]] for name in (PLAIN, *steps)])
    rows = []
    for name, times in measured.items():
        row = {"op": "moco", "shape": f"N {N} K {K} {size}x{size}", "dtype": "float32", "provider": name}
        row |= {"allocator": "default", **common.timing(times)}
        row["extra_mb"] = common.in_fresh_process("benches.bench_moco", ["--memory", name, *map(str, shape)])
        row["error"] = float(((same[1 + list(steps).index(name)] - same[0]) / same[0]).abs().max())
        rows.append(row)
    return [row | {"ratio": row["ms"] / rows[-1]["ms"], "to": PLAIN} for row in rows]


def peak(name: str, shape: Shape) -> float:
    """MB that the first step of this process adds."""
    N, K, size = shape
    images = torch.randn(2, N, 1, size, size, device=DEVICE)
    return common.extra_memory(step_of(models(K, name)[name], images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small queue, nothing written")
    parser.add_argument("--memory", nargs=4, metavar=("MODEL", "N", "K", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        name, N, K, size = args.memory
        print(json.dumps(peak(name, (int(N), int(K), int(size)))))
        return
    shapes: list[Shape] = [(32, 1024, 8)] if args.quick else [(256, 65536, 8), (256, 65536, 28)]
    print(f"A MoCo step on {common.device_name()}, {torch.get_num_threads()} threads")
    conditions, rows = common.conditions(), []
    for shape in shapes:
        rows += bench(shape, 0.3 if args.quick else 10.0)
    print(common.table(rows, ("shape", "provider", "ms", "ms_p20", "ms_p80", "ratio", "extra_mb", "error")))
    if not args.quick:
        common.save([row | conditions for row in rows])
        print(f"\n{len(rows)} rows written to {common.RESULTS}")


if __name__ == "__main__":
    main()
