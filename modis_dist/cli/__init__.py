"""The commands: they parse arguments, call, and print. Heavy imports stand inside them, so that `--help` is fast."""
