"""What server, clients and simulation share: settings, faces, models, metrics, the wire and tracking."""
