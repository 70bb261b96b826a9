"""The command line: a file a command, from its arguments to what it prints."""
