"""GLCA, PWCA and rollout against a naive float64 version written from the paper's equations (arXiv:2205.02151).

The naive version works on one picture, one head, one query at a time, in NumPy, and shares no code with ours.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.models.dcal import GlobalLocal, class_token_rollout, pair_wise, rollout
from common.models.vit import Block, VitTrunk

DIM, HEADS, PATCHES, BATCH = 24, 3, 9, 4
Array = NDArray[np.float64]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """No bias is 0 and no scale is 1, so that forgetting one shows."""
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=stream))
    return module


def some_tokens(num: int = BATCH) -> Tensor:
    return torch.randn(num, 1 + PATCHES, DIM, generator=torch.Generator().manual_seed(6))


class Naive:
    """One block's weights as float64 arrays, and its parts for one picture."""

    def __init__(self, block: Block) -> None:
        state = {name: tensor.detach().numpy().astype(np.float64) for name, tensor in block.state_dict().items()}
        self.state = state
        self.wq, self.wk, self.wv = np.split(state["self_attention.in_proj_weight"], 3)
        self.bq, self.bk, self.bv = np.split(state["self_attention.in_proj_bias"], 3)

    def normalised(self, tokens: Array, name: str) -> Array:
        return layer_norm(tokens, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def attend(self, queries: Array, keys: Array, values: Array) -> Array:
        """softmax(Q K^T / sqrt(d)) V, head by head and query by query.  [n, D], [m, D], [m, D] -> [n, D]."""
        size = DIM // HEADS
        out = np.zeros_like(queries)
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            for row, query in enumerate(queries[:, part]):
                weights = softmax(np.array([query @ key / math.sqrt(size) for key in keys[:, part]]))
                for weight, value in zip(weights, values[:, part], strict=True):
                    out[row, part] += weight * value
        return out

    def maps(self, tokens: Array) -> Array:
        """[heads, N, N]."""
        size, seen = DIM // HEADS, self.normalised(tokens, "ln_1")
        queries, keys = seen @ self.wq.T + self.bq, seen @ self.wk.T + self.bk
        heads = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
        return np.array(
            [[softmax(keys[:, part] @ query / math.sqrt(size)) for query in queries[:, part]] for part in heads]
        )

    def rest(self, tokens: Array, attended: Array) -> Array:
        tokens = tokens + attended @ self.state["self_attention.out_proj.weight"].T
        tokens = tokens + self.state["self_attention.out_proj.bias"]
        hidden = self.normalised(tokens, "ln_2") @ self.state["mlp.0.weight"].T + self.state["mlp.0.bias"]
        hidden = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))(hidden)
        return tokens + hidden @ self.state["mlp.3.weight"].T + self.state["mlp.3.bias"]

    def __call__(self, asking: Array, asked: list[Array]) -> Array:
        """The block, where the tokens of `asking` see those of all in `asked`."""
        queries = self.normalised(asking, "ln_1") @ self.wq.T + self.bq
        seen = np.concatenate([self.normalised(tokens, "ln_1") for tokens in asked])
        return self.rest(asking, self.attend(queries, seen @ self.wk.T + self.bk, seen @ self.wv.T + self.bv))


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def layer_norm(tokens: Array, scale: Array, shift: Array) -> Array:
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + shift


def naive_rollout(maps: list[Array]) -> Array:
    """S_hat_L = S_bar_L ... S_bar_1 (eq. 2).  maps: [heads, N, N] of each block."""
    rolled = np.eye(maps[0].shape[-1])
    for heads in maps:
        rolled = (0.5 * sum(heads) / len(heads) + 0.5 * np.eye(heads.shape[-1])) @ rolled
    return rolled


def test_self_attention_is_the_naive_block() -> None:
    block = shaken(Block(DIM, HEADS))
    ours = block(some_tokens())
    for row, tokens in enumerate(some_tokens().double().numpy()):
        torch.testing.assert_close(ours[row].double(), torch.from_numpy(Naive(block)(tokens, [tokens])), **TOLERANCE)


def test_pwca_is_the_naive_one() -> None:
    """Eq. 4, at each of three blocks: what picture 1 sees of picture 2 is what PWCA made of it, too."""
    blocks = [shaken(Block(DIM, HEADS)) for _ in range(3)]
    partners = [2, 3, 1, 0]
    ours = some_tokens()
    naive = list(some_tokens().double().numpy())
    for block in blocks:
        ours = pair_wise(block, ours, torch.tensor(partners))
        naive = [Naive(block)(naive[row], [naive[row], naive[partners[row]]]) for row in range(BATCH)]
    torch.testing.assert_close(ours.double(), torch.from_numpy(np.array(naive)), **TOLERANCE)


def test_rollout_is_the_naive_one_and_so_is_its_first_row() -> None:
    trunk = shaken(VitTrunk("vit_tiny", image_size=24, patch_size=8, depth=4, width=0.125))
    pictures = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(7)) * 2 - 1
    maps = trunk.attention_maps(pictures)
    ours, row = rollout(maps), class_token_rollout([each.mean(1) for each in maps])
    for picture in range(2):
        tokens = trunk.embed(pictures)[picture].detach().double().numpy()
        seen = []
        for block in trunk.blocks:
            seen.append(Naive(block).maps(tokens))
            tokens = Naive(block)(tokens, [tokens])
        expected = torch.from_numpy(naive_rollout(seen))
        torch.testing.assert_close(ours[picture].double(), expected, **TOLERANCE)
        torch.testing.assert_close(row[picture].double(), expected[0], **TOLERANCE)


def test_glca_is_the_naive_one() -> None:
    """Eq. 3: the class token and the top third of the patches ask all tokens; the class token itself is no patch."""
    branch = shaken(GlobalLocal(DIM, HEADS, 1 / 3))
    tokens = some_tokens()
    row = torch.rand(BATCH, 1 + PATCHES, generator=torch.Generator().manual_seed(8))
    row[:, 0] = 5.0  # as in a rollout, where the class token looks at itself most
    ours = branch(tokens, row)
    scale, shift = (tensor.detach().double().numpy() for tensor in (branch.ln.weight, branch.ln.bias))
    for picture in range(BATCH):
        every = tokens[picture].double().numpy()
        best = sorted(range(1, 1 + PATCHES), key=lambda patch: -float(row[picture, patch]))[:3]
        told = layer_norm(Naive(branch.block)(every[[0, *best]], [every]), scale, shift)
        expected = torch.from_numpy(np.concatenate([told[0], told[1:].mean(0)]))
        torch.testing.assert_close(ours[picture].double(), expected, **TOLERANCE)
