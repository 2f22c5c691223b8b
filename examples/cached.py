"""A batch of 4,096 for SimCLR with the activations of 256 images: python examples/cached.py [STEPS]

CIFAR-10, or, where torchvision finds no copy in ./data and cannot download one, random pictures. What is ours: the
step, which replaces the forward and backward passes of the usual loop, and the loss. LARS and warm-up, which SimCLR
takes at such batches, are in `ssl-fast train ... batch_size=4096 micro_batch=256`.
"""

import sys

import torch
import torchvision
from torch import nn

from ssl_fast import NTXentLoss, TwoViews, accelerate, cached_step


def main(steps=100, batch_size=4096, micro_batch=256):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    augment = TwoViews("simclr_small", 32)
    try:
        data = torchvision.datasets.CIFAR10("data", transform=augment, download=True)
    except Exception as error:
        print(f"no CIFAR-10 ({error}): random pictures")
        data = torchvision.datasets.FakeData(batch_size, (3, 32, 32), transform=augment)
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True, num_workers=2)

    model = torchvision.models.resnet18()
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    model.to(device, memory_format=torch.channels_last)
    accelerate(model)
    criterion = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-6)
    step = 0
    while step < steps:
        for views, _ in loader:  # they stay on the host: a micro-batch at a time follows the model
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = cached_step(model, views, criterion, micro_batch)
            optimizer.step()
            step += 1
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
            if step == steps:
                break
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}, "encoder.pt")


if __name__ == "__main__":
    main(steps=int(sys.argv[1]) if len(sys.argv) > 1 else 100)
