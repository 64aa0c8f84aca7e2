"""A stock Flower app: FedAvg over a PyTorch network, each tensor an array, by the Message API's quickstart."""
