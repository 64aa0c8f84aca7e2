"""Everything one machine with the data can do: the Ray simulation, local training, and the `facefed` program."""
