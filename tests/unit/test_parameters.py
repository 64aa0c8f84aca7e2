"""Named tensors and the flat buffer: nothing is lost, and every misfit is named."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from common.protocol.parameters import Part, buffer_sha256, flatten, load_shared, manifest_of, views

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7.0), "c": torch.empty(0, 4), "d": torch.ones(2)}
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6)


def test_the_layout_is_what_the_manifest_says():
    manifest = manifest_of(STATE)
    assert [(e.name, e.shape, e.offset, e.size) for e in manifest.entries] == [
        ("a", (2, 3), 0, 6),
        ("b", (), 6, 1),
        ("c", (0, 4), 7, 0),
        ("d", (2,), 7, 2),
    ]
    assert (manifest.size, manifest.num_bytes) == (9, 36)
    np.testing.assert_array_equal(flatten(STATE, manifest), np.array([0, 1, 2, 3, 4, 5, 7, 1, 1], dtype=np.float32))
    assert json.loads(manifest.to_json())[0] == {"name": "a", "shape": [2, 3], "dtype": "float32", "offset": 0}
    assert manifest.digest == hashlib.sha256(manifest.to_json().encode()).hexdigest()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_flatten_and_views_are_inverse(shapes, seed):
    stream = torch.Generator().manual_seed(seed)
    state = {f"t{number}": torch.randn(shape, generator=stream) for number, shape in enumerate(shapes)}
    manifest = manifest_of(state)
    buffer = flatten(state, manifest)
    back = views(buffer, manifest)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_flatten_reads_any_layout_and_copies():
    turned = torch.arange(12.0).reshape(1, 3, 2, 2).to(memory_format=torch.channels_last)
    buffer = flatten({"x": turned}, manifest_of({"x": turned}))
    np.testing.assert_array_equal(buffer, np.arange(12, dtype=np.float32))
    buffer[0] = 99
    assert turned[0, 0, 0, 0] == 0


def test_views_share_the_buffer():
    buffer = np.zeros(9, dtype=np.float32)
    views(buffer, manifest_of(STATE))["d"].fill_(3.0)
    np.testing.assert_array_equal(buffer[7:], [3.0, 3.0])


def test_order_names_and_shapes_make_the_digest():
    base = manifest_of(STATE).digest
    assert manifest_of(dict(STATE)).digest == base
    assert manifest_of(dict(reversed(STATE.items()))).digest != base
    assert manifest_of({("z" if name == "a" else name): t for name, t in STATE.items()}).digest != base
    assert manifest_of(STATE | {"a": torch.zeros(3, 2)}).digest != base


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_only_float32_is_shared(dtype):
    with pytest.raises(ValueError, match="x is torch"):
        manifest_of({"x": torch.zeros(2, dtype=dtype)})


def test_a_missing_or_misshapen_tensor_is_named():
    manifest = manifest_of(STATE)
    with pytest.raises(CheckpointError, match=r"d is missing; the model needs it with shape \(2,\)"):
        flatten({name: t for name, t in STATE.items() if name != "d"}, manifest)
    with pytest.raises(CheckpointError, match=r"a is of shape \(3, 2\)"):
        flatten(STATE | {"a": torch.zeros(3, 2)}, manifest)


@pytest.mark.parametrize("buffer", [np.zeros(8, np.float32), np.zeros(9), np.zeros((9, 1), np.float32)])
def test_a_foreign_buffer_is_refused(buffer):
    with pytest.raises(CheckpointError, match="is not this model's"):
        views(buffer, manifest_of(STATE))


def test_load_shared_leaves_the_rest_alone():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    manifest = manifest_of({"0.weight": module[0].weight.detach()})
    load_shared(module, np.full(4, 0.5, dtype=np.float32), manifest)
    assert torch.equal(module[0].weight, torch.full((2, 2), 0.5))
    assert module[0].weight.requires_grad
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(module.state_dict()[name], before[name])


def test_a_part_and_the_rest_are_the_whole_and_a_change_leaves_the_rests_bits():
    manifest = manifest_of(STATE)
    last = manifest.entries[-1]
    part = Part.of(manifest, moving={last.name}, trainable={last.name})
    whole = np.linspace(-1.0, 1.0, manifest.size, dtype=np.float32)
    whole[0] = -0.0
    np.testing.assert_array_equal(part.joined(part.taken(whole), part.left(whole)), whole)
    moved = whole + part.spread(np.ones(last.size, dtype=np.float32))
    assert part.left(moved).tobytes() == part.left(whole).tobytes()
    assert (part.taken(moved) == part.taken(whole) + 1.0).all()


def test_the_models_identity_is_the_hash_of_its_little_endian_bytes():
    numbers = [1.5, -2.0, 0.1]
    expected = hashlib.sha256(struct.pack("<3f", *numbers)).hexdigest()
    assert buffer_sha256(np.array(numbers, dtype=np.float32)) == expected
    assert buffer_sha256(np.array(numbers, dtype=">f4")) == expected
    strided = np.array([1.5, 0, -2.0, 0, 0.1, 0], dtype=np.float32)[::2]
    assert buffer_sha256(strided) == expected
