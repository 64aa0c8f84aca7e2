"""One model trained by several processes: what one process makes of the same batches, and nothing left behind.

On the CPU, where sums go by Gloo: two ranks are this process and one more, started once for this file's first tests.
"""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tiny_federation import SIDE, task_for, tiny_pack, tiny_workplace

from clients.local_update import train
from common.errors import TrainingFailed, UserError
from common.models.recogniser import build_recogniser
from common.protocol.codec import decode
from common.protocol.parameters import flatten
from common.settings import Settings
from common.training import rank_processes
from common.training.compute import Compute
from common.training.gradient_shares import GradientShares
from common.training.loop import make_optimiser, train_epochs, warm_up_head
from tests.tiny_settings import changed

ROOT = Path(__file__).parents[2]
ONE = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)
TWO = dataclasses.replace(ONE, others=("cpu",))
PLAIN = {
    "model__backbone": "cnn",
    "model__embedding_size": 16,
    "model__width": 0.25,
    "model__head_scale": 8.0,
    "model__head_margin": 0.1,
    "data__image_size": SIDE,
    "training__batch_size": 7,
    "augmentation__rotation_rad": 0.2,
}
VIT = {"model__backbone": "vit_tiny", "model__patch_size": 8, "model__depth": 2, "model__width": 0.125}
CASES = {
    "convolutions and batch normalisation": {},
    "channels last, in parts": {"training__accumulate": 2, "training__memory_format": "channels_last"},
    "group normalisation": {"model__norm": "group"},
    "the last block alone": {"training__trainable": "last_block"},
    "AdamW": {"training__optimiser": "adamw", "training__lr": 1e-3},
    "dropout": {"model__dropout": 0.5},
    "batch-hard triplets, identity vectors kept apart": {"training__triplet": 1.0, "training__spreadout": 0.1},
    "a sample of the head": {"model__head_sample": 0.5, "training__optimiser": "adamw", "training__lr": 1e-3},
    "a softmax head that was warmed up": {"model__head": "softmax", "training__head_warmup_epochs": 1},
    "activation checkpointing": {"training__activation_checkpointing": True},
    "GLCA": VIT | {"model__attention": "glca"},
}
# A normalisation behind them takes these away again: their gradient is 0 but for rounding, and AdamW's step is of it.
OF_NO_EFFECT = ("trunk.blocks.3.1.bias", "trunk.encoder.ln.bias", "glca.ln.bias")


@pytest.fixture(scope="module", autouse=True)
def _ended():
    yield
    rank_processes._end()


def settings_of(**values):
    return changed(Settings(), **(PLAIN | values))


def trained(settings, compute, *, epochs=2, pack=None, shares=None):
    """A model after so many epochs, apart as rounds are, so that the optimiser's state goes along; their sums."""
    pack = pack or tiny_pack("alpha")
    compute = dataclasses.replace(compute, memory_format=settings.training.memory_format.replace("auto", "contiguous"))
    recogniser = build_recogniser(
        settings.model, num_people=pack.num_classes, image_size=SIDE, backbone_seed=1, head_seed=2
    )
    same = {"settings": settings, "compute": compute, "stream_name": "alpha"}
    sums = [warm_up_head(recogniser, pack, **same)]
    optimiser = make_optimiser(recogniser, settings.training)
    for epoch in range(epochs):
        part = range(epoch, epoch + 1)
        sums.append(train_epochs(recogniser, optimiser, pack, epochs=part, total_epochs=epochs, shares=shares, **same))
    return recogniser, sums


def apart(one, other, start):
    """How far two models are apart, as a part of what training moved a tensor: the largest of all tensors."""
    others, before = other.state_dict(), start.state_dict()
    return max(
        float((tensor - others[name]).norm() / (tensor - before[name]).norm().clamp_min(1e-30))
        for name, tensor in one.state_dict().items()
        if tensor.is_floating_point() and not name.endswith(OF_NO_EFFECT)
    )


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_model_that_one_makes(case):
    """24 pictures in batches of 6, in parts of 3, so that the ranks' parts differ in size; sums in another order."""
    settings = settings_of(**CASES[case])
    start, _ = trained(settings_of(**CASES[case] | {"training__head_warmup_epochs": 0}), ONE, epochs=0)
    alone, sums = trained(settings, ONE)
    both, sums_of_both = trained(settings, TWO)
    assert apart(alone, both, start) < 2e-3
    for own, theirs in zip(sums, sums_of_both, strict=True):
        assert (theirs.num_pictures, theirs.num_steps, theirs.num_warmup_steps) == (
            own.num_pictures,
            own.num_steps,
            own.num_warmup_steps,
        )
        assert theirs.loss_sum == pytest.approx(own.loss_sum, rel=1e-4)
        assert theirs.gradient_norm_sum == pytest.approx(own.gradient_norm_sum, rel=1e-3)
    counted = [(n, t) for n, t in alone.state_dict().items() if n.endswith("num_batches_tracked")]
    assert all(torch.equal(both.state_dict()[name], tensor) for name, tensor in counted)


def test_a_rounds_answer_is_that_of_one_device(tmp_path):
    """A site's whole part of a round, with FedProx, whose pull is worked out by each process; private state is kept."""
    settings = settings_of(federation__strategy="fedprox", federation__proximal_mu=1.0, federation__local_epochs=1)
    answers = {}
    for device in ("cpu", "cpu,cpu"):
        state = tiny_workplace(settings, tmp_path / device)
        state = dataclasses.replace(state, site=dataclasses.replace(state.site, device=device))
        model = flatten(state.recogniser.state_dict(), state.manifest)
        for number in (1, 2):
            reply = train(state, task_for(state.manifest, settings, server_round=number, threads=2), model)
        answers[device] = decode(reply.change), reply
    (change, one), (same, two) = answers.values()
    assert np.linalg.norm(change - same) < 1e-3 * np.linalg.norm(change)
    assert two.train["num_pictures"] == one.train["num_pictures"]
    assert two.evaluations["val"].pairs.sum() == one.evaluations["val"].pairs.sum()


def test_whose_gradients_they_are_is_counted_on_all_devices():
    """What each picture gives a unit of the linear layer, where there are no places to draw signs for."""
    counted = []
    for compute in (ONE, TWO):
        shares = GradientShares(num_people=6)
        trained(settings_of(training__accumulate=2), compute, epochs=1, shares=shares)
        sums = shares.by_layer()
        names = sorted(shares._sums)
        counted.append((names, dict(zip(names, sums, strict=True))["linear"]))
    (layers, sums), (same_layers, of_both) = counted
    assert same_layers == layers
    assert float((sums - of_both).norm()) < 1e-3 * float(sums.norm())


def test_pair_wise_attention_is_among_the_pictures_of_one_device():
    settings = settings_of(**VIT, model__attention="pwca", training__batch_size=8)
    _, sums = trained(settings, TWO)
    assert np.isfinite(sums[-1].branch_loss_sums["pwca"])
    with pytest.raises(UserError, match="fewer than 2 for each"):
        trained(settings_of(**VIT, model__attention="pwca", training__batch_size=3), TWO)


def test_a_batch_that_is_too_small_for_the_devices_is_one_line():
    with pytest.raises(UserError, match=r"names 3 devices, and the smallest batch has 2 pictures.*batch_size"):
        trained(settings_of(training__batch_size=2), dataclasses.replace(ONE, others=("cpu", "cpu")))


# ---- the processes


def children():
    """The processes of other ranks."""
    return [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE and is_rank(one)]


def is_rank(process):
    return "common.training.rank_processes" in process.cmdline()


def test_what_ends_one_process_is_one_line_and_the_next_training_has_new_ones():
    trained(settings_of(), TWO, epochs=1)
    (child,) = children()
    child.suspend()  # so that it is in the middle of the next training when it is killed
    killer = threading.Timer(0.5, child.kill)
    killer.start()
    with pytest.raises(TrainingFailed, match=r"^the process of cpu was killed by signal 9, perhaps for want of memory"):
        trained(settings_of(), TWO, epochs=1)
    killer.join()
    assert not children()
    trained(settings_of(), TWO, epochs=1)
    assert len(children()) == 1


@dataclasses.dataclass
class _Here:
    """Pictures that only the process that made them can read."""

    pictures: object
    pid: int

    @property
    def shape(self):
        return self.pictures.shape

    def __getitem__(self, rows):
        return self.pictures[rows]


def test_an_error_of_another_process_is_its_line():
    pack = dataclasses.replace(
        tiny_pack("alpha"), pictures=_Here(tiny_pack("alpha").pictures, os.getpid()), key="other"
    )
    with pytest.raises(TrainingFailed, match=r"^cpu: ModuleNotFoundError: "):
        trained(settings_of(), TWO, epochs=1, pack=pack)
    assert not children()


def test_a_killed_parent_leaves_no_process():
    code = "from common.training.rank_processes import RankProcesses as R; r = R(('cpu', 'cpu')); "
    code += "print(r._children[0].pid, flush=True); import time; time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
