"""The client side: the Flower ClientApp, one site's training, and the `flower-client` program."""
