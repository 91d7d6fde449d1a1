"""What the commands of `anima-fast` do, one file a command. Each has `run(options) -> exit code`."""
