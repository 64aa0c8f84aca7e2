"""Private tensors and their optimiser state on the client's disk: exact, by round, and never the shared ones."""

import pytest
import torch
from tiny_federation import settings_with, tiny_workplace

from clients.private_state import load_private, prune, rounds_here, save_private
from common.errors import CheckpointError
from common.system.checkpoints import read_tensors
from common.training.loop import make_optimiser


def stepped(state, steps=2):
    """The state's recogniser and its optimiser after a few steps on noise."""
    torch.set_num_threads(1)
    recogniser, optimiser = state.recogniser, make_optimiser(state.recogniser, state.settings.training)
    generator = torch.Generator().manual_seed(5)
    recogniser.train()
    for _ in range(steps):
        optimiser.zero_grad()
        pictures = torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1
        recogniser(pictures, torch.arange(8) % 6).square().mean().backward()
        optimiser.step()
    return recogniser, optimiser


def slots(recogniser, optimiser):
    names = {parameter: name for name, parameter in recogniser.named_parameters()}
    return {(names[p], slot): value for p, of_p in optimiser.state.items() for slot, value in of_p.items()}


@pytest.mark.parametrize("normalisation", ["shared", "private"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_private_tensors_and_their_momenta_survive_exactly_and_shared_momenta_start_afresh(
    tmp_path, kind, normalisation
):
    settings = settings_with(training__optimiser=kind, model__normalisation=normalisation)
    state = tiny_workplace(settings, tmp_path)
    recogniser, optimiser = stepped(state)
    save_private(tmp_path / "s", 4, recogniser, optimiser, state.private)

    other = tiny_workplace(settings, tmp_path)
    fresh = make_optimiser(other.recogniser, settings.training)
    assert load_private(tmp_path / "s", 4, other.recogniser, fresh, other.private) == 4
    before, after = recogniser.state_dict(), other.recogniser.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in state.private)
    kept = {key: value for key, value in slots(recogniser, optimiser).items() if key[0] in state.private}
    restored = slots(other.recogniser, fresh)
    assert kept.keys() == restored.keys()
    assert kept
    assert all(torch.equal(torch.as_tensor(kept[key]), restored[key]) for key in kept)
    assert not any(name in {e.name for e in state.manifest.entries} for name, _ in restored)
    has_norm = any(name.startswith("backbone.") for name, _ in restored)
    assert has_norm == (normalisation == "private")


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_goes_on_from_the_disk_as_if_it_had_not_stopped(tmp_path, kind):
    """With everything private but nothing shared, a restored optimiser takes the very same next step."""
    settings = settings_with(training__optimiser=kind)
    state = tiny_workplace(settings, tmp_path)
    everything = tuple(state.recogniser.state_dict())
    recogniser, optimiser = stepped(state)
    save_private(tmp_path / "s", 1, recogniser, optimiser, everything)
    other = tiny_workplace(settings, tmp_path)
    restored = make_optimiser(other.recogniser, settings.training)
    load_private(tmp_path / "s", 1, other.recogniser, restored, everything)
    for model, opt in ((recogniser, optimiser), (other.recogniser, restored)):
        opt.zero_grad()
        model.train()
        model(torch.ones(4, 3, 32, 32), torch.arange(4)).square().mean().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(recogniser.parameters(), other.recogniser.parameters(), strict=True))


def test_only_private_tensors_are_in_the_file(tmp_path):
    state = tiny_workplace(settings_with(), tmp_path)
    recogniser, optimiser = stepped(state)
    save_private(tmp_path / "s", 1, recogniser, optimiser, state.private)
    tensors, _ = read_tensors(tmp_path / "s" / "round-000001.safetensors")
    assert {key.split("/")[1] for key in tensors} == set(state.private)


def test_the_newest_state_that_is_not_newer_is_taken(tmp_path):
    state = tiny_workplace(settings_with(), tmp_path)
    recogniser, optimiser = stepped(state)
    for number in (0, 3, 5):
        with torch.no_grad():
            recogniser.head.weight.fill_(float(number))
        save_private(tmp_path / "s", number, recogniser, optimiser, state.private)
    for asked, found in ((0, 0), (2, 0), (3, 3), (4, 3), (9, 5)):
        assert load_private(tmp_path / "s", asked, recogniser, None, state.private) == found
        assert recogniser.head.weight.detach().unique().tolist() == [found]
    assert load_private(tmp_path / "s", -1, recogniser, None, state.private) == -1


def test_pruning_keeps_what_is_named(tmp_path):
    state = tiny_workplace(settings_with(), tmp_path)
    recogniser, optimiser = stepped(state, steps=1)
    for number in range(6):
        save_private(tmp_path / "s", number, recogniser, optimiser, state.private)
    prune(tmp_path / "s", {0, 2, 5, 77})
    assert rounds_here(tmp_path / "s") == [0, 2, 5]


def test_no_state_leaves_the_model_alone(tmp_path):
    state = tiny_workplace(settings_with(), tmp_path)
    before = state.recogniser.head.weight.clone()
    assert load_private(tmp_path / "none", 3, state.recogniser, None, state.private) == -1
    assert torch.equal(state.recogniser.head.weight, before)


def test_a_foreign_state_is_refused_by_its_path(tmp_path):
    state = tiny_workplace(settings_with(), tmp_path)
    recogniser, optimiser = stepped(state, steps=1)
    save_private(tmp_path / "s", 1, recogniser, optimiser, state.private)
    other = tiny_workplace(settings_with(model__embedding_size=24), tmp_path)
    with pytest.raises(CheckpointError, match=r"round-000001.*head\.weight is of shape .* it is of another run"):
        load_private(tmp_path / "s", 1, other.recogniser, None, other.private)


@pytest.mark.parametrize("spoil", [lambda c: c[:100], lambda c: c[:-1] + bytes([c[-1] ^ 1])], ids=["cut", "one bit"])
def test_a_damaged_state_is_named_and_the_one_before_it_is_taken(spoil, tmp_path, caplog):
    state = tiny_workplace(settings_with(), tmp_path)
    recogniser, optimiser = stepped(state, steps=1)
    save_private(tmp_path / "s", 1, recogniser, optimiser, state.private)
    kept = recogniser.head.weight.clone()
    with torch.no_grad():
        recogniser.head.weight += 1
    save_private(tmp_path / "s", 2, recogniser, optimiser, state.private)
    path = tmp_path / "s" / "round-000002.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    assert load_private(tmp_path / "s", 2, recogniser, None, state.private) == 1
    assert torch.equal(recogniser.head.weight, kept)
    [line] = caplog.messages
    assert str(path) in line
