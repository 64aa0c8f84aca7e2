"""A stock Flower app that sends one flat array to each client and takes it back."""
