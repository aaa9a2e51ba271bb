"""The commands, a module each, imported only when they run; never parses arguments or the environment."""
