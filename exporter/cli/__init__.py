"""The command line. Each command has a module of its own; no other folder imports this one."""
