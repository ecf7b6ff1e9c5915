"""The command `localist-hf`."""
