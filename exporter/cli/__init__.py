"""The command line: a module for each command. Library code does not import it."""
