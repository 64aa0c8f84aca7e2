"""What stays with a client between rounds: its head, private normalisation, and their optimiser state, on its disk.

Kept by run and round (the previous, the latest and the best round's), so that a repeated round starts from where that
round started.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoints import read_tensors, write_tensors
from common.errors import CheckpointError

MODEL, OPTIMISER = "model/", "optimiser/"


def _round_file(folder: Path, server_round: int) -> Path:
    return folder / f"round-{server_round:06d}.safetensors"


def _slots(module: nn.Module, optimiser: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Optimiser tensors of the named parameters, as {"head.weight/momentum_buffer": tensor}."""
    wanted = set(names)
    return {
        f"{name}/{slot}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in module.named_parameters()
        if name in wanted
        for slot, value in optimiser.state.get(parameter, {}).items()
        if value is not None
    }


def save_private(
    folder: Path, server_round: int, module: nn.Module, optimiser: torch.optim.Optimizer, names: Iterable[str]
) -> None:
    """Write the named (private) tensors of the module and their optimiser state as those after `server_round`."""
    names = tuple(names)
    state: Mapping[str, Tensor] = module.state_dict()
    tensors = {MODEL + name: state[name] for name in names}
    tensors |= {OPTIMISER + name: value for name, value in _slots(module, optimiser, names).items()}
    write_tensors(_round_file(folder, server_round), tensors, {"server_round": str(server_round)})


def load_private(
    folder: Path, server_round: int, module: nn.Module, optimiser: torch.optim.Optimizer | None, names: Iterable[str]
) -> int:
    """Restore the newest state that is not newer than `server_round`, and return its round (-1: there is none).

    An older round's state serves a client whose last reply was lost; none means that the module's own, fresh values
    stay.  Raises CheckpointError when the file is damaged or of another model.
    """
    here = [number for number in rounds_here(folder) if number <= server_round]
    if not here:
        return -1
    path = _round_file(folder, here[-1])
    tensors, _ = read_tensors(path)
    state = module.state_dict()
    with torch.no_grad():
        for name in names:
            saved = tensors.get(MODEL + name)
            if saved is None or saved.shape != state[name].shape:
                seen = "missing" if saved is None else f"of shape {tuple(saved.shape)}"
                raise CheckpointError(
                    f"{path}: {name} is {seen}, the model has {tuple(state[name].shape)}; it is of another run."
                )
            state[name].copy_(saved)
    if optimiser is not None:
        _restore_slots(module, optimiser, tensors)
    return here[-1]


def _restore_slots(module: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        if key.startswith(OPTIMISER):
            name, slot = key.removeprefix(OPTIMISER).rsplit("/", 1)
            # AdamW keeps its step counter on the CPU, as it wrote it
            device = "cpu" if slot == "step" else parameters[name].device
            optimiser.state[parameters[name]][slot] = value.to(device)


def rounds_here(folder: Path) -> list[int]:
    """The rounds whose private state is here, ascending."""
    return sorted(int(path.stem.removeprefix("round-")) for path in folder.glob("round-*.safetensors"))


def prune(folder: Path, keep: Iterable[int]) -> None:
    """Delete the private states of all rounds but those in `keep`."""
    wanted = {_round_file(folder, server_round) for server_round in keep}
    for path in folder.glob("round-*.safetensors"):
        if path not in wanted:
            path.unlink()
