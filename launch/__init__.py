"""How a run is started: the command line, the bundled configs, the launchers; the only reader of the environment."""
