"""MoCo v2 in a plain PyTorch loop with ssl_fast's parts: python examples/moco.py [EPOCHS]

Trains a ResNet-18 with the stem for small images on CIFAR-10, or, where torchvision finds no copy in ./data and cannot
download one, on random pictures, so that the loop can be tried anywhere. What is ours: the views, the key encoder's
average, the queue, the loss, and batch norm over parts of the batch. `ssl_fast.MoCo` is all of it in one module.
"""

import sys
from dataclasses import replace

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from ssl_fast import EMA, InfoNCE, KeyQueue, TwoViews
from ssl_fast.augment import POLICIES
from ssl_fast.nn import BatchNorm2d


def main(epochs=10, batch_size=256):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    augment = TwoViews(replace(POLICIES["moco_v2"], blur=0.0), 32)
    try:
        data = torchvision.datasets.CIFAR10("data", transform=augment, download=True)
    except Exception as error:
        print(f"no CIFAR-10 ({error}): random pictures")
        data = torchvision.datasets.FakeData(512, (3, 32, 32), transform=augment)
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True, num_workers=2)

    encoder = torchvision.models.resnet18(norm_layer=lambda width: BatchNorm2d(width, num_splits=8))
    encoder.conv1, encoder.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    encoder.to(device, memory_format=torch.channels_last)
    key_encoder = EMA(encoder, momentum=0.99, buffers="none")
    queue, criterion = KeyQueue(4096, 128).to(device), InfoNCE(temperature=0.2)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.06 * batch_size / 256, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        for (im_q, im_k), _ in loader:
            im_q, im_k = (im.to(device, memory_format=torch.channels_last) for im in (im_q, im_k))
            shuffle = torch.randperm(len(im_k), device=device)  # so that a key shares its statistics with other images
            k = F.normalize(key_encoder(im_k[shuffle])[shuffle.argsort()])
            loss = criterion(encoder(im_q), k, queue.keys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            key_encoder.update(encoder)
            queue.enqueue(k)
        print(f"epoch {epoch}: loss {loss.item():.4f}", flush=True)
    torch.save({k: v for k, v in encoder.state_dict().items() if not k.startswith("fc.")}, "encoder.pt")


if __name__ == "__main__":
    main(epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 10)
