"""What `lookalike index` and its sisters do on a command line, one file per group of commands."""
