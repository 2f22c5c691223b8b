"""SimCLR in a plain PyTorch loop with ssl_fast's views and loss: python examples/simclr.py [EPOCHS]

Trains a ResNet-18 with the stem for small images on CIFAR-10, or, where torchvision finds no copy in ./data and cannot
download one, on random pictures, so that the loop can be tried anywhere. Two lines are ours: `augment` and `criterion`.
"""

import sys

import torch
import torchvision
from torch import nn

from ssl_fast import NTXentLoss, TwoViews


def main(epochs=10, batch_size=256):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    augment = TwoViews("simclr_small", 32)
    try:
        data = torchvision.datasets.CIFAR10("data", transform=augment, download=True)
    except Exception as error:
        print(f"no CIFAR-10 ({error}): random pictures")
        data = torchvision.datasets.FakeData(512, (3, 32, 32), transform=augment)
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True, num_workers=2)

    encoder = torchvision.models.resnet18()
    encoder.conv1, encoder.maxpool, encoder.fc = (
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.Identity(),
        nn.Identity(),
    )
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    model = nn.Sequential(encoder, head).to(device, memory_format=torch.channels_last)

    criterion = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06 * batch_size / 256, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        for (view1, view2), _ in loader:
            views = torch.cat([view1, view2]).to(device, memory_format=torch.channels_last)
            loss = criterion(*model(views).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.4f}", flush=True)
    torch.save(encoder.state_dict(), "encoder.pt")


if __name__ == "__main__":
    main(epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 10)
