"""Our residual blocks against torchvision's, and what building a network does not import."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet as theirs

from common.models import resnet as ours

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize(("num_in", "planes", "stride"), [(8, 8, 1), (16, 8, 2)])
def test_a_block_has_torchvisions_names_and_numbers(name, num_in, planes, stride):
    made = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        block = getattr(module, name)
        num_out = planes * block.expansion
        shortcut = None
        if stride != 1 or num_in != num_out:
            shortcut = torch.nn.Conv2d(num_in, num_out, kernel_size=1, stride=stride, bias=False)
        made.append(block(num_in, planes, stride, shortcut))
    mine, reference = made
    assert list(mine.state_dict()) == list(reference.state_dict())
    for key, tensor in reference.state_dict().items():
        assert torch.equal(mine.state_dict()[key], tensor), key  # drawn in the same order
    pictures = torch.randn(4, num_in, 8, 8)
    outputs = [block.train()(pictures) for block in made]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(mine.conv1.weight.grad, reference.conv1.weight.grad)


def test_a_client_starts_without_torchs_compiler():
    """It takes 1.4 s of each process's start, and comes along with torchvision."""
    code = "import sys, clients.message_handler, server.app; "
    code += "print([name for name in ('torchvision', 'torch._dynamo') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
