"""The `cupaged` command, one file a subcommand."""
