"""Ready configurations, found by name: `--config demo` means configs/demo.toml."""
