"""The server side: the Flower ServerApp, its round loop and strategies, and the `flower-server` program."""
