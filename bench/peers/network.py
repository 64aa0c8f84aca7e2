"""What all peers share: the network, the pictures as arrays, and training and scoring as a plain PyTorch user does."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 36


class Network(nn.Module):
    """Pictures [B, 3, 64, 64] -> logits [B, 36]: FaceFed's own ResNet-18 with a linear layer on its embedding."""

    def __init__(self) -> None:
        super().__init__()
        from common.models.recogniser import build_backbone
        from common.settings import ModelSettings

        self.backbone = build_backbone(ModelSettings(backbone="resnet18", width=1.0, embedding_size=512), 64)
        self.classifier = nn.Linear(512, NUM_CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.classifier(self.backbone(pictures))


def load(arrays: Path, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Loaders of one client's training and test pictures, float tensors in memory."""

    def loader(part: str) -> DataLoader:
        pictures = torch.from_numpy(held[f"{part}_pictures"]).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        labels = torch.from_numpy(held[f"{part}_labels"].astype(np.int64))
        return DataLoader(TensorDataset(pictures.contiguous(), labels), batch_size=batch_size, shuffle=part == "train")

    with np.load(arrays) as held:
        return loader("train"), loader("test")


def train(network: nn.Module, loader: DataLoader, lr: float, momentum: float) -> float:
    """One epoch; returns the mean loss."""
    optimiser = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum)
    network.train()
    total = 0.0
    for pictures, labels in loader:
        optimiser.zero_grad()
        loss = F.cross_entropy(network(pictures), labels)
        loss.backward()
        optimiser.step()
        total += loss.item()
    return total / len(loader)


def test(network: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Mean loss and accuracy."""
    network.eval()
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for pictures, labels in loader:
            logits = network(pictures)
            loss += F.cross_entropy(logits, labels).item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    return loss / count, correct / count
