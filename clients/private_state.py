"""What stays with a client between rounds, on its disk: its head, private normalisation, their optimiser state, and
what a lossy codec has not sent yet; of a run with differential privacy the noisy answers too; and the change that left
last, beside the model that it is of, for `facefed privacy audit`.

Kept by run and round: the last three rounds' and the best one's, so that a repeated round starts from where that round
started; of a run that is over only the last and the best one's (`end_run`).
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import CheckpointError
from common.protocol.codec import Coded
from common.system.checkpoints import read_sealed, read_tensors, write_sealed, write_tensors
from common.system.events import SHOWN

log = logging.getLogger("facefed.client")

MODEL, OPTIMISER = "model/", "optimiser/"
RESIDUE, ANSWER, RECEIVED = "residue", "answer", "received"
REPLY_FILE = "reply.safetensors"


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
    folder: Path,
    server_round: int,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    names: Iterable[str],
    residue: NDArray[np.float32] | None = None,
) -> None:
    """Write the named (private) tensors of the module and their optimiser state as those after `server_round`.

    residue: what the codec of the change has not sent yet, flat float32; None where nothing is lost.
    """
    names = tuple(names)
    state: Mapping[str, Tensor] = module.state_dict()
    tensors = {MODEL + name: state[name] for name in names}
    tensors |= {OPTIMISER + name: value for name, value in _slots(module, optimiser, names).items()}
    if residue is not None:
        tensors[RESIDUE] = torch.from_numpy(residue)
    write_sealed(_round_file(folder, server_round), tensors, {"server_round": str(server_round)})


def load_private(
    folder: Path, server_round: int, module: nn.Module, optimiser: torch.optim.Optimizer | None, names: Iterable[str]
) -> int:
    """Restore the newest state that is not newer than `server_round`, and return its round (-1: there is none).

    An older round's state serves a client whose last reply was lost, or whose file is damaged; none means that the
    module's own, fresh values stay.  Raises CheckpointError when the file is of another model.
    """
    found, tensors = _newest_whole(folder, server_round)
    if found < 0:
        return -1
    path = _round_file(folder, found)
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
        _restore_slots(path, module, optimiser, tensors)
    return found


def _newest_whole(folder: Path, server_round: int) -> tuple[int, dict[str, Tensor]]:
    """The newest state that is not newer than `server_round` and not damaged, and its round; -1 for none."""
    for number in reversed(rounds_here(folder)):
        if number <= server_round:
            try:
                return number, read_sealed(_round_file(folder, number))[0]
            except CheckpointError as error:
                # This site's own disk; the run loses what its head learned in a round or two, and goes on.
                log.warning("%s%s An older state is taken.", SHOWN, error)
    return -1, {}


def _restore_slots(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        if key.startswith(OPTIMISER):
            name, _, slot = key.removeprefix(OPTIMISER).rpartition("/")
            if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
                raise CheckpointError(f"{path}: the optimiser's {key} is none of the model's; it is of another run.")
            # AdamW keeps its step counter on the CPU, as it wrote it
            device = "cpu" if slot == "step" else parameters[name].device
            optimiser.state[parameters[name]][slot] = value.to(device)


def load_residue(folder: Path, server_round: int, size: int) -> NDArray[np.float32]:
    """What the codec had not sent after `server_round`, [size] float32: zeros before the first change was sent.

    server_round: as `load_private` returned it.  Raises CheckpointError when it is of another model.
    """
    path = _round_file(folder, server_round)
    if not path.is_file():
        return np.zeros(size, dtype=np.float32)
    try:
        with safe_open(path, framework="np") as file:
            if RESIDUE not in file.keys():  # noqa: SIM118 - not a mapping
                return np.zeros(size, dtype=np.float32)
            residue: NDArray[np.float32] = file.get_tensor(RESIDUE)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}).") from None
    if residue.shape != (size,) or residue.dtype != np.float32:
        raise CheckpointError(f"{path}: the residue is {residue.dtype} {residue.shape}, the model has ({size},).")
    return residue


def _answer_file(folder: Path, server_round: int) -> Path:
    return folder / f"answer-{server_round:06d}.safetensors"


def save_answer(folder: Path, server_round: int, question: str, answer: bytes | memoryview) -> None:
    """Keep a noisy change as it leaves, so that the same question gets the same bits and no second noise.

    question: a digest of all that the answer follows from.  answer: at least one byte.
    """
    tensors = {ANSWER: torch.frombuffer(bytearray(answer), dtype=torch.uint8)}
    write_sealed(_answer_file(folder, server_round), tensors, {"question": question})


def load_answer(folder: Path, server_round: int, question: str) -> bytes | None:
    """The answer that was kept for this round and question; None where there is none, or it is damaged."""
    try:
        tensors, notes = read_sealed(_answer_file(folder, server_round))
    except CheckpointError:
        return None
    return tensors[ANSWER].numpy().tobytes() if notes.get("question") == question and ANSWER in tensors else None


def save_reply(folder: Path, server_round: int, received: NDArray[np.float32], change: Coded) -> None:
    """Keep the change that leaves, in the place of the one before.  received: the model that it is of, [size]."""
    tensors = {
        RECEIVED: torch.from_numpy(received),
        ANSWER: torch.frombuffer(bytearray(change.data), dtype=torch.uint8),
    }
    notes = {"server_round": str(server_round), "codec": change.codec, "size": str(change.size)}
    write_tensors(folder / REPLY_FILE, tensors, notes)


def load_reply(folder: Path) -> tuple[int, NDArray[np.float32], Coded]:
    """The round, the received model and the change of the last reply.  Raises CheckpointError where there is none."""
    path = folder / REPLY_FILE
    tensors, notes = read_tensors(path)
    try:
        coded = Coded(codec=notes["codec"], size=int(notes["size"]), data=tensors[ANSWER].numpy().tobytes())
        return int(notes["server_round"]), tensors[RECEIVED].numpy(), coded
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no reply of a site ({error}).") from None


def prune_answers(folder: Path, before: int) -> None:
    """Delete the answers of rounds before that one; later ones stay, as a server that went back comes to them again."""
    for path in folder.glob("answer-*.safetensors"):
        number = path.stem.removeprefix("answer-")
        if number.isascii() and number.isdigit() and int(number) < before:
            path.unlink()


def rounds_here(folder: Path) -> list[int]:
    """The rounds whose private state is here, ascending."""
    numbers = (path.stem.removeprefix("round-") for path in folder.glob("round-*.safetensors"))
    return sorted(int(number) for number in numbers if number.isascii() and number.isdigit())


def end_run(folder: Path, best_round: int) -> tuple[int, int]:
    """Delete the private states of a run that is over, but the best and the last two rounds'; returns (files, bytes).

    Should its server be started once more, the last evaluations are made with the best and the last, and the last round
    is repeated from the one before where the server's newest checkpoint is damaged.
    """
    last = max(rounds_here(folder), default=0)
    return prune(folder, {best_round, last - 1, last})


def prune(folder: Path, keep: Iterable[int]) -> tuple[int, int]:
    """Delete all private states but those that `load_private` would take for one of the rounds in `keep`.

    A client that was not sampled for a while may need a state that is older than all of them.  Returns how many are
    gone, and their bytes.
    """
    here, num_bytes = rounds_here(folder), 0
    wanted = {max((number for number in here if number <= server_round), default=-1) for server_round in keep}
    gone = set(here) - wanted
    for server_round in gone:
        num_bytes += _round_file(folder, server_round).stat().st_size
        _round_file(folder, server_round).unlink()
    return len(gone), num_bytes
