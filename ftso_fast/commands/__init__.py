"""What each command of `ftso` takes and prints: a module a command, `add` with its arguments, `run` with its work."""
